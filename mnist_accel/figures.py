"""The pictures: curves, confusion matrix, mistakes, samples. Drawn in memory; no display is needed.

Every function returns what it drew as an RGB array uint8 (H, W, 3), as trackers and `output.write_picture` take it.
Tensors lie on the CPU. matplotlib is slow to load, so it is imported on first use.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_accel.metrics import precision, recall

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

# Blue and vermilion stay distinct to colour-blind readers: M. Okabe and K. Ito, "Color universal design", 2008.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#5F6368"
MISTAKES = 24
# Installed fonts for class names in signs that matplotlib's own font lacks: Chinese, Japanese, Korean.
EASTERN = re.compile("CJK|Hei|Hiragino|PingFang|Gothic|Fallback|Arial Unicode")
# On top of matplotlib's defaults, so that neither the user's matplotlibrc nor a `$` in a class's name changes a figure.
STYLE: Any = {
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E6E9",
    "legend.frameon": False,
    "text.parse_math": False,
}


def draw_curves(rows: list[dict[str, Any]]) -> np.ndarray:
    """Loss, accuracy and learning rate from the rows of `metrics.jsonl`, one an epoch; missing values leave gaps."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    names = ("epoch", "train_loss", "eval_loss", "eval_accuracy", "learning_rate")
    epochs, train_loss, eval_loss, accuracy, rates = (np.array([row.get(n) for row in rows], float) for n in names)
    with styled_figure(8.4, 5.0) as figure:
        axes = figure.subplot_mosaic([["loss", "accuracy"], ["rate", "rate"]], height_ratios=[3, 1.1])
        loss, score, rate = axes["loss"], axes["accuracy"], axes["rate"]
        loss.plot(epochs, train_loss, "o-", color=BLUE, markersize=4, label="training")
        loss.plot(epochs, eval_loss, "s--", color=VERMILION, markersize=4, label="evaluation")
        losses = np.concatenate((train_loss, eval_loss))
        losses = losses[np.isfinite(losses) & (losses > 0)]
        if losses.size and losses.max() > 5 * losses.min():
            loss.set_yscale("log")
            # Plain numbers at 1, 2 and 5: two at least in the range that a logarithmic axis is for.
            loss.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
            loss.yaxis.set_major_formatter("{x:g}")
        loss.set(title="Loss", xlabel="epoch")
        loss.legend()
        score.plot(epochs, 100 * accuracy, "s--", color=VERMILION, markersize=4)
        best = int(accuracy.argmax())
        score.plot(epochs[best], 100 * accuracy[best], "*", color=BLUE, markersize=15, clip_on=False)
        title = f"Accuracy, %: best {100 * accuracy[best]:.2f} in epoch {epochs[best]:g}"
        score.margins(y=0.15)
        score.set(title=title, xlabel="epoch", ylim=np.clip(score.get_ylim(), 0, 100))
        score.ticklabel_format(axis="y", useOffset=False)
        rate.plot(epochs, rates, ".-", color=GREY)
        rate.set(title="Learning rate", xlabel="epoch")
        rate.margins(y=0.2)
        rate.set_ylim(bottom=0)
        for axis in axes.values():
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
        return pixels_of(figure)


def draw_confusion_matrix(confusion: Tensor, class_names: list[str]) -> np.ndarray:
    """The counts by true (row) and predicted (column) class, int64 (C, C), with recall at the right, precision on top.

    Right answers and mistakes are shaded on scales of their own: at 99% accuracy a common one would show no mistake.
    """
    counts, classes = confusion.numpy(), len(class_names)
    recalls, precisions = recall(confusion).tolist(), precision(confusion).tolist()
    right, total = int(counts.trace()), int(counts.sum())
    diagonal = np.eye(classes, dtype=bool)
    # From 0, white, to 0.75: beyond that a colour map is too dark to read on.
    shades = np.where(diagonal, 0.15 + 0.6 * np.nan_to_num(recalls)[:, None], 0.75 * counts)
    shades[~diagonal] /= counts[~diagonal].max(initial=1)

    side = min(max(6.6, 0.55 * classes + 1.6), 40.0)
    size = 10 if classes <= 12 else 8
    names = [_shortened(name) for name in class_names]
    slanted: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 4 else {}
    with styled_figure(side, side) as figure:
        axes = figure.subplots()
        for colours, cells in (("Blues", diagonal), ("Oranges", ~diagonal & (counts > 0))):
            axes.imshow(np.ma.masked_where(~cells, shades), cmap=colours, vmin=0, vmax=1)
        for row, column in np.argwhere(counts):
            colour = "white" if shades[row, column] > 0.57 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, size=size)
        axes.set_xticks(range(classes), names, **slanted)
        axes.set_yticks(range(classes), names)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{right:,} of {total:,} right ({right / max(total, 1):.2%})", pad=10)
        top, beside = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
        top.set_xticks(range(classes), map(_percent, precisions), size=size - 1, color=GREY)
        beside.set_yticks(range(classes), map(_percent, recalls), size=size - 1, color=GREY)
        top.set_xlabel("precision", color=GREY)
        beside.set_ylabel("recall", color=GREY)
        for axis in (axes, top, beside):
            axis.tick_params(length=0)
            axis.grid(False)
            axis.spines[:].set_visible(False)
        return pixels_of(figure)


