"""What trained models answer on images, and every measure of it."""

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_accel import metrics
from mnist_accel.cli import SharedError, UserError
from mnist_accel.config import TrainConfig
from mnist_accel.data import ImageData, Split, load_data
from mnist_accel.distributed import use_all_cores
from mnist_accel.models import DigitClassifier, load_model
from mnist_accel.predict import default_model
from mnist_accel.summary import confusion_lines


def predict_logits(model: nn.Module, images: Tensor, device: torch.device, batch_size: int = 500) -> Tensor:
    """The logits, float32 (N, C) on `device`, of a model there, for images uint8 (N, 28, 28), N > 0.

    The images may lie anywhere: each batch is moved and converted on its own. The model is left in eval mode.
    """
    model.eval()
    # `prepare` replaced this instance's forward by one in mixed precision. Whoever loads the weights computes without:
    # so the class's.
    forward = partial(type(model).forward, model)
    with torch.inference_mode():
        batches = images.split(batch_size)
        return torch.cat([forward(batch.to(device).unsqueeze(1).float() / 255) for batch in batches])


@dataclass(frozen=True)
class Evaluation:
    """The measures of one model, or of an ensemble, on one split."""

    class_names: list[str]
    confusion: Tensor  # int64 (C, C), rows are true classes
    loss: float  # mean cross-entropy in nats (of the models' mean) at temperature 1, as `eval_loss` in metrics.jsonl
    calibration_error: float  # expected calibration error of `probabilities`, 0..1
    probabilities: Tensor  # float32 (N, C) on the CPU, calibrated by each model: the confidences that users see
    single_accuracies: list[float]  # of each model alone, 0..1

    @property
    def correct(self) -> int:
        return int(self.confusion.trace())

    @property
    def total(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def as_line(self) -> str:
        return f"Average loss: {self.loss:.4f}, Accuracy: {self.correct}/{self.total} ({self.accuracy:.2%})"

    def as_json(self) -> dict[str, Any]:
        """Every measure as JSON values; a precision or recall that nothing was counted for is null."""
        shares = [
            [None if math.isnan(share) else share for share in measure(self.confusion).tolist()]
            for measure in (metrics.precision, metrics.recall)
        ]
        rows = zip(self.class_names, self.confusion.sum(dim=1).tolist(), *shares, strict=True)
        return {
            "images": self.total,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "accuracy_interval_95": list(metrics.accuracy_interval(self.correct, self.total)),
            "single_accuracies": self.single_accuracies,
            "loss": self.loss,
            "expected_calibration_error": self.calibration_error,
            "per_class": [{"class": name, "images": count, "precision": p, "recall": r} for name, count, p, r in rows],
            "confusion_matrix": self.confusion.tolist(),
        }

    def as_text(self) -> str:
        """Every measure as lines of text for a terminal."""
        measures = self.as_json()
        low, high = measures["accuracy_interval_95"]
        width = max(9, *map(len, self.class_names))
        lines = [
            f"accuracy           {self.accuracy:.2%}  ({self.correct:,} of {self.total:,}; "
            f"95% confidence interval {low:.2%} to {high:.2%})",
            f"loss               {self.loss:.4f}",
            f"calibration error  {self.calibration_error:.2%}",
            "",
            f"{'class':{width}}  {'images':>7}  {'precision':>9}  {'recall':>7}",
        ]
        if len(self.single_accuracies) > 1:
            lines.insert(1, "each model alone   " + "  ".join(f"{accuracy:.2%}" for accuracy in self.single_accuracies))
        for row in measures["per_class"]:
            precision, recall = ("-" if row[key] is None else f"{row[key]:.2%}" for key in ("precision", "recall"))
            lines.append(f"{row['class']:{width}}  {row['images']:7,}  {precision:>9}  {recall:>7}")
        return "\n".join([*lines, "", *confusion_lines(self.confusion.numpy(), self.class_names)])


def evaluate(models: list[DigitClassifier], split: Split, class_names: list[str], device: torch.device) -> Evaluation:
    """Measure the mean of the probabilities of models, at least one, with as many classes; moves them to `device`.

    Classes are matched by their names, and by their places where a model calls them otherwise.
    """

    def answers(model: DigitClassifier) -> Tensor:
        own = model.class_names if set(model.class_names) == set(class_names) else class_names
        columns = [own.index(name) for name in class_names]
        return predict_logits(model.to(device), split.images, device).cpu()[:, columns]

    return _measure([answers(model) for model in models], models, split.labels, class_names)


def evaluate_on_all_ranks(accelerator: Accelerator, model: DigitClassifier, split: Split) -> tuple[Evaluation, Tensor]:
    """Each rank answers its own part of a split, so that every image counts once; all ranks get the same measures.

    `model` is the plain network, never the one that DDP wraps, which would wait for ranks with fewer batches. Also
    returns the logits, float32 (N, C) on the CPU. A `SharedError` where one is not finite: training has diverged.
    """
    ranks, rank, total = accelerator.num_processes, accelerator.process_index, len(split.labels)
    own = slice(total * rank // ranks, total * (rank + 1) // ranks)
    logits = torch.zeros(total, len(model.class_names), device=accelerator.device)
    if own.stop > own.start:
        logits[own] = predict_logits(model, split.images[own], accelerator.device)
    logits = accelerator.reduce(logits, reduction="sum").cpu()  # the rows of other ranks are zero
    if not torch.isfinite(logits).all():
        raise SharedError(
            "the network's answers are not finite numbers: the last steps have diverged; lower --learning-rate or set "
            "--max-grad-norm 1"
        )
    return _measure([logits], [model], split.labels, model.class_names), logits


def _measure(logits: list[Tensor], models: list[DigitClassifier], labels: Tensor, class_names: list[str]) -> Evaluation:
    # The mean over models in logarithms, so that no small probability becomes zero.
    plain = torch.stack([F.log_softmax(each.double(), dim=1) for each in logits]).logsumexp(dim=0)
    probabilities = torch.stack([m.probabilities(each) for m, each in zip(models, logits, strict=True)]).mean(dim=0)
    return Evaluation(
        class_names=list(class_names),
        confusion=metrics.confusion_matrix(probabilities.argmax(dim=1), labels, len(class_names)),
        loss=float(F.nll_loss(plain, labels)) + math.log(len(models)),
        calibration_error=metrics.expected_calibration_error(probabilities, labels),
        probabilities=probabilities.float(),
        single_accuracies=[float((each.argmax(dim=1) == labels).double().mean()) for each in logits],
    )


def load_for_evaluation(models: list[str] | None, dataset: str | None) -> tuple[dict[str, DigitClassifier], ImageData]:
    """Models by name (without names the default one), and the data set to use them on: by default the first one's own.

    Raises a `UserError` where either cannot be loaded, or a model has another number of classes than the data set.
    """
    use_all_cores()
    loaded = {name: load_model(name) for name in models or [str(default_model())]}
    data = load_data(dataset or next(iter(loaded.values())).dataset or TrainConfig.dataset)
    for path, model in loaded.items():
        own, given = (f"{len(names)} classes ({', '.join(names)})" for names in (model.class_names, data.class_names))
        if len(model.class_names) != len(data.class_names):
            raise UserError(
                f"{path}{'' if models else ', the newest run here,'} has {own}, the data set {given}: choose --model "
                "and --dataset that belong together"
            )
        if set(model.class_names) != set(data.class_names):
            print(f"note: the model has {own}, the data set {given}", file=sys.stderr)
    return loaded, data
