"""The pictures: curves, confusion matrix, mistakes, samples. Drawn in memory; no display is needed.

Every function returns what it drew as an RGB array uint8 (H, W, 3), as trackers want it, and writes it to `path` as
well unless that is None. matplotlib is imported on first use: it is slow to load, and most programs here draw nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_accel.cli import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

# Blue and vermilion stay distinct to colour-blind readers: M. Okabe and K. Ito, "Color universal design", 2008.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#5F6368"
DOTS_PER_INCH = 160
# Fixed here, so that neither the user's matplotlibrc nor a `$` in a class's name changes a figure.
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
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


def draw_curves(rows: Sequence[dict[str, Any]], path: str | Path | None = None) -> np.ndarray:
    """Loss, accuracy and learning rate by epoch, from the rows of `metrics.jsonl`.

    Args:
        rows: with `epoch`, `train_loss`, `eval_loss`, `eval_accuracy` (0..1) and `learning_rate`; a row with
            `final` true is left out, and a value that is missing or not finite leaves a gap.
        path: the picture to write, if any.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if not row.get("final")]

    def column(key: str) -> np.ndarray:
        values = np.array([math.nan if row.get(key) is None else float(row[key]) for row in rows])
        return np.where(np.isfinite(values), values, math.nan)

    with _figure(8.4, 5.0) as figure:
        axes = figure.subplot_mosaic([["loss", "accuracy"], ["rate", "rate"]], height_ratios=[3, 1.1])
        epochs, percent = column("epoch"), 100 * column("eval_accuracy")
        loss, score, rate = axes["loss"], axes["accuracy"], axes["rate"]
        loss.plot(epochs, column("train_loss"), "o-", color=BLUE, markersize=4, label="training")
        loss.plot(epochs, column("eval_loss"), "s--", color=VERMILION, markersize=4, label="evaluation")
        loss.set(title="Loss", xlabel="epoch")
        losses = np.concatenate([column("train_loss"), column("eval_loss")])
        losses = losses[np.isfinite(losses)]
        if losses.size and losses.min() > 0:
            _label_log_axis(loss)
        loss.legend()
        score.plot(epochs, percent, "s--", color=VERMILION, markersize=4)
        score.set(title="Evaluation accuracy, %", xlabel="epoch")
        score.ticklabel_format(axis="y", useOffset=False)
        if np.isfinite(percent).any():
            best = int(np.nanargmax(percent))
            label = f"best: {percent[best]:.2f}% at epoch {epochs[best]:g}"
            score.plot(epochs[best], percent[best], "*", color=BLUE, markersize=15, label=label, clip_on=False)
            score.legend()
            low, high = np.nanmin(percent), percent[best]
            margin = max(0.15 * (high - low), 0.1)
            score.set_ylim(max(low - margin, 0), min(high + margin, 100))
        rate.plot(epochs, column("learning_rate"), ".-", color=GREY)
        rate.set(title="Learning rate", xlabel="epoch")
        rate.set_ylim(bottom=0)
        for axis in axes.values():
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if rows:
                axis.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
        return _render(figure, path)


