"""Random distortions of whole batches on their device.

The parameters of a step are drawn for the global batch from a generator keyed on (seed, step), and each process uses
its slice: the images that the network sees do not depend on the number of processes, nor on the kind of device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_accel.seeding import generator

ONE, SEVEN, NINE = 1, 7, 9
ELASTIC_GRID = 6  # control points along each side


@dataclass(frozen=True)
class Augmentation:
    """How far images are distorted. Each draw is uniform in +- the given extent unless said otherwise.

    Attributes:
        degrees: rotation.
        translation: shift along each axis, in pixels.
        scale: relative stretch, along each axis on its own.
        shear: horizontal shift per row; the slant of a hand.
        elastic: standard deviation, in pixels, of a smooth displacement field (after Simard et al. 2003).
        stroke_width: how much of a 3x3 dilation or erosion is mixed in, up to this.
        resolution: the probability of passing through a coarser grid of 14 to 22 pixels, as other scanners do.
        contrast: how far grey edges are hardened or softened.
        noise: standard deviation of Gaussian pixel noise, itself uniform from 0 to this.
        continental: the probability that a 1 gets an upstroke, perhaps a foot, a 7 a bar and a 9 a hook, as in many
            European hands. Labels 1, 7 and 9 must be these digits.
        stretch: the probability that a narrow digit is widened, up to the full width of 20 pixels.
        cut: the probability that up to 4 rows or columns of the digit are missing at one side.
        erased: the probability that a small square is missing.
        plain: the probability that an image is left as it is after the resampling.
    """

    degrees: float = 10.0
    translation: float = 2.0
    scale: float = 0.10
    shear: float = 0.10
    elastic: float = 0.0
    stroke_width: float = 0.0
    resolution: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0
    continental: float = 0.0
    stretch: float = 0.0
    cut: float = 0.0
    erased: float = 0.0
    plain: float = 0.0


AUGMENTATIONS = {
    "affine": Augmentation(),
    "elastic": Augmentation(elastic=0.5),
    # For digits of other hands, pens and scanners than MNIST's.
    "handwriting": Augmentation(
        degrees=13, translation=2, scale=0.13, shear=0.25, elastic=0.9, stroke_width=0.9, resolution=0.3, contrast=0.6,
        noise=0.06, continental=0.4, stretch=0.25, cut=0.1, erased=0.1, plain=0.35,
    ),
}  # fmt: skip

Draws = dict[str, Tensor]


def draw(augmentation: Augmentation, batch_size: int, seed: int, step: int) -> Draws:
    """The random numbers for every image of a global batch: tensors (batch_size, ...) on the CPU."""
    source = generator(seed, "augment", step)
    draws = {"uniform": torch.rand(batch_size, 26, generator=source)}
    if augmentation.elastic:
        draws["elastic"] = torch.randn(batch_size, 2, ELASTIC_GRID, ELASTIC_GRID, generator=source)
    if augmentation.noise:
        draws["noise"] = torch.randn(batch_size, 1, 28, 28, generator=source)
    return draws


def distort(images: Tensor, labels: Tensor, augmentation: Augmentation, draws: Draws) -> Tensor:
    """Distorted copies of float images (N, 1, 28, 28) in 0..1, from draws (N, ...) for these images.

    Rotation, translation, scale, shear and the elastic field are one bilinear resampling, black from outside.
    """
    draws = {name: tensor.to(images.device, non_blocking=True) for name, tensor in draws.items()}
    uniform = draws["uniform"]
    if augmentation.continental:
        images = _continental(images, labels, augmentation.continental, uniform[:, 6:13])
    if augmentation.cut:
        images = _cut(images, augmentation.cut, uniform[:, 20:22])
    theta = _affine(augmentation, uniform[:, :6])
    if augmentation.stretch:
        theta[:, 0] /= _stretch(images, augmentation.stretch, uniform[:, 22:24]).unsqueeze(1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if augmentation.elastic:
        # B-spline-like smoothness: bicubic interpolation of a coarse field; 2/28 of the -1..1 grid is a pixel.
        field = F.interpolate(draws["elastic"], size=images.shape[-2:], mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1) * (augmentation.elastic * 2 / 28)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    resampled = images
    if augmentation.stroke_width:
        images = _stroke_width(images, _signed(uniform[:, 13]) * augmentation.stroke_width)
    if augmentation.resolution:
        images = _resolution(images, uniform[:, 14], augmentation.resolution)
    if augmentation.contrast:
        # Edges harden towards a threshold at one half, or soften; 0 and 1 stay where they are.
        gain = (_signed(uniform[:, 15]) * augmentation.contrast).exp2().view(-1, 1, 1, 1) ** 2
        images = ((images - 0.5) * gain + 0.5).clamp(0, 1).where(gain > 1, images ** (1 / gain))
    if augmentation.erased:
        images = _erased(images, augmentation.erased, uniform[:, 16:19])
    if augmentation.noise:
        images = (images + draws["noise"] * uniform[:, 19].view(-1, 1, 1, 1) * augmentation.noise).clamp(0, 1)
    return torch.where((uniform[:, 24] < augmentation.plain).view(-1, 1, 1, 1), resampled, images)


def _signed(uniform: Tensor) -> Tensor:
    return uniform * 2 - 1


def _affine(augmentation: Augmentation, uniform: Tensor) -> Tensor:
    """Matrices (N, 2, 3) from output to input coordinates, as `affine_grid` takes them."""
    draws = _signed(uniform)
    angle = draws[:, 0] * math.radians(augmentation.degrees)
    shift = draws[:, 1:3] * augmentation.translation / 14
    scale_x, scale_y = 1 + draws[:, 3] * augmentation.scale, 1 + draws[:, 4] * augmentation.scale
    shear = draws[:, 5] * augmentation.shear
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos / scale_x, (shear * cos - sin) / scale_x, shift[:, 0]], dim=1)
    row_y = torch.stack([sin / scale_y, (shear * sin + cos) / scale_y, shift[:, 1]], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def _stroke_width(images: Tensor, amount: Tensor) -> Tensor:
    """Thicker where `amount` (N,) in -1..1 is positive, thinner where negative."""
    amount = amount.view(-1, 1, 1, 1)
    thick = F.max_pool2d(images, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-images, (2, 2), stride=1, padding=1)[..., :28, :28]
    return torch.where(amount > 0, images.lerp(thick, amount.clamp(0)), images.lerp(thin, (-amount).clamp(0) * 0.7))


def _resolution(images: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Some images seen through a coarser grid; every image goes through all grids, so shapes stay static."""
    result = images
    sizes = (14, 18, 22)
    for index, size in enumerate(sizes):
        low, high = probability * index / len(sizes), probability * (index + 1) / len(sizes)
        coarse = F.interpolate(images, size=(size, size), mode="area")
        coarse = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
        # As in MNIST, the brightest ink is white.
        coarse = coarse / coarse.amax(dim=(2, 3), keepdim=True).clamp(min=0.3)
        chosen = ((uniform >= low) & (uniform < high)).view(-1, 1, 1, 1)
        result = torch.where(chosen, coarse.clamp(max=1), result)
    return result


