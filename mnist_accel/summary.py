"""What a user wants to know of all rows together, counted as they pass."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Summary:
    """Counts over rows; `confusion` is int64 (classes, classes), rows labels, columns predictions."""

    class_names: list[str]
    answered: np.ndarray = field(init=False)
    confusion: np.ndarray = field(init=False)
    total_confidence: float = 0.0
    unreadable: int = 0
    unlabelled: int = 0
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        size = len(self.class_names)
        self.answered, self.confusion = np.zeros(size, np.int64), np.zeros((size, size), np.int64)

    def add(self, prediction: int | None, confidence: float | None, label: int | None) -> None:
        """Count one file: prediction and label are indices of classes, None where it was not read or has no label."""
        self.unlabelled += label is None
        if prediction is None or confidence is None:
            self.unreadable += 1
            return
        self.answered[prediction] += 1
        self.total_confidence += confidence
        if label is not None:
            self.confusion[label, prediction] += 1

    def text(self, labelled: bool) -> str:
        """Counts, mean confidence, unreadable files and speed; with labels, accuracy and confusion matrix."""
        read = int(self.answered.sum())
        counts = "  ".join(f"{name}: {n}" for name, n in zip(self.class_names, self.answered, strict=True))
        confidence = f", mean confidence {self.total_confidence / read:.3f}" if read else ""
        lines = [
            counts,
            f"{read} images read{confidence}, {self.unreadable} could not be read, "
            f"{(read + self.unreadable) / (time.perf_counter() - self.began):.0f} images/s",
        ]
        if labelled:
            right, known = int(np.trace(self.confusion)), int(self.confusion.sum())
            accuracy = (
                f"{right}/{known} ({right / known:.2%})" if known else "none of the labelled images could be read"
            )
            lines.append(f"Accuracy: {accuracy}" + (f", {self.unlabelled} without a label" if self.unlabelled else ""))
            width = max(5, *(len(name) + 1 for name in self.class_names), len(str(self.confusion.max())) + 1)
            lines.append("Confusion matrix (rows: label, columns: prediction)")
            lines.append(" " * width + "".join(name.rjust(width) for name in self.class_names))
            for name, counts_of in zip(self.class_names, self.confusion, strict=True):
                lines.append(name.rjust(width) + "".join(str(n).rjust(width) for n in counts_of))
        return "\n".join(lines)


def label_of(path: str, folder: Path, source: str, class_names: list[str]) -> int | None:
    """The index of the true class of a file, None if it has no label.

    It is read from the file's name's first character (source "name") or from its parent folder's name ("folder").
    """
    *parents, file_name = path.split("/")
    parent = parents[-1] if parents else folder.resolve().name
    name = file_name[:1] if source == "name" else parent
    return class_names.index(name) if name in class_names else None
