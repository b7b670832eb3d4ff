"""Pictures of what is no digit, for training a network to say so.

They take part in training like any image, but every class is to be as likely for them. Source: D. Hendrycks et al.,
"Deep anomaly detection with outlier exposure", ICLR 2019.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch

from mnist_accel.data import SIZE, Split
from mnist_accel.images import BOX, to_mnist
from mnist_accel.loader import NO_DIGIT
from mnist_accel.parts import box_of, fitted
from mnist_accel.seeding import derive_seed

CANVAS = 96
FAINT = 40  # of 255: what is no brighter takes no room
# Capitals, small letters and signs that no hand writes as a digit: neither O, I, l, S, Z, B, b, q nor the like.
SIGNS = "AEFHKMNPRTVWXfkmnwx#%@*=+"
FONTS = (0, 1, 2, 3, 4, 6, 7)  # of OpenCV's Hershey fonts, those drawn for reading


def with_non_digits(split: Split, count: int, seed: int) -> Split:
    """`split` with `count` more images, labelled `NO_DIGIT`, equally many of each kind in `KINDS`."""
    random = np.random.default_rng(derive_seed(seed, "non-digits"))
    digits = split.images.numpy()
    pictures = np.stack([KINDS[index % len(KINDS)](digits, random) for index in range(count)])
    labels = split.labels.new_full((count,), NO_DIGIT)
    return Split(torch.cat([split.images, torch.from_numpy(pictures)]), torch.cat([split.labels, labels]))


def _in_box(ink: np.ndarray) -> np.ndarray:
    """Ink of any size as MNIST's makers place a digit, here by its box; nothing in it is dropped."""
    result, inked = np.zeros((SIZE, SIZE), np.uint8), ink[box_of(ink > FAINT)]
    if inked.size:
        small = fitted(inked, BOX)
        top, left = (SIZE - small.shape[0]) // 2, (SIZE - small.shape[1]) // 2
        result[top : top + small.shape[0], left : left + small.shape[1]] = small
    return result


def several_digits(digits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Two to four digits in a row, as close as handwriting or apart."""
    row, end = np.zeros((SIZE + 12, 6 * SIZE), np.uint8), SIZE
    for image in digits[random.integers(len(digits), size=random.integers(2, 5))]:
        digit = image[:, box_of(image > FAINT)[1]]
        start, top = end + int(random.integers(-2, 8)), int(random.integers(0, 12))
        end = start + digit.shape[1]
        place = row[top : top + SIZE, start:end]
        np.maximum(place, digit, out=place)
    return _in_box(row)


def writing(_: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One to four letters or signs."""
    text = "".join(random.choice(list(SIGNS), size=random.choice([1, 1, 1, 2, 3, 4])))
    font, thickness = int(random.choice(FONTS)), int(random.integers(2, 10))
    canvas = np.zeros((CANVAS, CANVAS * len(text)), np.uint8)
    cv2.putText(canvas, text, (16, 72), font, 2.0, 235, thickness, cv2.LINE_AA)
    return _in_box(canvas)


def scribble(_: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A pen that wanders, in straight lines or curves."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    curved = random.random() < 0.5
    # Corner cutting shortens the way: a curve needs more of it before no digit is left in it.
    points = random.uniform(12, CANVAS - 12, size=(int(random.integers(8, 16)) + 4 * curved, 2))
    if curved:
        for _turn in range(3):  # G. Chaikin's corner cutting, 1974
            points = np.stack([0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]], 1)
            points = points.reshape(-1, 2)
    cv2.polylines(canvas, [points.astype(np.int32)], False, 255, int(random.integers(3, 10)), cv2.LINE_AA)
    return _in_box(canvas)


def solid(_: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One filled shape about as wide as high, or several."""
    canvas = np.zeros((CANVAS, CANVAS), np.uint8)
    for _shape in range(int(random.choice([1, 1, 2, 3]))):
        # Never narrower than half of its length: a bar is a 1.
        centre = random.uniform(32, CANVAS - 32, 2)
        size = random.uniform(20, 48) * np.array([1, random.uniform(0.5, 1)])
        box = tuple(centre), tuple(size), random.uniform(0, 360)
        if random.random() < 1 / 3:
            cv2.ellipse(canvas, box, 255, -1, cv2.LINE_AA)
        else:
            corners = cv2.boxPoints(box)[: random.integers(3, 5)].astype(np.int32)  # a triangle or a rectangle
            cv2.fillPoly(canvas, [corners], 255, cv2.LINE_AA)
    return _in_box(canvas)


def texture(_: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Noise of any grain, stripes, checks: as they are, or as whatever is found in them when they are read."""
    side = SIZE if random.random() < 0.5 else CANVAS
    kind = random.integers(4)
    y, x = np.mgrid[:side, :side] / side * SIZE
    if kind == 0:
        values = random.normal(size=(side, side))
    elif kind == 1:
        grain = random.uniform(0.7, 3) * side / SIZE
        values = np.asarray(cv2.GaussianBlur(random.normal(size=(side, side)), (0, 0), grain), np.float64)
    else:
        period, angle = random.uniform(2.5, 10), random.uniform(0, np.pi)
        values = np.sin(2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)))
        if kind == 2:
            values = values * np.sin(2 * np.pi / period * (y * np.cos(angle) - x * np.sin(angle)))
    values = np.clip(0.5 + random.uniform(0.2, 2) * values / values.std() / 2, 0, 1)
    pixels = (values * random.uniform(100, 255)).astype(np.uint8)
    found = to_mnist(pixels, second_look=False) if side > SIZE else pixels
    return found if found.any() else cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


Picture = Callable[[np.ndarray, np.random.Generator], np.ndarray]
KINDS: tuple[Picture, ...] = (several_digits, writing, scribble, solid, texture)