def draw_mistakes(images: Tensor, labels: Tensor, probabilities: Tensor, class_names: list[str]) -> np.ndarray:
    """The `MISTAKES` that the model was surest of, worst first; a picture that says so where there are none.

    Arguments as in `draw_samples`.
    """
    confidences, predictions = probabilities.max(dim=1)
    wrong = (predictions != labels).nonzero().flatten()
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    title = f"Mistakes in {len(labels):,} images, the most confident first: {len(worst)} of {len(wrong):,}"
    if len(wrong) == 0:
        title = f"No mistake in {len(labels):,} images"
    return draw_samples(images[worst], labels[worst], probabilities[worst], class_names, title)


def draw_samples(
    images: Tensor, labels: Tensor, probabilities: Tensor, class_names: list[str], title: str = ""
) -> np.ndarray:
    """Images with the model's answers, the right and the wrong ones told apart by colour, mark and text.

    Images are uint8 (N, 28, 28), labels int64 (N,), probabilities float (N, C); the title is how many are right, unless
    there is another.
    """
    from matplotlib.patches import Rectangle

    confidences, predictions = probabilities.max(dim=1)
    answers = list(zip(images.numpy(), labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True))
    title = title or f"{sum(label == prediction for _, label, prediction, _ in answers)} of {len(answers)} right"
    columns = 5 if len(answers) <= 15 else 6 if len(answers) <= 36 else 10
    # Measured in pixels of the images, each of which stands at the top of a cell with its caption below.
    width, height = columns * 38, max(0.2, math.ceil(len(answers) / columns)) * 44
    inches = 8.4 / (6 * 38)
    with styled_figure(width * inches, height * inches + 0.45) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_title(title, x=0.02)
        for index, (image, label, prediction, confidence) in enumerate(answers):
            left, top = index % columns * 38 + 5, index // columns * 44 + 2
            axes.imshow(image, extent=(left, left + 28, top + 28, top), cmap="gray", vmin=0, vmax=255)
            colour, mark = (BLUE, "✓") if label == prediction else (VERMILION, "✗")
            axes.add_patch(Rectangle((left - 0.5, top - 0.5), 29, 29, fill=False, edgecolor=colour, linewidth=2.5))
            middle: dict[str, Any] = {"x": left + 14, "ha": "center", "va": "center"}
            name, truth = _shortened(class_names[prediction]), _shortened(class_names[label])
            axes.text(y=top + 32.5, s=f"{mark} {name}", color=colour, size=9, weight="bold", **middle)
            caption = _percent(confidence) + ("" if label == prediction else f" · is {truth}")
            axes.text(y=top + 37, s=caption, color="black", size=8, **middle)
        # Last, as imshow narrows the view to the image that it draws.
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
        return pixels_of(figure)


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, in the style of this module until the block ends."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.font_manager import get_font_names

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells of each that is not bold
    families = ["DejaVu Sans", *sorted(filter(EASTERN.search, get_font_names()))]
    with style.context(["default", STYLE | {"font.family": families}]):
        yield Figure(figsize=(width, height), dpi=160, layout="constrained")


def pixels_of(figure: Figure) -> np.ndarray:
    """A figure as every function here returns it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it is drawn as a box
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _percent(share: float) -> str:
    """A share in 0..1 as text; a dash for nan, a share of nothing."""
    return "-" if math.isnan(share) else f"{share:.1%}"


def _shortened(name: str) -> str:
    """At most 12 characters; many names differ only at their ends."""
    return name if len(name) <= 12 else f"{name[:6]}…{name[-5:]}"
