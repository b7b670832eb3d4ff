"""Measures of a classifier: the confusion matrix first, everything that can be read off it from it."""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

# More would tell digits from other things better still, but the calibration error of digits is limited to 1%.
NO_DIGIT_SHARE = 0.008


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How often each true class (row) was predicted as each class (column): int64 (num_classes, num_classes).

    Predictions and labels are int64 (N,) in 0..num_classes-1 on one device.
    """
    cells = labels * num_classes + predictions
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% score interval for an accuracy measured on `total` images, at least one.

    Unlike the textbook's normal approximation it stays inside 0..1 and holds near 100%, where MNIST lives.
    It covers the chance in which images were tested, not the spread between training seeds.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    z, share = NormalDist().inv_cdf(0.975), correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def precision(confusion: Tensor) -> Tensor:
    """Of the images predicted as each class, the share that are: float32 (C,); nan where none was predicted."""
    return confusion.diagonal() / confusion.sum(dim=0)


def recall(confusion: Tensor) -> Tensor:
    """Of the images that are each class, the share predicted as it: float32 (C,); nan where there is no such image."""
    return confusion.diagonal() / confusion.sum(dim=1)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The mean distance between how sure the predictions are and how often they are right, in 0..1.

    Images are sorted by confidence into `bins` equal intervals; within each, mean confidence is compared with accuracy.
    Probabilities are float (N, C), labels int64 (N,), N > 0.
    Source: C. Guo et al., "On calibration of modern neural networks", ICML 2017, eq. 3.
    """
    confidences, predictions = probabilities.cpu().double().max(dim=1)
    bin_of = (confidences * bins).ceil().long()
    # The bin's weight (its share of the images) cancels the division by its size in both of its means.
    gaps = torch.bincount(bin_of, weights=confidences - (predictions == labels.cpu()).double())
    return float(gaps.abs().sum() / len(confidences))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T in 0.05..20 for which softmax(logits / T) has the smallest cross-entropy.

    It makes confidences honest and changes no prediction; fit it on images that were not trained on: logits float
    (N, C), finite, labels int64 (N,). The loss is convex in 1/T, so that its slope changes sign only once.
    Where every prediction is right, T is 1: the loss then falls all the way to T = 0, which would claim certainty that
    a finite number of images cannot show.
    Source: C. Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    if bool((logits.argmax(dim=1) == labels).all()):
        return 1.0
    of_labels = logits.gather(1, labels.unsqueeze(1)).mean()

    def too_low(log_temperature: float) -> bool:
        expected = (logits / math.exp(log_temperature)).softmax(dim=1) * logits
        return bool(expected.sum(dim=1).mean() > of_labels)  # the slope of the loss along 1/T

    return math.exp(_bisect(too_low, math.log(0.05), math.log(20.0)))


def confidences(logits: Tensor, temperature: float, no_digit_level: float) -> Tensor:
    """How sure a model with logits float (N, C) is of each class: float64 (N, C), rows sum to 1.

    softmax(logits / T) says which class, but never that none fits. How much there is of any class at all is
    logsumexp(logits / T), the negated free energy of W. Liu et al., "Energy-based out-of-distribution detection",
    NeurIPS 2020. As it sinks below `no_digit_level`, the answer goes over to "every class is as likely"; a level of
    -inf leaves the softmax alone. Which class is the likeliest never changes.
    """
    scaled = logits.double() / temperature
    # Not wholly: rounding would make all classes equal, and the first of them the answer.
    no_digit = _no_digit(scaled, no_digit_level).clamp(max=1 - 1e-6).unsqueeze(1)
    return (1 - no_digit) * scaled.softmax(dim=1) + no_digit / scaled.shape[1]


def fit_no_digit_level(logits: Tensor, temperature: float) -> float:
    """The level at which held-out digits give up `NO_DIGIT_SHARE` of their confidence on average.

    It needs no examples of what is not a digit; those have far less evidence than almost every digit.
    """
    scaled = logits.detach().cpu().double() / temperature
    return _bisect(lambda level: bool(_no_digit(scaled, level).mean() < NO_DIGIT_SHARE), -100.0, 100.0)


def _no_digit(scaled: Tensor, level: float) -> Tensor:
    return (2 * (level - scaled.logsumexp(dim=1))).sigmoid()


def _bisect(too_low: Callable[[float], bool], low: float, high: float) -> float:
    """Where `too_low`, true up to some point in low..high and false beyond it, changes."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return low
