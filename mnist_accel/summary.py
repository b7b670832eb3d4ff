"""What a user wants to know of all rows together, counted as they pass."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnist_accel.image_files import Seen


class Summary:
    """How often each label got each answer, and the rows that have a picture, with their labels.

    `label` gives a path's label as the index of a class, None for none; the work began at `began`, by
    `time.perf_counter`.
    """

    def __init__(self, class_names: list[str], label: Callable[[str], int | None], began: float) -> None:
        self.class_names, self.label, self.began = class_names, label, began
        self.shown: list[tuple[Seen, int | None]] = []
        # Rows are labels, columns predictions; the last of each is for None.
        self.counts = np.zeros((len(class_names) + 1,) * 2, np.int64)
        self.total_confidence = 0.0

    @property
    def unreadable(self) -> int:
        return int(self.counts[:, -1].sum())

    def count(self, row: Seen) -> Seen:
        """Count one file, and return it."""
        label = self.label(row.path)
        self.counts[-1 if label is None else label, -1 if row.prediction is None else row.prediction] += 1
        self.total_confidence += row.confidence or 0
        if row.picture is not None:
            self.shown.append((row, label))
        return row

    def text(self, labelled: bool) -> str:
        """Counts, mean confidence, unreadable files and speed; with labels, accuracy and confusion matrix."""
        answered = self.counts[:, :-1].sum(0)
        read, total = answered.sum(), self.counts.sum()
        confidence = f", mean confidence {self.total_confidence / read:.3f}" if read else ""
        seconds = time.perf_counter() - self.began
        lines = [
            "predicted  " + "  ".join(f"{name}: {n}" for name, n in zip(self.class_names, answered, strict=True)),
            f"{read} images read{confidence}, {self.unreadable} could not be read, "
            f"in {seconds:.1f} s ({total / seconds:,.0f} images/s)",
        ]
        if labelled:
            confusion, unlabelled = self.counts[:-1, :-1], self.counts[-1].sum()
            right, known = confusion.trace(), confusion.sum()
            share = f"{right}/{known} ({right / known:.2%})" if known else "none of the labelled images could be read"
            unread = self.counts[:-1, -1].sum()
            rest = f", {unlabelled} without a label" if unlabelled else ""
            rest += f", {unread} with a label could not be read" if unread and known else ""
            lines += [f"Accuracy: {share}{rest}", *confusion_lines(confusion, self.class_names)]
        return "\n".join(lines)


def confusion_lines(counts: np.ndarray, class_names: list[str]) -> list[str]:
    """Counts by true and predicted class, int64 (C, C), as lines; column names are cut where that tells them apart."""
    short = [name[:7] for name in class_names]
    if len(set(short)) < len(short):
        short = class_names
    width, cell = max(map(len, class_names)), 2 + max(map(len, [*short, str(counts.max())]))
    lines = ["Confusion matrix (rows: true, columns: predicted)"]
    for name, cells in zip(["", *class_names], [short, *counts], strict=True):
        lines.append(name.ljust(width) + "".join(str(each or ".").rjust(cell) for each in cells))
    return lines


def label_of(path: str, folder: str | Path, source: str | None, class_names: list[str]) -> int | None:
    """The index of the true class of a file, None if it has no label.

    It is read from the file's name's first character (source "name") or from its parent folder's name ("folder"), where
    there is a source at all.
    """
    if source is None:
        return None
    *parents, file_name = path.split("/")
    parent = parents[-1] if parents else Path(folder).resolve().name
    name = file_name[:1] if source == "name" else parent
    return class_names.index(name) if name in class_names else None