def draw_confusion_matrix(confusion: Tensor, class_names: Sequence[str], path: str | Path | None = None) -> np.ndarray:
    """The counts by true (row) and predicted (column) class, with recall at the right and precision below.

    Right answers and mistakes are shaded on scales of their own: at 99% accuracy a common one would show no mistake.

    Args:
        confusion: int64 (C, C), rows are true classes.
        class_names: C names.
        path: the picture to write, if any.

    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib import colormaps

    counts = confusion.cpu().numpy()
    classes = len(class_names)
    right, total = int(counts.trace()), int(counts.sum())
    mistakes = counts - np.diag(counts.diagonal())
    true_totals, predicted_totals = counts.sum(axis=1), counts.sum(axis=0)
    recall = counts.diagonal() / np.maximum(true_totals, 1)
    precision = counts.diagonal() / np.maximum(predicted_totals, 1)

    # Mistakes run from white to orange, the diagonal from white to blue.
    shades = colormaps["Oranges"](0.75 * mistakes / max(int(mistakes.max()), 1))
    shades[mistakes == 0] = 1.0
    shades[np.diag_indices(classes)] = colormaps["Blues"](0.15 + 0.6 * recall)

    side = min(max(6.6, 0.55 * classes + 1.6), 40.0)
    with _figure(side, side) as figure:
        axes = figure.subplots()
        axes.imshow(shades)
        size = 10 if classes <= 12 else 8
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = shades[row, column, :3] @ (0.299, 0.587, 0.114) < 0.55
            colour = "white" if dark else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, size=size)
        shown: dict[str, Any] = {"ha": "center", "va": "center", "size": size - 1, "color": GREY}
        for index in range(classes):
            axes.text(classes + 0.1, index, _percent(recall[index], true_totals[index]), **shown)
            axes.text(index, classes + 0.1, _percent(precision[index], predicted_totals[index]), **shown)
        axes.text(classes + 0.1, -0.8, "recall", **shown)
        axes.text(-0.7, classes + 0.1, "precision", **{**shown, "ha": "right"})
        axes.set(xlim=(-0.5, classes + 0.6), ylim=(classes + 0.6, -0.5), xlabel="predicted", ylabel="true")
        names = [_shortened(name) for name in class_names]
        axes.set_xticks(range(classes), names)
        axes.set_yticks(range(classes), names)
        if max(map(len, names)) > 4:
            axes.tick_params(axis="x", rotation=45)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{right:,} of {total:,} right ({right / max(total, 1):.2%})", pad=22)
        return _render(figure, path)


def draw_mistakes(
    images: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    class_names: Sequence[str],
    path: str | Path | None = None,
    *,
    limit: int = 24,
) -> np.ndarray:
    """The mistakes that the model was surest of, worst first; a picture that says so where there are none.

    Args:
        images: uint8 (N, 28, 28).
        labels: int64 (N,), the true classes.
        probabilities: float (N, C).
        class_names: C names.
        path: the picture to write, if any.
        limit: the most images to show.

    Raises:
        UserError: `path` cannot be written.
    """
    confidences, predictions = probabilities.cpu().max(dim=1)
    wrong = (predictions != labels.cpu()).nonzero().flatten()
    worst = wrong[confidences[wrong].argsort(descending=True, stable=True)][:limit]
    if len(wrong) == 0:
        title = f"No mistake in {len(labels):,} images"
    elif len(wrong) > limit:
        title = f"The {limit} most confident of {len(wrong):,} mistakes in {len(labels):,} images"
    else:
        title = f"All mistakes in {len(labels):,} images, the most confident first: {len(wrong)}"
    chosen = worst.to(images.device)
    answers = images[chosen], labels.cpu()[worst], predictions[worst], confidences[worst]
    return _draw_answers(*answers, class_names, title=title, columns=6, path=path)


def draw_samples(
    images: Tensor, labels: Tensor, probabilities: Tensor, class_names: Sequence[str], path: str | Path | None = None
) -> np.ndarray:
    """Images with the model's answers, the right and the wrong ones told apart by colour, mark and text.

    Args:
        images: uint8 (N, 28, 28).
        labels: int64 (N,), the true classes.
        probabilities: float (N, C).
        class_names: C names.
        path: the picture to write, if any.

    Raises:
        UserError: `path` cannot be written.
    """
    confidences, predictions = probabilities.cpu().max(dim=1)
    right = int((predictions == labels.cpu()).sum())
    columns = 5 if len(labels) <= 15 else 6 if len(labels) <= 36 else 10
    title = f"{right} of {len(labels)} right"
    answers = images, labels.cpu(), predictions, confidences
    return _draw_answers(*answers, class_names, title=title, columns=columns, path=path)


def _draw_answers(
    images: Tensor,
    labels: Tensor,
    predictions: Tensor,
    confidences: Tensor,
    class_names: Sequence[str],
    *,
    title: str,
    columns: int,
    path: str | Path | None,
) -> np.ndarray:
    from matplotlib.patches import Rectangle

    # Measured in pixels of the images, each of which stands at the top of a cell with its caption below.
    cell_width, cell_height = 38, 44
    rows = max(0.2, math.ceil(len(images) / columns))
    inches = 8.4 / (6 * cell_width)
    pixels = images.cpu().numpy()
    with _figure(columns * cell_width * inches, rows * cell_height * inches + 0.45) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, columns * cell_width), ylim=(rows * cell_height, 0), aspect="equal")
        axes.set_axis_off()
        axes.set_title(title, x=0.02)
        for index, (label, prediction) in enumerate(zip(labels.tolist(), predictions.tolist(), strict=True)):
            left, top = index % columns * cell_width + 5, index // columns * cell_height + 2
            axes.imshow(pixels[index], extent=(left, left + 28, top + 28, top), cmap="gray", vmin=0, vmax=255)
            colour, mark = (BLUE, "✓") if label == prediction else (VERMILION, "✗")
            axes.add_patch(Rectangle((left - 0.5, top - 0.5), 29, 29, fill=False, edgecolor=colour, linewidth=2.5))
            name, sure = _shortened(class_names[prediction]), _percent(float(confidences[index]))
            truth = "" if label == prediction else f" · is {_shortened(class_names[label])}"
            middle: dict[str, Any] = {"x": left + 14, "ha": "center", "va": "center"}
            axes.text(y=top + 32.5, s=f"{mark} {name}", color=colour, size=9, weight="bold", **middle)
            axes.text(y=top + 37, s=sure + truth, color="black", size=8, **middle)
        # imshow narrows the view to the image that it draws.
        axes.set(xlim=(0, columns * cell_width), ylim=(rows * cell_height, 0))
        return _render(figure, path)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, in the style of this module until the block ends."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")


def _render(figure: Figure, path: str | Path | None) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    if path is not None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the picture {path}: {error}; give a file that ends in .png") from error
    return pixels


def _label_log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5, so that less than a decade has labels too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _percent(share: float, of: int = 1) -> str:
    """A share in 0..1 as text; a dash where it is a share of nothing."""
    return f"{100 * share:.1f}%" if of else "-"


def _shortened(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"
