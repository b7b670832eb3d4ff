"""Batches of images that live on the device.

All of MNIST is 47 MB as uint8. It is moved to the device once, and a batch is one indexing operation there: no worker
processes, no copies, no Python per image. (A DataLoader that Accelerate prepares has all three; its batch size is that
of each process; and it resumes within an epoch by reading again, and dropping, what was trained on before.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mnist_accel.augment import Augmentation, distort, draw
from mnist_accel.cli import SharedError
from mnist_accel.data import Split
from mnist_accel.seeding import generator

# Labels beside the classes, counted from the end of `label_targets`: what pads the last global batch of an epoch to
# full size, and pictures that show no digit at all.
IGNORED_LABEL, NO_DIGIT = -1, -2


def label_targets(num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """What the network is asked for at each label: float (C + 2, C), a row of probabilities to index by the label.

    The class's own, smoothed; for `NO_DIGIT` every class alike; for `IGNORED_LABEL` zeros, so that such an image adds
    neither loss nor gradient.
    """
    classes = torch.eye(num_classes) * (1 - label_smoothing) + label_smoothing / num_classes
    no_digit = torch.full((1, num_classes), 1 / num_classes)
    return torch.cat([classes, no_digit, torch.zeros(1, num_classes)])


@dataclass(frozen=True)
class StepBatch:
    """One process's share of a global batch.

    Attributes:
        micro_batches: float images (n, 1, 28, 28) in 0..1; int64 labels (n,), which index `label_targets`: a class,
            `NO_DIGIT`, or `IGNORED_LABEL` where padded; the dropout mask, float (n, features), if there is dropout.
        size: real images in the whole global batch, over all processes.
    """

    micro_batches: list[tuple[Tensor, Tensor, Tensor | None]]
    size: int


class ResidentLoader:
    """Yields this process's share of each global batch, every image once an epoch.

    The order of images is a pure function of (seed, epoch) and a batch one of (seed, step): starting in the middle of
    an epoch is starting at an index, and processes agree on the order without a word between them. Shapes never change,
    which compiled models and CUDA graphs need.

    Args:
        batch_size: images a global batch, over all processes and micro-batches.
        micro_batches: how many parts (gradient accumulation steps) that share is split into.
        dropout, features: which part of so many numbers an image is dropped before a network's last layer.

    Raises a `SharedError` where `batch_size` does not divide evenly.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        rank: int = 0,
        num_processes: int = 1,
        micro_batches: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        augmentation: Augmentation | None = None,
        dropout: float = 0.0,
        features: int = 0,
    ) -> None:
        if batch_size % (num_processes * micro_batches):
            raise SharedError(
                f"--batch-size {batch_size} is the global batch and does not divide over {num_processes} processes x "
                f"{micro_batches} accumulation steps: choose a multiple of {num_processes * micro_batches}"
            )
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size, self.seed, self.augmentation = batch_size, seed, augmentation
        self.dropout, self.features = dropout, features
        self.share, self.micro_batches = batch_size // num_processes, micro_batches
        self.first = rank * self.share
        self.num_images = len(self.labels)
        self.steps_per_epoch = math.ceil(self.num_images / batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepBatch]:
        """The batches of an epoch (0-based), beginning `first_step` optimizer steps into it."""
        order = torch.randperm(self.num_images, generator=generator(self.seed, "order", epoch))
        order = order.to(self.labels.device)
        for index in range(first_step, self.steps_per_epoch):
            step = epoch * self.steps_per_epoch + index
            yield self._batch(order[index * self.batch_size : (index + 1) * self.batch_size], step)

    def _batch(self, indices: Tensor, step: int) -> StepBatch:
        size, padding = len(indices), self.batch_size - len(indices)
        if padding:
            indices = torch.cat([indices, indices[:1].expand(padding)])
        # As all that is random, drawn for the global batch: on any number of processes an image gets the same.
        draws = draw(self.augmentation, self.batch_size, self.seed, step) if self.augmentation else {}
        mask = self._dropout_mask(step) if self.dropout else None
        micro_batches, micro_size = [], self.share // self.micro_batches
        for start in range(self.first, self.first + self.share, micro_size):
            part = slice(start, start + micro_size)
            images = self.images[indices[part]].unsqueeze(1).float().div_(255)
            labels = self.labels[indices[part]]
            if padding:
                labels[max(0, size - start) :] = IGNORED_LABEL
            if self.augmentation:
                own = {name: tensor[part] for name, tensor in draws.items()}
                images = distort(images, labels, self.augmentation, own)
            own_mask = None if mask is None else mask[part].to(images.device, non_blocking=True)
            micro_batches.append((images, labels, own_mask))
        return StepBatch(micro_batches, size)

    def _dropout_mask(self, step: int) -> Tensor:
        """For `Dropout`, float (batch_size, features) on the CPU: the mask of the whole global batch."""
        uniform = torch.rand(self.batch_size, self.features, generator=generator(self.seed, "dropout", step))
        return uniform.ge_(self.dropout).div_(1 - self.dropout)


def hold_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """Part a split in two: what stays for training, and `size` images held out, the classes in proportion.

    Raises a `SharedError` where that leaves nothing to train on.
    """
    if size >= len(split.labels):
        raise SharedError(
            f"--validation-size {size} leaves none of the {len(split.labels)} training images: choose fewer"
        )
    shuffled = torch.randperm(len(split.labels), generator=generator(seed, "hold out"))
    by_class = shuffled[split.labels[shuffled].argsort(stable=True)]
    # Equally spaced places in the list sorted by class take from each class in proportion to its size.
    held = torch.zeros(len(by_class), dtype=torch.bool)
    held[(2 * torch.arange(size) + 1) * len(by_class) // max(1, 2 * size)] = True
    kept, out = by_class[~held].sort().values, by_class[held].sort().values
    return Split(split.images[kept], split.labels[kept]), Split(split.images[out], split.labels[out])
