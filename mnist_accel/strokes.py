"""From where a digit was found to strokes in even ink."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from mnist_accel.parts import Grey, Mask, Parts, box_of, grown, stroke_width

# The pen's width as a share of the digit's longest side: three of four MNIST digits are written with a wider one.
MIN_PEN = 0.09


@dataclass(frozen=True)
class Digit:
    """Where a digit was found in an image.

    Attributes:
        darkness: (H, W) float32, how much darker than the paper each pixel is.
        mask: where that is the digit's ink, at least one pixel.
        noise: the standard deviation of the paper's darkness.
    """

    darkness: Grey
    mask: Mask
    noise: float

    @cached_property
    def strength(self) -> Grey:
        """The strength of the digit's ink, float32 in 0..1: 0 off the digit, over 0.5 in its ink.

        As large as the image, with a margin on all sides where a thin stroke was made wider.
        """
        return _sharpened(self.darkness, self.mask)

    @cached_property
    def with_fainter_strokes(self) -> Grey | None:
        """The same with strokes that go on fainter from those that were found, as strong as these; None without any.

        So does a pen that runs dry, and the ink is fainter there already. But so do creases, grain and shadows: this is
        another reading of the image, not always a better one.
        """
        pen, full = max(3.0, stroke_width(self.mask)), _full_ink(self.darkness, self.mask)
        level = max(0.1 * float(np.median(self.darkness[self.mask > 0])), 6 * self.noise)
        parts = Parts((self.darkness > level) | (self.mask > 0))
        faint = parts.mask(parts.touching(self.mask))
        beyond = Parts(faint & ~grown(self.mask, int(pen) | 1))

        def is_stroke(part: np.intp) -> bool:
            own = beyond.mask(part)
            # What a stain or a wire runs into is as dark as all of the digit.
            beside = self.mask & grown(own, int(3 * pen) | 1)
            return stroke_width(own) <= 1.5 * pen and _full_ink(self.darkness, beside) < 0.85 * full

        # Grain is smaller, and a fold or a line goes on to the image's edge.
        more = ~beyond.at_edge() & (beyond.area >= 0.05 * self.mask.sum()) & (beyond.size.max(1) >= 1.5 * pen)
        more[more] = [is_stroke(part) for part in np.flatnonzero(more)]
        if not more.any():
            return None
        reach = int(2 * pen) | 1
        whole = self.mask | (faint & grown(beyond.mask(more), reach))
        ink = self.darkness * whole
        near = cv2.blur(grown(ink, reach), (reach // 2 | 1, reach // 2 | 1))
        return _sharpened(np.minimum(ink / np.maximum(near, 1e-3), 1), whole)


def _full_ink(darkness: Grey, mask: Mask) -> float:
    return float(np.percentile(darkness[mask > 0], 75))


def _sharpened(darkness: Grey, mask: Mask) -> Grey:
    """0 on paper, 1 in full ink and a short ramp between, as where a bilevel scan is averaged."""
    sharp: Grey = np.clip((darkness / _full_ink(darkness, mask) - 0.25) / 0.5, 0, 1).astype(np.float32) * grown(mask, 5)
    solid = (sharp[box_of(sharp > 0.5)] > 0.5).astype(np.uint8)
    missing = MIN_PEN * max(solid.shape) - stroke_width(solid)
    if missing <= 1:
        return sharp
    size = round(missing) + 1
    sharp = cv2.copyMakeBorder(sharp, size, size, size, size, cv2.BORDER_CONSTANT)
    return cv2.dilate(sharp, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
