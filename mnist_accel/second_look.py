"""Which of several readings of an image shows a digit: the shipped network's judgement, without torch.

Rules tell ink from paper, but where the shadows of fingers or blinds are as dark as ink and as narrow as strokes, no
rule knows which is which; whoever knows digits does. So where a reading looks like no digit, others are tried.
"""

import json
import math
from collections.abc import Iterable
from functools import cache

import cv2
import numpy as np
from safetensors.numpy import load_file

from mnist_accel import SHIPPED

# What is no digit gets little more than a tenth.
DOUBTFUL, SURE, CLEAR = 0.3, 0.8, 0.9
# A shadow's edge is a stroke, and so is a one: what is to pass for a one has to be seen in that many readings.
ONE, READINGS_OF_A_ONE = 1, 3


def clearest(
    first: np.ndarray,
    wholes: list[np.ndarray],
    coloured: Iterable[np.ndarray],
    parts: Iterable[np.ndarray],
    others: Iterable[np.ndarray],
) -> np.ndarray:
    """The first reading, or where another one is clearly a digit and the first may be none, that one.

    Readings are (28, 28) uint8, white ink on black. `wholes` have more of the image's ink than the first one: cut off,
    a digit often looks like another one, so that these are taken wherever they clearly are a digit, and if need be
    where they look more like one. The `coloured` one has coloured ink only, and is asked for where the first one is
    not sure or may be a line. `parts` are the separate parts of the first one, each for itself: where several of them
    are digits the image shows no single one, and another reading would only have lost the rest. These and the others
    are asked for where the first one looks like no digit at all.
    """
    readings = np.array([first, *wholes])
    confidences = digit_confidences(readings)
    alike = confidences.max(1)
    if alike[1:].max(initial=0) > CLEAR:
        return readings[1 + alike[1:].argmax()]
    if alike[0] < SURE or confidences[0].argmax() == ONE:
        in_colour = _clear_digit(coloured)
        if in_colour is not None:
            return in_colour
    if alike[0] >= DOUBTFUL or _are_several_digits(np.array(list(parts), np.uint8)):
        return first
    other = _clear_digit(others)
    return readings[alike.argmax()] if other is None else other


def _clear_digit(choice: Iterable[np.ndarray]) -> np.ndarray | None:
    readings = np.array(list(choice), np.uint8)
    if not len(readings):
        return None
    confidences = digit_confidences(readings)
    if (confidences[:, ONE] > CLEAR).sum() < READINGS_OF_A_ONE:
        confidences[:, ONE] = 0
    best = int(confidences.max(1).argmax())
    return readings[best] if confidences[best].max() > CLEAR else None


def _are_several_digits(parts: np.ndarray) -> bool:
    if len(parts) < 2:
        return False
    confidences = digit_confidences(parts)
    alike = confidences.max(1) >= DOUBTFUL
    # Many a shadow and brick looks like a one.
    return (alike & (confidences.argmax(1) != ONE)).sum() > 1 or (len(parts) == 2 and bool(alike.all()))


def digit_confidences(images: np.ndarray) -> np.ndarray:
    """The shipped network's confidences, float64 (N, 10), for images uint8 (N, 28, 28), white ink on black.

    They are those of `DigitClassifier.probabilities`, up to rounding: images are read where torch is not imported.
    """
    weights, temperature, no_digit_level = _shipped_network()

    def convolved(x: np.ndarray, name: str) -> np.ndarray:
        """`nn.Conv2d` with padding 1; x is (N, H, W, channels), so that a convolution is one matrix product.

        OpenCV's, as NumPy's threads wait for each other for many times as long where other processes are at work.
        """
        kernel = weights[f"{name}.weight"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        columns = windows.reshape(-1, kernel[0].size)
        bias = np.repeat(weights[f"{name}.bias"][None], len(columns), axis=0)
        product = cv2.gemm(columns, kernel.reshape(len(kernel), -1), 1, bias, 1, flags=cv2.GEMM_2_T)
        return product.reshape(*x.shape[:3], -1)

    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    def pooled(x: np.ndarray) -> np.ndarray:
        count, height, width, channels = x.shape
        return x.reshape(count, height // 2, 2, width // 2, 2, channels).max((2, 4))

    # `ResidualNet.forward`
    x = (images[..., None].astype(np.float32) / 255 - np.float32(0.1307)) / np.float32(0.3081)
    x = relu(pooled(convolved(x, "conv1")))
    x = relu(convolved(x, "conv2"))
    x = relu(pooled(x + convolved(x, "residual2")))
    x = relu(convolved(x, "conv3"))
    x = relu(x + convolved(x, "residual3")).mean((1, 2))
    logits = x @ weights["linear.weight"].T + weights["linear.bias"]
    # `metrics.confidences`
    scaled = logits.astype(np.float64) / temperature
    highest = scaled.max(1, keepdims=True)
    odds = np.exp(scaled - highest)
    evidence = highest[:, 0] + np.log(odds.sum(1))
    no_digit = 1 / (1 + np.exp(-2 * (no_digit_level - evidence)))[:, None]
    return (1 - no_digit) * odds / odds.sum(1, keepdims=True) + no_digit / logits.shape[1]


@cache
def _shipped_network() -> tuple[dict[str, np.ndarray], float, float]:
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["model"] == "residual_net" and math.isfinite(config["no_digit_level"])
    return load_file(SHIPPED / "model.safetensors"), config["temperature"], config["no_digit_level"]
