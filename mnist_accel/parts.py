"""Masks of pixels: their boxes, their connected parts, the width of their strokes; images scaled by area."""

import cv2
import numpy as np

# (H, W) float32 in 0..1, and (H, W) uint8 of 0 and 1: `mask & ~other` is the mask without the other.
Grey = np.ndarray
Mask = np.ndarray

CORNERS = [0, 0, -1, -1], [0, -1, 0, -1]  # rows and columns of an image's four corner pixels: `image[CORNERS]`


def fitted(image: np.ndarray, side: int, at_least: int = 1, how: int = cv2.INTER_AREA) -> np.ndarray:
    """The image scaled so that its longest side is `side` pixels, its aspect ratio kept."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = max(at_least, round(width * scale)), max(at_least, round(height * scale))
    return cv2.resize(image, size, interpolation=how).reshape(size[1], size[0], *image.shape[2:])


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """The image itself, or averaged down so that its longest side is `side` pixels."""
    return image if max(image.shape[:2]) <= side else fitted(image, side)


def box_of(image: np.ndarray) -> tuple[slice, slice]:
    """The rows and the columns of the tight box around all that is not 0 in (H, W) uint8 or bool; empty if all is 0."""
    left, top, width, height = cv2.boundingRect(np.asarray(image, np.uint8))
    return slice(top, top + height), slice(left, left + width)


def longest_side(mask: np.ndarray) -> int:
    """The longest side, in pixels, of the tight box around all that is not 0."""
    return max(mask[box_of(mask)].shape)


def is_narrow(image: np.ndarray) -> bool:
    """Whether one side is at most 0.6 of the other: a phone's photo, or a close crop of a narrow digit."""
    return min(image.shape[:2]) <= 0.6 * max(image.shape[:2])


def without_holes(mask: Mask) -> Mask:
    outlines = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(np.zeros_like(mask), outlines, -1, 1, cv2.FILLED)


def grown(mask: np.ndarray, side: int) -> np.ndarray:
    return cv2.dilate(mask, np.ones((side, side), np.uint8))


class Parts:
    """A mask's connected parts, numbered from 0: each one's box and middle as x and y, and its area in pixels."""

    def __init__(self, mask: np.ndarray) -> None:
        _, self._labels, stats, middle = cv2.connectedComponentsWithStats(np.asarray(mask, np.uint8), connectivity=8)
        stats, self.middle = np.asarray(stats)[1:], middle[1:]  # the first is all that is not in the mask
        self.start, self.size, self.area = stats[:, :2], stats[:, 2:4], stats[:, cv2.CC_STAT_AREA]
        self.end = self.start + self.size

    def __len__(self) -> int:
        return len(self.area)

    def at_edge(self) -> np.ndarray:
        """Which parts reach an edge of the image."""
        return ((self.start == 0) | (self.end == self._labels.shape[::-1])).any(1)

    def touching(self, mask: Mask) -> np.ndarray:
        """Which parts have a pixel in this mask."""
        return self.sums(mask) > 0

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sum of (H, W) values over each part."""
        return np.bincount(self._labels.ravel(), weights=values.ravel(), minlength=len(self) + 1)[1:]

    def largest(self) -> int:
        return int(self.area.argmax())

    def mask(self, chosen: int | np.integer | np.ndarray) -> Mask:
        """One part, or those for which `chosen`, bool, is true."""
        shown = np.zeros(len(self) + 1, np.uint8)
        shown[1:][chosen] = 1
        return shown[self._labels]


def distance_to_paper(mask: Mask) -> np.ndarray:
    """Each pixel's distance from what is not in the mask, outside of the image too; with a margin of one pixel."""
    return cv2.distanceTransform(cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT), cv2.DIST_L2, 3)


def stroke_width(mask: Mask) -> float:
    """The typical width of a mask's strokes in pixels: twice the median distance of their middles from the paper."""
    distance = distance_to_paper(mask)
    middle = distance[(distance > 0) & (distance >= grown(distance, 3))]
    return 2 * float(np.median(middle)) - 1 if middle.size else 0.0
