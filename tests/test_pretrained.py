"""The weights shipped in the package answer well on digits that no trainer of theirs saw."""

import cv2
import numpy as np
import pytest
import torch

import mnist_accel
from mnist_accel.data import load_data
from mnist_accel.images import to_mnist
from mnist_accel.models import SHIPPED, WEIGHTS_NAME


@pytest.fixture(scope="module")
def model():
    return mnist_accel.load_model()


def confidences(model, images: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        batch = torch.from_numpy(images).unsqueeze(1).float() / 255
        return model.probabilities(model(batch))


def test_they_are_small_and_have_a_card():
    assert (SHIPPED / WEIGHTS_NAME).stat().st_size < 2_000_000
    card = (SHIPPED / "README.md").read_text()
    assert "--recipe handwriting" in card and "fingerprint" in card


def test_they_read_the_embedded_digits_of_other_writers_drawn_dark_on_light(model):
    test = load_data("digits").test
    images = np.stack([to_mnist(255 - image.numpy()) for image in test.images])
    accuracy = (confidences(model, images).argmax(dim=1) == test.labels).float().mean().item()
    assert accuracy >= 0.92


def test_what_cannot_be_a_digit_gets_less_confidence_than_digits(model):
    generator = np.random.default_rng(0)
    digits = confidences(model, load_data("digits").test.images.numpy()).amax(dim=1).mean().item()
    noise = generator.integers(0, 256, (200, 28, 28)).astype(np.uint8)
    assert confidences(model, noise).amax(dim=1).mean().item() < 0.3
    scribbles = []
    for _ in range(100):
        paper = np.full((100, 100), 230, np.uint8)
        cv2.polylines(paper, [generator.integers(10, 90, (8, 2)).astype(np.int32)], False, 30, 6, cv2.LINE_AA)
        scribbles.append(to_mnist(paper))
    assert confidences(model, np.stack(scribbles)).amax(dim=1).mean().item() < digits - 0.3


def test_two_digits_or_a_filled_shape_are_no_digit(model):
    digits = 255 - load_data("digits").test.images.numpy()
    pairs = [to_mnist(np.hstack([digits[i], digits[i + 1]])) for i in range(0, 60, 2)]
    shapes = [
        to_mnist(np.pad(np.full((side, side), 20, np.uint8), 30, constant_values=230)) for side in (30, 40, 60, 80)
    ]
    for radius in (15, 25, 35):
        paper = np.full((100, 100), 230, np.uint8)
        shapes.append(to_mnist(cv2.circle(paper, (50, 50), radius, 20, -1)))
    for images in (pairs, shapes):
        assert confidences(model, np.stack(images)).amax(dim=1).mean().item() < 0.3
