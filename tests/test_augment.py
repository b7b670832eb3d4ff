"""Distortions keep the form of images, depend on (seed, step) alone, and do what they are named after."""

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from mnist_accel.augment import AUGMENTATIONS, Augmentation, augmentation_for, distort, draw
from mnist_accel.config import AUGMENTATION_NAMES
from mnist_accel.data import load_data

NONE = Augmentation(degrees=0, translation=0, scale=0, shear=0)
# One distortion at a time, strong enough that images must show it.
SINGLE = {
    "degrees": 25.0, "translation": 3.0, "scale": 0.3, "shear": 0.4, "elastic": 2.0, "stroke_width": 0.9,
    "resolution": 1.0, "contrast": 1.0, "noise": 0.2, "continental": 1.0, "stretch": 1.0, "cut": 1.0,
    "erased": 1.0,
}  # fmt: skip
WITH_STROKES = torch.tensor([1, 7, 9])


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """60 images with their labels: float (60, 1, 28, 28) in 0..1, int64 (60,)."""
    split = load_data("digits").train
    return split.images[:60].unsqueeze(1).float() / 255, split.labels[:60]


def distorted(digits, augmentation: Augmentation, seed: int = 0, step: int = 0) -> torch.Tensor:
    images, labels = digits
    return distort(images, labels, augmentation, draw(augmentation, len(labels), seed, step))


def only(**extent: float) -> Augmentation:
    return Augmentation(**{"degrees": 0, "translation": 0, "scale": 0, "shear": 0, **extent})


def changed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).abs().amax(dim=(1, 2, 3)) > 0.01


def centre_of_mass(images: torch.Tensor) -> torch.Tensor:
    """(N, 2): row and column, in pixels."""
    ink, place = images[:, 0], torch.arange(28.0)
    total = ink.sum(dim=(1, 2))
    return torch.stack([ink.sum(dim=2) @ place / total, ink.sum(dim=1) @ place / total], dim=1)


def test_the_names_on_the_command_line_are_those_that_exist():
    assert tuple(AUGMENTATIONS) == AUGMENTATION_NAMES


@pytest.mark.parametrize("name", AUGMENTATION_NAMES)
def test_shape_type_and_range_are_kept(digits, name):
    images, _ = digits
    before = images.clone()
    result = distorted(digits, AUGMENTATIONS[name])
    assert result.shape == images.shape and result.dtype == torch.float32
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1
    assert torch.equal(images, before), "the images given are not written to"
    assert changed(result, images).all()


@pytest.mark.parametrize("name", AUGMENTATION_NAMES)
def test_the_same_seed_and_step_give_the_same_images_and_others_do_not(digits, name):
    augmentation = AUGMENTATIONS[name]
    one = distorted(digits, augmentation, seed=3, step=8)
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(one, distorted(digits, augmentation, seed=3, step=8))
    assert changed(one, distorted(digits, augmentation, seed=3, step=9)).all()
    assert changed(one, distorted(digits, augmentation, seed=4, step=8)).all()


@pytest.mark.parametrize("name", AUGMENTATION_NAMES)
def test_slices_of_a_batch_are_distorted_as_the_whole_batch(digits, name):
    images, labels = digits
    augmentation = AUGMENTATIONS[name]
    draws = draw(augmentation, len(labels), seed=1, step=2)
    whole = distort(images, labels, augmentation, draws)
    parts = [
        distort(images[part], labels[part], augmentation, {key: tensor[part] for key, tensor in draws.items()})
        for part in (slice(0, 7), slice(7, 30), slice(30, 60))
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


@pytest.mark.parametrize("name", AUGMENTATION_NAMES)
def test_the_images_of_a_batch_are_distorted_differently(digits, name):
    images, labels = digits
    same = (images[:1].expand(20, -1, -1, -1), labels[:1].expand(20))
    result = distorted(same, AUGMENTATIONS[name])
    assert len({image.numpy().tobytes() for image in result}) == 20


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_each_distortion_alone_changes_images(digits, name):
    images, labels = digits
    touched = changed(distorted(digits, only(**{name: SINGLE[name]})), images)
    if name == "continental":
        assert torch.equal(touched, torch.isin(labels, WITH_STROKES))
    elif name in ("erased", "stretch", "cut"):  # a square may fall on black, and a digit be as wide as can be
        assert touched.float().mean() > 0.3
    else:
        assert touched.float().mean() > 0.9


def test_every_distortion_is_among_those_tested_alone():
    assert set(SINGLE) == {field.name for field in fields(Augmentation)} - {"plain"}


def test_plain_images_get_nothing_after_the_resampling(digits):
    rest = {name: SINGLE[name] for name in ("stroke_width", "resolution", "contrast", "noise", "erased")}
    images, _ = digits
    assert torch.allclose(distorted(digits, only(**rest, plain=1.0)), images, atol=1e-5)
    assert changed(distorted(digits, only(**rest)), images).all()
    assert changed(distorted(digits, only(**rest, degrees=25.0, plain=1.0)), images).float().mean() > 0.9
    share = changed(distorted(digits, only(**rest, plain=0.5)), images).float().mean()
    assert 0.25 < share < 0.75


def test_with_all_distortions_off_images_stay_as_they_are(digits):
    assert torch.allclose(distorted(digits, NONE), digits[0], atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(SINGLE) - {"noise", "continental"}))
def test_black_stays_black(name):
    black = (torch.zeros(20, 1, 28, 28), torch.arange(20) % 10)
    assert distorted(black, only(**{name: SINGLE[name]})).max() == 0


