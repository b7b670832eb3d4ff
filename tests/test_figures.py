"""The pictures, read through the text and colours that were drawn."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from mnist_accel import figures
from mnist_accel.cli import UserError
from mnist_accel.output import write_picture

DIGITS = [str(digit) for digit in range(10)]
ROWS = [
    {"epoch": 1, "train_loss": 0.3, "eval_loss": 0.1, "eval_accuracy": 0.97, "learning_rate": 0.001},
    {"epoch": 2, "train_loss": 0.1, "eval_loss": 0.05, "eval_accuracy": 0.992, "learning_rate": 0.001},
    {"epoch": 3, "train_loss": 0.05, "eval_loss": 0.06, "eval_accuracy": 0.991, "learning_rate": 0.0},
]


@pytest.fixture
def figure(monkeypatch):
    """A function that calls another and returns the matplotlib figure that it made."""
    made = []
    render = figures.pixels_of
    monkeypatch.setattr(figures, "pixels_of", lambda figure: made.append(figure) or render(figure))

    def capture(draw, *arguments, **options):
        draw(*arguments, **options)
        return made[-1]

    return capture


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def answers(predictions, confidence=0.9):
    """Probabilities that predict these classes, each with this confidence."""
    probabilities = torch.full((len(predictions), 10), (1 - confidence) / 9)
    probabilities[torch.arange(len(predictions)), torch.tensor(predictions)] = confidence
    return probabilities


def draw_each():
    images, labels = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8), torch.tensor([1, 2, 3])
    probabilities = answers([1, 7, 3])
    yield figures.draw_curves(ROWS)
    yield figures.draw_confusion_matrix(torch.eye(10, dtype=torch.int64), DIGITS)
    yield figures.draw_mistakes(images, labels, probabilities, DIGITS)
    yield figures.draw_samples(images, labels, probabilities, DIGITS)


def test_every_figure_is_rgb_pixels_that_can_be_written(tmp_path):
    path = tmp_path / "new" / "figure.png"
    for pixels in draw_each():
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3 and pixels.shape[2] == 3
        assert pixels.std() > 5
        write_picture(pixels, path)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
        path.unlink()
    assert list(path.parent.iterdir()) == []


def test_figures_need_no_display_and_no_backend():
    program = (
        "import sys, torch; from mnist_accel.figures import draw_confusion_matrix;"
        "print(draw_confusion_matrix(torch.eye(2), ['a', 'b']).shape, 'matplotlib.pyplot' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    environment["MPLBACKEND"] = "tkagg"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("3) False")


def test_curves_mark_the_best_epoch(figure):
    drawn = figure(figures.draw_curves, ROWS)
    assert "Accuracy, %: best 99.20 in epoch 2" in texts(drawn)
    loss, accuracy, rate = drawn.axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[0.3, 0.1, 0.05], [0.1, 0.05, 0.06]]
    assert accuracy.lines[0].get_ydata() == pytest.approx([97, 99.2, 99.1])
    assert rate.lines[0].get_ydata().tolist() == [0.001, 0.001, 0.0]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:1],
        [{"epoch": 1, "train_loss": 0.0, "eval_loss": None, "eval_accuracy": 1.0}],
        [*ROWS, {"epoch": 4, "train_loss": float("nan"), "eval_loss": float("inf"), "eval_accuracy": 0.1}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_curves_of_few_or_broken_rows_are_drawn_without_a_warning(rows):
    assert figures.draw_curves(rows).std() > 5


@pytest.mark.parametrize(("high", "low"), [(0.3, 0.295), (1.84, 0.88), (0.6, 0.1), (2.0, 0.001)])
def test_the_axis_of_losses_tells_their_size_however_close_they_are(figure, high, low):
    rows = [{"epoch": 1, "train_loss": high, "eval_loss": low, "eval_accuracy": 0.9, "learning_rate": 0.001}]
    axis = figure(figures.draw_curves, rows).axes[0]
    bottom, top = axis.get_ylim()
    assert len([tick for tick in axis.get_yticks() if bottom <= tick <= top]) > 1


@pytest.mark.filterwarnings("error")
def test_class_names_in_any_script_are_drawn_without_a_warning():
    assert figures.draw_confusion_matrix(torch.eye(2, dtype=torch.int64), ["一", "글"]).std() > 1


def test_long_class_names_that_differ_at_their_ends_stay_apart(figure):
    names = [f"class number {index}" for index in range(12)]
    drawn = texts(figure(figures.draw_confusion_matrix, torch.eye(12, dtype=torch.int64), names))
    assert len({text for text in drawn if text.startswith("class ")}) == 12


def test_confusion_matrix_shows_counts_recall_and_precision(figure):
    confusion = torch.tensor([[7, 1, 0], [0, 4, 0], [0, 0, 0]])
    drawn = texts(figure(figures.draw_confusion_matrix, confusion, ["cat", "$dog$", "long name of a bird"]))
    assert "11 of 12 right (91.67%)" in drawn
    assert {"7", "1", "4", "87.5%", "100.0%", "80.0%", "-"} <= set(drawn)
    assert {"cat", "$dog$", "long n… bird"} <= set(drawn)


@pytest.mark.filterwarnings("error")
def test_confusion_matrix_of_nothing_and_of_many_classes_is_drawn():
    assert figures.draw_confusion_matrix(torch.zeros(2, 2, dtype=torch.int64), ["a", "b"]).std() > 1
    small = figures.draw_confusion_matrix(torch.eye(10, dtype=torch.int64), DIGITS)
    large = figures.draw_confusion_matrix(torch.eye(26, dtype=torch.int64), [chr(97 + index) for index in range(26)])
    assert large.shape[0] > small.shape[0]


def test_mistakes_are_the_surest_wrong_answers_worst_first(figure, monkeypatch):
    monkeypatch.setattr(figures, "MISTAKES", 2)
    images, labels = torch.zeros(4, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    probabilities = torch.cat([answers([5], 0.6), answers([1], 0.99), answers([6], 0.8), answers([7], 0.7)])
    drawn = texts(figure(figures.draw_mistakes, images, labels, probabilities, DIGITS))
    captions = [text for text in drawn if " is " in text or "✗" in text]
    assert captions == ["✗ 6", "80.0% · is 2", "✗ 7", "70.0% · is 3"]
    assert "Mistakes in 4 images, the most confident first: 2 of 3" in drawn


@pytest.mark.filterwarnings("error")
def test_mistakes_say_so_where_there_are_none(figure):
    images, labels = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([0, 1])
    drawn = figure(figures.draw_mistakes, images, labels, answers([0, 1]), DIGITS)
    assert "No mistake in 2 images" in texts(drawn)
    assert not drawn.axes[0].images


def test_samples_tell_right_from_wrong_by_colour_and_mark(figure):
    names = ["T-shirt/top", "Ankle boot", *DIGITS[2:]]
    images, labels = torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([1, 1])
    drawn = figure(figures.draw_samples, images, labels, answers([1, 0]), names)
    colours = {text.get_text(): to_hex(text.get_color()).upper() for text in drawn.findobj(Text)}
    assert colours["✓ Ankle boot"] == figures.BLUE
    assert colours["✗ T-shirt/top"] == figures.VERMILION
    assert {"90.0%", "90.0% · is Ankle boot", "1 of 2 right"} <= set(colours)
    assert [to_hex(frame.get_edgecolor()).upper() for frame in drawn.axes[0].patches] == [
        figures.BLUE,
        figures.VERMILION,
    ]


def test_samples_show_the_images_themselves(figure):
    images = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    drawn = figure(figures.draw_samples, images, torch.tensor([1]), answers([1]), DIGITS)
    np.testing.assert_array_equal(drawn.axes[0].images[0].get_array(), images[0].numpy())


@pytest.mark.parametrize("name", ["figure.unknown", "file/figure.png"])
def test_a_picture_that_cannot_be_written_is_the_users_mistake(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=f"cannot write (the picture )?{tmp_path / name}"):
        write_picture(np.zeros((2, 2, 3), np.uint8), tmp_path / name)
