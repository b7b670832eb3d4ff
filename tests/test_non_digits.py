"""Pictures of what is no digit, and what training on them teaches."""

import numpy as np
import pytest
import torch
from test_training import own_process

from mnist_accel import load_model
from mnist_accel.config import TrainConfig
from mnist_accel.data import load_data
from mnist_accel.loader import NO_DIGIT
from mnist_accel.non_digits import KINDS, with_non_digits
from mnist_accel.trainer import Trainer


@pytest.fixture(scope="module")
def digits():
    return load_data("digits").train


def test_they_come_after_the_digits_and_are_the_same_for_the_same_seed(digits):
    once, again, other = (with_non_digits(digits, 40, seed) for seed in (0, 0, 1))
    assert torch.equal(once.images[:-40], digits.images) and torch.equal(once.labels[:-40], digits.labels)
    assert (once.labels[-40:] == NO_DIGIT).all()
    assert torch.equal(once.images, again.images) and not torch.equal(once.images, other.images)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_shows_something_and_never_twice_the_same(digits, kind):
    random = np.random.default_rng(0)
    pictures = np.stack([kind(digits.images.numpy(), random) for _ in range(50)])
    assert pictures.dtype == np.uint8 and pictures.shape == (50, 28, 28)
    assert (pictures.max((1, 2)) > 60).all()
    assert len(np.unique(pictures, axis=0)) > 45


def test_a_data_set_with_blank_images_does_no_harm(digits):
    blank = digits.images[:5].numpy() * 0
    assert not KINDS[0](blank, np.random.default_rng(0)).any()


def mean_confidence(run, images: torch.Tensor) -> float:
    model = load_model(run)
    with torch.inference_mode():
        return model.probabilities(model(images.unsqueeze(1).float() / 255)).amax(dim=1).mean().item()


def test_a_network_trained_on_them_is_less_sure_of_such_pictures_and_no_less_of_digits(tmp_path, digits):
    options = {"dataset": "digits", "model": "fast_net", "epochs": 8, "learning_rate": 0.005, "report_to": "none"}
    for count in (0, 400):
        run = str(tmp_path / str(count))
        with own_process():
            Trainer(TrainConfig(**options, non_digits=count, output_dir=run)).run()
    unseen = with_non_digits(digits, 100, seed=1).images[-100:]
    without, with_them = mean_confidence(tmp_path / "0", unseen), mean_confidence(tmp_path / "400", unseen)
    assert with_them < 0.5 < without
    test = load_data("digits").test.images
    assert mean_confidence(tmp_path / "400", test) > mean_confidence(tmp_path / "0", test) - 0.15
