"""Digits drawn with strokes, as a person's pen would: dark or light, large or small, on any paper."""

import cv2
import numpy as np

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
