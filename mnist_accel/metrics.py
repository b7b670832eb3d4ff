"""Measures of a classifier: the confusion matrix first, everything that can be read off it from it."""

import math
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

# More would tell digits from other things better still, but the calibration error of digits is limited to 1%.
NO_DIGIT_SHARE = 0.008


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count how often each true class was predicted as each class.

    Matrices of parts of a data set add up to that of the whole, so ranks need only sum them.

    Args:
        predictions: int64 (N,) in 0..num_classes-1.
        labels: int64 (N,) in 0..num_classes-1, on the same device.

    Returns:
        int64 (num_classes, num_classes) on the inputs' device; rows are true classes, columns predicted ones.
    """
    cells = labels * num_classes + predictions
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(confusion: Tensor) -> float:
    """The share of right predictions in 0..1; nan for an empty matrix."""
    total = int(confusion.sum())
    return int(confusion.diagonal().sum()) / total if total else math.nan


def accuracy_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for an accuracy measured on `total` images; (0, 1) where there are none.

    Unlike the textbook's normal approximation it stays inside 0..1 and holds near 100%, where MNIST lives.
    It covers the chance in which images were tested, not the spread between training seeds.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
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
    Source: C. Guo et al., "On calibration of modern neural networks", ICML 2017, eq. 3.

    Args:
        probabilities: float (N, C), rows that sum to 1; N > 0.
        labels: int64 (N,).
    """
    confidences, predictions = probabilities.cpu().double().max(dim=1)
    right = (predictions == labels.cpu()).double()
    bin_of = (confidences * bins).ceil().long().clamp(1, bins) - 1
    # The bin's weight (its share of the images) cancels the division by its size in both of its means.
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, confidences - right)
    return float(gaps.abs().sum() / len(confidences))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T in 0.05..20 for which softmax(logits / T) has the smallest cross-entropy.

    It makes confidences honest and changes no prediction; fit it on images that were not trained on. Golden-section
    search is enough: the loss is convex in 1/T, so along log T it has one valley.
    Source: C. Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2.

    Args:
        logits: float (N, C), finite.
        labels: int64 (N,).

    Returns:
        1.0 where every prediction is right (or there is none): the loss then falls all the way to T = 0, which would
        claim certainty that a finite number of images cannot show.
    """
    logits, labels = logits.detach().cpu().double(), labels.cpu()
    if not torch.isfinite(logits).all():
        raise ValueError("logits must be finite")
    if bool((logits.argmax(dim=1) == labels).all()):
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(0.05), math.log(20.0)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    while high - low > 1e-4:
        if loss_left < loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = loss(right)
    return math.exp((low + high) / 2)


def confidences(logits: Tensor, temperature: float, no_digit_level: float) -> Tensor:
    """How sure a model is of each class: float64 (N, C), rows sum to 1.

    softmax(logits / T) says which class, but never that none fits. How much there is of any class at all is
    logsumexp(logits / T), the negated free energy of W. Liu et al., "Energy-based out-of-distribution detection",
    NeurIPS 2020. As it sinks below `no_digit_level`, the answer goes over to "every class is as likely".

    Args:
        logits: float (N, C).
        temperature: as `fit_temperature` finds it.
        no_digit_level: as `fit_no_digit_level` finds it; -inf leaves the softmax alone.
    """
    scaled = logits.double() / temperature
    no_digit = _no_digit(scaled, no_digit_level).unsqueeze(1)
    return (1 - no_digit) * scaled.softmax(dim=1) + no_digit / scaled.shape[1]


def fit_no_digit_level(logits: Tensor, temperature: float) -> float:
    """The level at which held-out digits give up `NO_DIGIT_SHARE` of their confidence on average, by bisection.

    It needs no examples of what is not a digit; those have far less evidence than almost every digit.
    """
    scaled = logits.detach().cpu().double() / temperature
    low, high = -100.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _no_digit(scaled, middle).mean() < NO_DIGIT_SHARE else (low, middle)
    return low


def _no_digit(scaled: Tensor, level: float) -> Tensor:
    return (2 * (level - scaled.logsumexp(dim=1))).sigmoid()
