"""Photos whose shadows look like strokes: read in several ways, of which the shipped network takes the clearest."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from drawn_digits import STROKES, draw, paint

from mnist_accel.data import EMBEDDED, load_data
from mnist_accel.images import to_mnist
from mnist_accel.models import load_model
from mnist_accel.second_look import clearest, digit_confidences


def photographed(pixels: np.ndarray, light: np.ndarray) -> np.ndarray:
    light = cv2.GaussianBlur(light.astype(np.float32), (0, 0), 0.015 * pixels.shape[1])
    noise = np.random.default_rng(0).normal(0, 3, pixels.shape)
    return np.clip(pixels * light[..., None] + noise, 0, 255).astype(np.uint8)


def fingers(pixels: np.ndarray) -> np.ndarray:
    """Four fingers, hardly broader than a pen, take 70% of the light."""
    side = pixels.shape[0]
    light = np.ones((side, side), np.float32)
    for finger in range(4):
        root, tip = (1.1, 0.3 + 0.2 * finger), (0.45 - 0.05 * (finger % 2), 0.15 + 0.25 * finger)
        cv2.line(
            light, *(tuple(np.int32(np.multiply(at, side)).tolist()) for at in (root, tip)), 0.3, round(0.08 * side)
        )
    return photographed(pixels, light)


def blinds(pixels: np.ndarray) -> np.ndarray:
    y, x = np.ogrid[:1:200j, :1:200j]
    return photographed(pixels, np.where((5 * y + 1.5 * x) % 1 < 0.45, 0.4, 1.0))


@pytest.mark.parametrize("digit", STROKES)
def test_a_digit_under_the_shadows_of_fingers_is_read(digit):
    photo = fingers(paint(draw(digit, pen=0.05), (30, 40, 60)))
    assert digit_confidences(to_mnist(photo)[None]).argmax() == digit


def test_most_digits_in_coloured_ink_under_the_shadows_of_blinds_are_read():
    photos = {digit: blinds(paint(draw(digit, pen=0.07))) for digit in STROKES}
    right = [digit_confidences(to_mnist(photo)[None]).argmax() == digit for digit, photo in photos.items()]
    assert sum(right) >= len(STROKES) - 1


def dotted(digit: int) -> np.ndarray:
    """A display's amber dots, some nine of them to a digit's height."""
    shares = cv2.resize(draw(digit, pen=0.06), (14, 14), interpolation=cv2.INTER_AREA)
    ink = np.zeros((196, 196), np.float32)
    for y, x in np.argwhere(shares > 0.3):
        cv2.circle(ink, (14 * int(x) + 7, 14 * int(y) + 7), 4, 1.0, -1, cv2.LINE_AA)
    return photographed(paint(ink, (255, 120, 40), (25, 25, 25)), np.ones_like(ink))


@pytest.mark.parametrize("digit", STROKES)
def test_a_digit_of_separate_dots_is_read(digit):
    assert digit_confidences(to_mnist(dotted(digit))[None]).argmax() == digit


@pytest.mark.parametrize("digit", STROKES)
def test_a_digit_of_a_pen_that_runs_dry_is_not_cut_off(digit):
    along = np.linspace(-1, 1, 200) * np.ones((200, 1))
    for turns in range(4):  # to each of the four sides
        left = np.clip(0.5 - 1.6 * np.rot90(along, turns), 0.15, 1)
        photo = photographed(paint(draw(digit, pen=0.05) * left), np.ones((200, 200)))
        assert digit_confidences(to_mnist(photo)[None]).argmax() == digit


@pytest.mark.parametrize("digit", STROKES)
def test_a_stain_that_a_digit_runs_into_is_left_aside(digit):
    pixels, stain = paint(draw(digit, pen=0.05)), np.zeros((200, 200))
    cv2.circle(stain, (110, 110), 50, 0.25, 5, cv2.LINE_AA)
    photo = photographed(pixels, 1 - stain)
    assert (to_mnist(photo) == to_mnist(photo, second_look=False)).all()
    assert digit_confidences(to_mnist(photo)[None]).argmax() == digit


def test_paper_under_the_shadows_of_fingers_or_blinds_is_no_digit():
    paper = np.full((200, 200, 3), 220, np.uint8)
    for photo in (fingers(paper), blinds(paper)):
        assert digit_confidences(to_mnist(photo)[None]).max() < 0.3


def test_its_confidences_are_those_of_the_shipped_network():
    model, digits = load_model("shipped"), load_data("digits").test.images[:40].numpy()
    images = np.concatenate([digits, np.random.default_rng(0).integers(256, size=(40, 28, 28), dtype=np.uint8)])
    with torch.no_grad():
        expected = model.probabilities(model(torch.from_numpy(images)[:, None] / 255))
    assert np.allclose(digit_confidences(images), expected, atol=1e-4)


def test_a_clear_reading_is_not_questioned_and_a_doubtful_one_gives_way_only_to_a_clear_one():
    zero, one, noise = to_mnist(paint(draw(0))), to_mnist(paint(draw(1))), np.full((28, 28), 128, np.uint8)

    def never():
        raise AssertionError("the other readings were asked for")
        yield

    assert (clearest(zero, [], never(), never(), never()) == zero).all()
    assert (clearest(noise, [], [], [], []) == noise).all()
    # What a fainter stroke completes may have been a digit without it.
    assert (clearest(one, [noise, zero], never(), never(), never()) == zero).all()
    assert (clearest(one, [noise], [], never(), never()) == one).all()
    # Where nothing is clear, more ink that looks a little more like a digit is better than less.
    blurred = cv2.GaussianBlur(zero, (0, 0), 2)
    assert (clearest(noise, [blurred], [], [], []) == blurred).all()
    # A one may be a line of the paper, which is grey; that a line alone is coloured makes it no digit.
    assert (clearest(one, [], [zero], never(), never()) == zero).all()
    assert (clearest(one, [], [noise], never(), never()) == one).all()
    assert (clearest(noise, [], [one], [noise], []) == noise).all()
    assert (clearest(noise, [], [], [noise], [255 - noise, noise]) == noise).all()
    assert (clearest(noise, [], [], [noise], [noise, zero]) == zero).all()
    # The edge of a shadow makes a stroke in one reading or two.
    assert (clearest(noise, [], [], [noise], [one, one, noise]) == noise).all()
    assert (clearest(noise, [], [one], [noise], [one, one]) == noise).all()
    assert (clearest(noise, [], [], [noise], [one, one, one]) == one).all()
    # Two digits are no digit; but of many parts, some look like ones.
    assert (clearest(noise, [], [], [zero, one], never()) == noise).all()
    assert (clearest(noise, [], [], [zero, noise, zero], never()) == noise).all()
    assert (clearest(noise, [], [], [zero, noise, one, one], [zero]) == zero).all()


@pytest.mark.parametrize("sides", [["upper"], ["lower"], ["upper", "left", "right"]])
@pytest.mark.parametrize("digit", STROKES)
def test_coloured_ink_is_told_from_a_cells_black_lines_that_it_touches(digit, sides):
    ink = draw(digit, pen=0.07)
    photo, (rows, columns) = paint(ink), (np.flatnonzero(ink.max(axis) > 0.5) for axis in (1, 0))
    top, bottom, left, right = rows[0] + 4, rows[-1] - 3, columns[0] + 4, columns[-1] - 3
    for side in sides:
        lines = {"upper": np.s_[top - 4 : top], "lower": np.s_[bottom : bottom + 4]}
        lines |= {"left": np.s_[:, left - 4 : left], "right": np.s_[:, right : right + 4]}
        photo[lines[side]] = 50
    beyond = {side: 6 if side in sides else 20 for side in ("upper", "lower", "left", "right")}
    cell = photographed(photo, np.ones((200, 200)))
    cell = cell[top - beyond["upper"] : bottom + beyond["lower"], left - beyond["left"] : right + beyond["right"]]
    assert digit_confidences(to_mnist(cell)[None]).argmax() == digit


@pytest.mark.parametrize("side, how", [(64, cv2.INTER_LINEAR), (128, cv2.INTER_CUBIC), (300, cv2.INTER_CUBIC)])
def test_a_coarse_scan_that_was_enlarged_smoothly_is_read(side, how):
    with np.load(EMBEDDED) as archive:
        scans, labels = archive["images"][:100] / 16, archive["labels"][:100]
    enlarged = (cv2.resize(scan, (side, side), interpolation=how) for scan in scans)
    digits = [to_mnist(np.uint8(np.clip(255 * scan, 0, 255))) for scan in enlarged]
    assert (digit_confidences(np.array(digits)).argmax(1) == labels).sum() >= 75


def test_few_pages_of_two_digits_are_read_as_one():
    digits, random = load_data("digits").test.images.numpy(), np.random.default_rng(0)
    pages = []
    for index in range(0, 60, 2):
        pair = [cv2.resize(digits[index + side], (100, 100), interpolation=cv2.INTER_CUBIC) for side in (0, 1)]
        ink = np.pad(np.hstack(pair), 40).astype(np.float32) / 255
        page = 230 - 180 * np.clip(3 * ink - 0.9, 0, 1) + random.normal(0, 5, ink.shape)
        pages.append(to_mnist(np.clip(page, 0, 255).astype(np.uint8)))
    assert (digit_confidences(np.array(pages)).max(1) > 0.8).sum() <= 3


def test_reading_imports_no_torch():
    program = "import sys, mnist_accel.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
