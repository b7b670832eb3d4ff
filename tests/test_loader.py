import pytest
import torch
from torch.nn import functional as F

from mnist_accel.augment import AUGMENTATIONS
from mnist_accel.cli import UserError
from mnist_accel.data import Split
from mnist_accel.loader import IGNORED_LABEL, NO_DIGIT, ResidentLoader, hold_out, label_targets


def numbered(count: int) -> Split:
    """Images whose pixels and labels tell which image they are."""
    labels = torch.arange(count)
    return Split(labels.to(torch.uint8)[:, None, None].expand(count, 28, 28).contiguous(), labels)


def labels_of(loader: ResidentLoader, epoch: int, first_step: int = 0) -> list[list[int]]:
    return [
        torch.cat([labels for _, labels, _ in step.micro_batches]).tolist() for step in loader.epoch(epoch, first_step)
    ]


@pytest.mark.parametrize("count", [64, 65, 100, 127, 16, 3])
def test_each_image_comes_once_an_epoch(count):
    loader = ResidentLoader(numbered(count), 16)
    seen = [label for step in labels_of(loader, 0) for label in step if label != IGNORED_LABEL]
    assert sorted(seen) == list(range(count))
    assert sum(step.size for step in loader.epoch(0)) == count


def test_shapes_never_change():
    loader = ResidentLoader(numbered(50), 16, micro_batches=2, augmentation=AUGMENTATIONS["handwriting"])
    shapes = {tuple(images.shape) for step in loader.epoch(0) for images, _, _ in step.micro_batches}
    assert shapes == {(8, 1, 28, 28)}


@pytest.mark.parametrize("augment", [None, *AUGMENTATIONS.values()], ids=["none", *AUGMENTATIONS])
@pytest.mark.parametrize("processes, micro_batches", [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_share_out_the_same_global_batch(processes, micro_batches, augment):
    split = numbered(70)
    whole = list(ResidentLoader(split, 16, seed=3, augmentation=augment).epoch(1))
    parts = [
        list(ResidentLoader(split, 16, rank=rank, num_processes=processes, micro_batches=micro_batches, seed=3, augmentation=augment).epoch(1))
        for rank in range(processes)
    ]  # fmt: skip
    for step, batch in enumerate(whole):
        pairs = [pair for part in parts for pair in part[step].micro_batches]
        assert torch.equal(torch.cat([labels for _, labels, _ in pairs]), batch.micro_batches[0][1])
        torch.testing.assert_close(torch.cat([images for images, _, _ in pairs]), batch.micro_batches[0][0])
        assert {part[step].size for part in parts} == {batch.size}


def test_starting_in_the_middle_of_an_epoch_gives_the_rest_of_it():
    split = numbered(100)
    whole = list(ResidentLoader(split, 16, seed=1, augmentation=AUGMENTATIONS["handwriting"]).epoch(2))
    rest = list(ResidentLoader(split, 16, seed=1, augmentation=AUGMENTATIONS["handwriting"]).epoch(2, first_step=3))
    assert len(rest) == len(whole) - 3
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.micro_batches[0][0], b.micro_batches[0][0])


def test_the_order_differs_between_epochs_and_seeds():
    split = numbered(64)
    assert labels_of(ResidentLoader(split, 64), 0) != labels_of(ResidentLoader(split, 64), 1)
    assert labels_of(ResidentLoader(split, 64, seed=0), 0) != labels_of(ResidentLoader(split, 64, seed=1), 0)


def test_each_epoch_distorts_and_drops_anew():
    """Of equal images, so that their order does not tell the epochs apart."""
    equal = Split(torch.full((16, 28, 28), 200, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64))
    loader = ResidentLoader(equal, 16, augmentation=AUGMENTATIONS["affine"], dropout=0.5, features=300)
    (first, second) = (next(loader.epoch(epoch)).micro_batches[0] for epoch in (0, 1))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[2], second[2])


def test_pixels_arrive_in_0_to_1_beside_their_label():
    for step in ResidentLoader(numbered(100), 10).epoch(0):
        for images, labels, _ in step.micro_batches:
            assert images.dtype == torch.float32
            torch.testing.assert_close(images[:, 0, 5, 5] * 255, labels.float())


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="multiple of 6"):
        ResidentLoader(numbered(100), 64, num_processes=3, micro_batches=2)


@pytest.mark.parametrize("size", [1, 20, 33, 99])
def test_held_out_images_are_stratified_and_kept_from_training(size):
    split = Split(torch.arange(100, dtype=torch.uint8)[:, None, None].expand(100, 28, 28), torch.arange(100) % 10)
    kept, held = hold_out(split, size, seed=0)
    assert len(held.labels) == size
    identities = torch.cat([kept.images[:, 0, 0], held.images[:, 0, 0]])
    assert sorted(identities.tolist()) == list(range(100))
    assert held.labels.bincount(minlength=10).max() - held.labels.bincount(minlength=10).min() <= 1
    other = hold_out(split, size, seed=1)[1]
    assert size == 99 or not torch.equal(other.images, held.images)


def test_as_many_are_held_out_as_asked_for_of_many_images_too():
    labels = torch.arange(20_000) % 10
    split = Split(torch.zeros(1, 1, 1, dtype=torch.uint8).expand(20_000, 28, 28), labels)
    for size in (0, 5_000, 19_975, 19_999):
        assert len(hold_out(split, size, seed=0)[1].labels) == size


def test_holding_out_everything_is_refused():
    with pytest.raises(UserError, match="validation-size"):
        hold_out(numbered(10), 10, seed=0)


def test_targets_ask_for_the_class_smoothed_for_no_class_in_particular_or_for_nothing():
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 0, 9, 9])
    asked = label_targets(10, 0.1)[torch.cat([labels, torch.tensor([NO_DIGIT, IGNORED_LABEL])])]
    losses = F.cross_entropy(logits, asked, reduction="none")
    expected = F.cross_entropy(logits[:4], labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses[:4], expected)
    torch.testing.assert_close(losses[4], -logits[4].log_softmax(0).mean())
    assert losses[5] == 0


@pytest.mark.parametrize("processes, micro_batches", [(2, 1), (1, 4), (2, 2)])
def test_dropout_keeps_the_same_of_each_image_on_any_number_of_processes(processes, micro_batches):
    def kept(rank: int, processes: int, micro_batches: int) -> list[torch.Tensor]:
        loader = ResidentLoader(
            numbered(50), 16, rank=rank, num_processes=processes, micro_batches=micro_batches, dropout=0.2, features=300
        )
        return [torch.cat([part for _, _, part in step.micro_batches]) for step in loader.epoch(0)]

    whole = kept(0, 1, 1)
    shares = zip(*(kept(rank, processes, micro_batches) for rank in range(processes)), strict=True)
    assert all(torch.equal(torch.cat(parts), one) for parts, one in zip(shares, whole, strict=True))
    assert not torch.equal(whole[0], whole[1])
    assert set(torch.cat(whole).unique().tolist()) == {0.0, 1.25}
    assert torch.cat(whole).mean() == pytest.approx(1, abs=0.02)
