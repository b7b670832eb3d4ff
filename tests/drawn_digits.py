"""Digits drawn with strokes, as a person's pen would: dark or light, large or small, on any paper.

As a program, `python tests/drawn_digits.py FOLDER` writes the photos that the README's contact sheet shows.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from mnist_accel.data import EMBEDDED

INKS_AND_PAPERS = [
    *(((40, 40, 40), (236, 233, 226)), ((30, 45, 130), (240, 240, 238)), ((160, 40, 40), (225, 214, 190))),
    *(((235, 235, 225), (38, 72, 56)), ((225, 225, 230), (60, 60, 70))),
]  # the last two are boards

STROKES = {
    0: [
        [(0.5, 0.0), (0.2, 0.1), (0.1, 0.5), (0.25, 0.95), (0.5, 1.0), (0.8, 0.9), (0.9, 0.5), (0.75, 0.1), (0.5, 0.0)]
    ],
    1: [[(0.5, 0.0), (0.45, 1.0)]],
    2: [[(0.15, 0.2), (0.4, 0.0), (0.75, 0.1), (0.7, 0.45), (0.1, 1.0), (0.9, 0.97)]],
    4: [[(0.35, 0.0), (0.1, 0.6), (0.9, 0.55)], [(0.7, 0.2), (0.62, 1.0)]],
    5: [[(0.8, 0.0), (0.25, 0.05), (0.2, 0.45), (0.6, 0.4), (0.85, 0.7), (0.55, 1.0), (0.1, 0.9)]],
    6: [[(0.7, 0.0), (0.35, 0.4), (0.25, 0.8), (0.5, 1.0), (0.75, 0.8), (0.6, 0.58), (0.28, 0.7)]],
    7: [[(0.1, 0.05), (0.9, 0.0), (0.4, 1.0)]],
    9: [[(0.8, 0.1), (0.5, 0.0), (0.25, 0.15), (0.3, 0.42), (0.6, 0.42), (0.8, 0.1), (0.7, 1.0)]],
}


def draw(
    digit: int, height: int = 200, width: int = 200, size: float = 0.6, pen: float = 0.09, at=(0.5, 0.5)
) -> np.ndarray:
    """Ink as float32 (height, width) in 0..1; size and pen as shares of the shorter side, `at` the middle (y, x)."""
    side = min(height, width)
    ink = np.zeros((height * 4, width * 4), np.uint8)
    for stroke in STROKES[digit]:
        points = [
            ((at[1] * width + (x - 0.5) * size * side * 0.75) * 4, (at[0] * height + (y - 0.5) * size * side) * 4)
            for x, y in stroke
        ]
        cv2.polylines(ink, [np.array(points, np.int32)], False, 255, max(1, round(pen * side * 4)), cv2.LINE_AA)
    return cv2.resize(ink, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(ink: np.ndarray, ink_colour=(30, 40, 110), paper=(225, 220, 210)) -> np.ndarray:
    """Ink on paper: (H, W, 3) uint8."""
    paper_pixels, ink_pixels = np.array(paper, np.float32), np.array(ink_colour, np.float32)
    return np.rint(paper_pixels + (ink_pixels - paper_pixels) * ink[..., None]).astype(np.uint8)


def photograph(small: np.ndarray, random: np.random.Generator, side: int = 160) -> np.ndarray:
    """A scan of ink, (8, 8) in 0..16, as if written on paper or a board and photographed: (side, side, 3) uint8."""
    size = int(side * random.uniform(0.4, 0.6))
    scan = cv2.resize(np.pad(small, 1).astype(np.float32) / 16, (size, size), interpolation=cv2.INTER_CUBIC)
    ink = np.zeros((side, side), np.float32)
    top, left = random.integers(side // 8, side - size - side // 8, size=2)
    ink[top : top + size, left : left + size] = np.clip((scan - 0.3) * 4, 0, 1)  # a pen's edge, not a scanner's
    photo = paint(ink, *INKS_AND_PAPERS[random.integers(len(INKS_AND_PAPERS))]).astype(np.float32)
    lines = random.integers(3)  # none, ruled, squared
    for start in range(int(random.integers(20)), side, 20):
        photo[start, :] *= 0.9 if lines else 1
        photo[:, start] *= 0.9 if lines == 2 else 1
    x, y = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    angle, edge = random.uniform(0, 2 * np.pi), random.uniform(-0.5, 0.9)
    across = x * np.cos(angle) + y * np.sin(angle)
    light = (0.9 + 0.1 * across) * np.where(across > edge, 1, 0.65)  # the shadow of a hand
    photo = cv2.GaussianBlur(photo * cv2.GaussianBlur(light, (0, 0), 2)[..., None], (0, 0), 0.8)
    return np.clip(photo + random.normal(0, 3, photo.shape), 0, 255).astype(np.uint8)


def write_photos(folder: Path, of_each: int = 3) -> None:
    """Photos of the embedded digits, named DIGIT_NUMBER.jpg."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(EMBEDDED) as archive:
        images, labels = archive["images"], archive["labels"]
    for digit in range(10):
        for number, index in enumerate(random.permutation(np.flatnonzero(labels == digit))[:of_each]):
            photo = photograph(images[index], random)
            cv2.imwrite(str(folder / f"{digit}_{number}.jpg"), photo[..., ::-1])


if __name__ == "__main__":
    write_photos(Path(sys.argv[1]))