def _cut(images: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Some images with what lies beyond a straight line near one side of the digit's box missing."""
    place = torch.arange(28, device=images.device)
    # One draw says whether and at which of four sides, the other how deep into the box of 20 pixels.
    side = (uniform[:, 0] / probability * 4).long()
    edge = (5 + uniform[:, 1] * 4).long().unsqueeze(1)
    low, high = place < edge, place >= 28 - edge
    rows = low & (side == 0).unsqueeze(1) | high & (side == 1).unsqueeze(1)
    columns = low & (side == 2).unsqueeze(1) | high & (side == 3).unsqueeze(1)
    return images.masked_fill(rows[:, None, :, None] | columns[:, None, None, :], 0.0)


def _stretch(images: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """By how much to widen each image (N,): 1, or for some a factor up to 3 that does not exceed 20 pixels of ink."""
    width = (images[:, 0].amax(dim=1) > 0.3).sum(dim=1).clamp(min=1)
    widest = (20 / width).clamp(1, 3)
    return torch.where(uniform[:, 0] < probability, 1 + uniform[:, 1] * (widest - 1), torch.ones_like(widest))


def _erased(images: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """A square of 4x4 pixels is black at a random place in some images."""
    place = torch.arange(28, device=images.device)
    top, left = (uniform[:, 1:] * 24).long().unbind(dim=1)
    rows = (place >= top[:, None]) & (place < top[:, None] + 4)
    columns = (place >= left[:, None]) & (place < left[:, None] + 4)
    square = rows[:, None, :, None] & columns[:, None, None, :] & (uniform[:, 0] < probability).view(-1, 1, 1, 1)
    return images.masked_fill(square, 0.0)


def _continental(images: Tensor, labels: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Some 1s with an upstroke and sometimes a foot, 7s with a bar through the stem, 9s with a hook."""
    chosen = uniform[:, 0] < probability
    ink = images[:, 0]
    inked_rows = ink.amax(dim=2) > 0.5
    place = torch.arange(28, device=images.device, dtype=images.dtype)
    top = inked_rows.to(torch.uint8).argmax(dim=1)
    bottom = 27 - inked_rows.flip(1).to(torch.uint8).argmax(dim=1)
    height = (bottom - top).clamp(min=1).to(images.dtype)
    width = 0.6 + uniform[:, 1] * 0.9  # half the pen's, in pixels

    def centre(row: Tensor) -> Tensor:
        line = ink[torch.arange(len(ink), device=ink.device), row.long().clamp(0, 27)]
        return (line * place).sum(dim=1) / line.sum(dim=1).clamp(min=1e-3)

    top_x, top_y = centre(top + 1), top.to(images.dtype) + 1
    reach = height * (0.2 + 0.4 * uniform[:, 2])
    steepness = 0.6 + 0.9 * uniform[:, 3]
    upstroke = _segment(top_x - reach, top_y + reach * steepness, top_x, top_y, width, place)
    foot_x, half_foot = centre(bottom - 1), height * (0.1 + 0.15 * uniform[:, 4])
    foot_y = bottom.to(images.dtype) - 0.5
    foot = _segment(foot_x - half_foot, foot_y, foot_x + half_foot, foot_y, width, place)
    foot = foot * (uniform[:, 5] < 0.4).view(-1, 1, 1)
    bar_y = top.to(images.dtype) + height * (0.4 + 0.2 * uniform[:, 2])
    bar_x, half_bar = centre(bar_y.round()), height * (0.15 + 0.15 * uniform[:, 3])
    tilt = half_bar * (uniform[:, 6] - 0.5)
    bar = _segment(bar_x - half_bar, bar_y + tilt, bar_x + half_bar, bar_y - tilt, width, place)
    hook = _segment(foot_x - reach, foot_y - reach * (0.4 * uniform[:, 3]), foot_x, foot_y, width, place)
    one, seven, nine = ((chosen & (labels == digit)).view(-1, 1, 1) for digit in (ONE, SEVEN, NINE))
    strokes = torch.maximum(upstroke, foot) * one + bar * seven + hook * nine
    return torch.maximum(images, strokes.unsqueeze(1))


def _segment(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor, half_width: Tensor, place: Tensor) -> Tensor:
    """Straight pen strokes (N, 28, 28) with soft edges between points (N,), in pixels."""
    x, y = place.view(1, 1, -1), place.view(1, -1, 1)
    x1, y1, dx, dy = (value.view(-1, 1, 1) for value in (x1, y1, x2 - x1, y2 - y1))
    along = (((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy).clamp(min=1e-3)).clamp(0, 1)
    distance = ((x - x1 - along * dx) ** 2 + (y - y1 - along * dy) ** 2).sqrt()
    return (half_width.view(-1, 1, 1) + 0.5 - distance).clamp(0, 1)
