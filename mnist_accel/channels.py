"""From an image's colours and transparency to the one channel in which ink is looked for."""

import cv2
import numpy as np

from mnist_accel.parts import CORNERS, Grey, Parts, box_of, reduced


def over_paper(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1 or 3) float32 in 0..1, transparency laid over paper that the ink stands out from."""
    height, width = pixels.shape[:2]
    values = pixels.reshape(height, width, -1).astype(np.float32) / np.iinfo(pixels.dtype).max
    colour, alpha = values[..., :3], values[..., 3:]
    if not alpha.size or alpha.min() >= 0.999:
        return colour
    strongest = float(alpha.max())  # a translucent brush's ink is nowhere opaque
    if strongest < 0.02:
        return np.zeros_like(colour[..., :1])
    visible = colour[alpha[..., 0] > 0.5 * strongest]
    if visible.mean(1).std() > 0.15:
        # Paper and ink are both there and something around them is cut away: the paper goes on.
        paper = np.median(visible, axis=0)
    else:
        paper = np.full(3, 0.0 if visible.mean() > 0.5 else 1.0, np.float32)
    return (colour * alpha + paper * (1 - alpha)).astype(np.float32)


def without_margin(values: np.ndarray) -> np.ndarray:
    """The picture alone where (H, W, C) is one on a page of a single colour, as in a document or with a white rim."""
    corners = values[CORNERS]
    margin = np.median(corners, axis=0)
    if np.abs(corners - margin).max() > 0.03:
        return values
    bands = zip(cv2.split(values), margin, strict=True)  # by channel: numpy is slow along an axis of three
    difference = np.maximum.reduce([np.abs(band - level) for band, level in bands])
    off = (difference > 0.03).astype(np.uint8)
    if not off.any():
        return values
    # The largest part: a page has text beside its picture, and a phone's screen has the clock.
    parts = Parts(off)
    rows, columns = box_of(parts.mask(parts.largest()))
    inner = off[rows, columns]
    # A drawing on a blank page differs from it only where its strokes are, a photo of paper almost everywhere.
    if min(inner.shape) < max(40, 0.4 * max(inner.shape)) or inner.size == off.size or inner.mean() < 0.9:
        return values
    # Uneven light has no level of its own around what it falls on.
    if np.median(difference[off == 0]) > 0.01:
        return values
    depth = round(0.02 * min(inner.shape)) + 1  # the rim of a compressed picture is blurred
    picture = values[rows, columns][depth:-depth, depth:-depth]
    return picture if picture.std(axis=(0, 1)).max() > 0.03 else values  # a bar is a digit, and no picture


def one_channel(values: np.ndarray) -> Grey:
    """(H, W) float32 in 0..1: the mix of the colours in which ink and paper differ most.

    That is the first principal component of the image less its blur: of strokes, not of slow changes of light. For grey
    images it is the grey, for blue ink mostly red, and red ink on a green as bright as it is not lost.
    """
    if values.shape[2] == 1:
        return values[..., 0]
    small = reduced(values, 128)
    reach = max(small.shape[:2]) // 4 * 2 + 1
    strokes = (small - cv2.blur(small, (reach, reach))).reshape(-1, 3)
    _, vectors = np.linalg.eigh(strokes.T.astype(np.float64) @ strokes)
    mix = vectors[:, -1] * (1.0 if vectors[:, -1].sum() >= 0 else -1.0)
    total = np.abs(mix).sum()
    # Negative weights (a difference of colours) move the range below 0: move it back.
    return np.clip(values @ (mix / total).astype(np.float32) - np.float32(np.minimum(mix, 0).sum() / total), 0, 1)


def saturation(values: np.ndarray) -> Grey:
    """(H, W) float32 in 0..1: how far from grey each pixel of (H, W, 1 or 3) is; a shadow does not change that."""
    bands = cv2.split(values)  # numpy is slow along an axis of three
    highest, lowest = np.maximum.reduce(bands), np.minimum.reduce(bands)
    return (highest - lowest) / (highest + np.float32(0.1))  # the constant keeps the noise of the dark down