def test_what_comes_from_outside_is_black():
    white = (torch.ones(50, 1, 28, 28), torch.zeros(50, dtype=torch.long))
    corners = distorted(white, only(translation=6.0))[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.amin(dim=1) == 0).float().mean() > 0.9


def test_translation_moves_by_no_more_than_its_extent(digits):
    # Pixels off the border, so that nothing is lost at it.
    images = F.pad(torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0)), (6, 6, 6, 6))
    shift = centre_of_mass(distorted((images, digits[1]), only(translation=3.0))) - centre_of_mass(images)
    assert shift.abs().max() <= 3.01 and shift.abs().max() > 2.5
    assert shift.mean(dim=0).abs().max() < 1, "in both directions alike"


def test_scale_keeps_the_centre_and_changes_the_amount_of_ink(digits):
    images = F.pad(torch.ones(60, 1, 14, 14), (7, 7, 7, 7))
    result = distorted((images, digits[1]), only(scale=0.3))
    assert (centre_of_mass(result) - centre_of_mass(images)).abs().max() < 0.1
    ratio = result.sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    assert ratio.min() < 0.75 and ratio.max() > 1.25


def test_stroke_width_thickens_and_thins(digits):
    images, _ = digits
    ratio = distorted(digits, only(stroke_width=0.9)).sum(dim=(1, 2, 3)) / images.sum(dim=(1, 2, 3))
    assert ratio.min() < 0.9 and ratio.max() > 1.3


def test_only_ones_sevens_and_nines_get_continental_strokes(digits):
    images, labels = digits
    result = distorted(digits, only(continental=1.0))
    others = ~torch.isin(labels, WITH_STROKES)
    assert torch.allclose(result[others], images[others], atol=1e-5)
    for digit in WITH_STROKES:
        own = labels == digit
        assert own.any() and (result[own] >= images[own] - 1e-5).all(), "ink is added, none is taken"
        added = (result[own] - images[own]).sum(dim=(1, 2, 3))
        assert (added > 0.1).all() and added.mean() > 3


def test_continental_strokes_come_as_often_as_asked_for():
    seven = load_data("digits").train
    image = seven.images[seven.labels == 7][:1].unsqueeze(1).float() / 255
    batch = (image.expand(500, -1, -1, -1), torch.full((500,), 7))
    share = changed(distorted(batch, only(continental=0.3)), image).float().mean()
    assert 0.23 < share < 0.37


def test_the_elastic_field_moves_pixels_by_about_as_many_as_asked_for():
    ramp = (torch.arange(28.0) / 28).expand(200, 1, 28, 28)  # each pixel says in which column it was
    for pixels in (0.5, 2.0):
        moved = (distorted((ramp, torch.zeros(200).long()), only(elastic=pixels)) - ramp)[..., 9:19, 9:19] * 28
        assert 0.4 * pixels < moved.std() < 1.1 * pixels


def test_what_is_erased_is_one_square_of_four_pixels():
    white = (torch.ones(200, 1, 28, 28), torch.zeros(200).long())
    black = distorted(white, only(erased=0.5))[:, 0] < 0.5
    erased = black[black.any(dim=(1, 2))]
    assert 70 < len(erased) < 130
    assert (erased.any(dim=1).sum(dim=1) == 4).all() and (erased.any(dim=2).sum(dim=1) == 4).all()
    assert (erased.sum(dim=(1, 2)) == 16).all()


def test_what_is_cut_off_is_one_side_up_to_four_pixels_into_the_digits_box():
    white = (torch.ones(400, 1, 28, 28), torch.zeros(400).long())
    black = (distorted(white, only(cut=1.0)) < 0.5)[:, 0]
    depths = [black[:, :14, 14].sum(1), black[:, 14:, 14].sum(1), black[:, 14, :14].sum(1), black[:, 14, 14:].sum(1)]
    assert all({5, 6, 7, 8} == set(depth[depth > 0].tolist()) for depth in depths)
    assert (torch.stack(depths).count_nonzero(dim=0) == 1).all()


@pytest.mark.parametrize("digit", [1, 7, 9])
def test_continental_strokes_lie_where_people_write_them(digit):
    stem = torch.zeros(100, 1, 28, 28)
    stem[:, :, 4:24, 13:15] = 1.0
    added = (distorted((stem, torch.full((100,), digit)), only(continental=1.0)) - stem)[:, 0]
    left, right, upper = added[:, :, :13].sum((1, 2)), added[:, :, 15:].sum((1, 2)), added[:, :14].sum((1, 2))
    row, column = centre_of_mass(added[:, None]).T
    if digit == 7:  # a bar through the middle of the stem
        assert (row - 13.5).abs().max() < 3 and (column - 13.5).abs().max() < 0.5
    elif digit == 9:  # a hook to the left of the stem's end
        assert row.min() > 17 and (left > 5 * right).all()
    else:  # an upstroke from the left to the stem's beginning, and below some a foot
        footed = added[:, 21:, 15:].sum((1, 2)) > 1
        assert 20 < footed.sum() < 60
        assert (left > 1.5 * right).all() and upper[~footed].sum() > 0.6 * added[~footed].sum()
        assert (added[~footed][:, :, 16:].amax((1, 2)) < 0.5).all() and (added[:, 4:8, 12].amax(1) > 0.3).all()


def test_strokes_of_digits_are_drawn_on_digits_only():
    numbers = [str(digit) for digit in range(10)]
    assert augmentation_for("handwriting", numbers) == AUGMENTATIONS["handwriting"]
    assert augmentation_for("handwriting", [*numbers, "A", "B"]).continental > 0
    assert augmentation_for("handwriting", ["top", "trouser"]) == replace(AUGMENTATIONS["handwriting"], continental=0.0)
