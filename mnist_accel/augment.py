"""Random distortions of whole batches on their device.

The parameters of a step are drawn for the global batch from a generator keyed on (seed, step), and each process uses
its slice: the images that the network sees do not depend on the number of processes, nor on the kind of device.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_accel.seeding import generator

ELASTIC_GRID = 6  # control points along each side


@dataclass(frozen=True)
class Augmentation:
    """How far images are distorted. Each draw is uniform in +- the given extent unless said otherwise."""

    degrees: float = 10.0  # rotation
    translation: float = 2.0  # shift along each axis, in pixels
    scale: float = 0.10  # relative stretch, along each axis on its own
    shear: float = 0.10  # horizontal shift per row; the slant of a hand
    elastic: float = 0.0  # standard deviation, in pixels, of a smooth displacement field (after Simard et al. 2003)
    stroke_width: float = 0.0  # how much of a 3x3 dilation or erosion is mixed in, up to this
    resolution: float = 0.0  # probability of passing through a coarser grid of 14 to 22 pixels, as other scanners do
    contrast: float = 0.0  # how far grey edges are hardened or softened
    noise: float = 0.0  # standard deviation of Gaussian pixel noise, itself uniform from 0 to this
    # The probability that a 1 gets an upstroke, perhaps a foot, a 7 a bar and a 9 a hook, as in many European hands.
    # Labels 1, 7 and 9 must be these digits.
    continental: float = 0.0
    stretch: float = 0.0  # probability that a narrow digit is widened, up to the full width of 20 pixels
    cut: float = 0.0  # probability that up to 4 rows or columns of the digit are missing at one side
    erased: float = 0.0  # probability that a small square is missing
    plain: float = 0.0  # probability that an image is left as it is after the resampling


AUGMENTATIONS = {
    "affine": Augmentation(),
    "elastic": Augmentation(elastic=0.5),
    # For digits of other hands, pens and scanners than MNIST's.
    "handwriting": Augmentation(
        degrees=13, translation=2, scale=0.13, shear=0.25, elastic=0.9, stroke_width=0.9, resolution=0.3, contrast=0.6,
        noise=0.06, continental=0.4, stretch=0.25, cut=0.1, erased=0.1, plain=0.35,
    ),
}  # fmt: skip


def augmentation_for(name: str, class_names: list[str]) -> Augmentation:
    """The distortions of this name; strokes that make sense on digits only are left out for other classes."""
    chosen = AUGMENTATIONS[name]
    are_digits = class_names[:10] == [str(digit) for digit in range(10)]
    return chosen if are_digits else replace(chosen, continental=0.0)


def draw(augmentation: Augmentation, batch_size: int, seed: int, step: int) -> dict[str, Tensor]:
    """The random numbers for every image of a global batch: tensors (batch_size, ...) on the CPU."""
    source = generator(seed, "augment", step)
    draws = {"uniform": torch.rand(batch_size, 26, generator=source)}
    if augmentation.elastic:
        draws["elastic"] = torch.randn(batch_size, 2, ELASTIC_GRID, ELASTIC_GRID, generator=source)
    if augmentation.noise:
        draws["noise"] = torch.randn(batch_size, 1, 28, 28, generator=source)
    return draws


def distort(images: Tensor, labels: Tensor, augmentation: Augmentation, draws: dict[str, Tensor]) -> Tensor:
    """Distorted copies of float images (N, 1, 28, 28) in 0..1, from draws (N, ...) for these images.

    Rotation, translation, scale, shear and the elastic field are one bilinear resampling, black from outside.
    """
    draws = {name: tensor.to(images.device, non_blocking=True) for name, tensor in draws.items()}
    # 26 numbers an image, each of them (N, 1, 1, 1), so that it broadcasts over the image's pixels.
    uniform = draws["uniform"].T[..., None, None, None]
    if augmentation.continental:
        images = _continental(images, labels[:, None, None, None], augmentation.continental, uniform[6:13])
    if augmentation.cut:
        images = _cut(images, augmentation.cut, uniform[20:22])
    theta = _affine(augmentation, uniform[:6])
    if augmentation.stretch:
        theta[:, 0] /= _stretch(images, augmentation.stretch, uniform[22:24]).view(-1, 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if augmentation.elastic:
        # B-spline-like smoothness: bicubic interpolation of a coarse field; 2/28 of the -1..1 grid is a pixel.
        field = F.interpolate(draws["elastic"], size=images.shape[-2:], mode="bicubic", align_corners=True)
        grid = grid + field.permute(0, 2, 3, 1) * (augmentation.elastic * 2 / 28)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    resampled = images
    if augmentation.stroke_width:
        images = _stroke_width(images, _signed(uniform[13]) * augmentation.stroke_width)
    if augmentation.resolution:
        images = _resolution(images, uniform[14], augmentation.resolution)
    if augmentation.contrast:
        # Edges harden towards a threshold at one half, or soften; 0 and 1 stay where they are.
        gain = (_signed(uniform[15]) * augmentation.contrast).exp2() ** 2
        images = ((images - 0.5) * gain + 0.5).clamp(0, 1).where(gain > 1, images ** (1 / gain))
    if augmentation.erased:
        images = _erased(images, augmentation.erased, uniform[16:19])
    if augmentation.noise:
        images = (images + draws["noise"] * uniform[19] * augmentation.noise).clamp(0, 1)
    return torch.where(uniform[24] < augmentation.plain, resampled, images)


def _signed(uniform: Tensor) -> Tensor:
    return uniform * 2 - 1


def _rows_and_columns(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel's row, (28, 1), and column, (28,)."""
    place = torch.arange(28, device=images.device, dtype=images.dtype)
    return place[:, None], place


def _affine(augmentation: Augmentation, uniform: Tensor) -> Tensor:
    """Matrices (N, 2, 3) from output to input coordinates, as `affine_grid` takes them."""
    draws = _signed(uniform)
    angle = draws[0] * math.radians(augmentation.degrees)
    cos, sin = angle.cos(), angle.sin()
    shift_x, shift_y = draws[1:3] * augmentation.translation / 14
    scale_x, scale_y = 1 + draws[3:5] * augmentation.scale
    shear = draws[5] * augmentation.shear
    row_x = [cos / scale_x, (shear * cos - sin) / scale_x, shift_x]
    row_y = [sin / scale_y, (shear * sin + cos) / scale_y, shift_y]
    return torch.stack(row_x + row_y, dim=1).view(-1, 2, 3)


def _stroke_width(images: Tensor, amount: Tensor) -> Tensor:
    """Thicker where `amount` in -1..1 is positive, thinner where negative."""
    thick = F.max_pool2d(images, 3, stride=1, padding=1)
    thin = -F.max_pool2d(-images, (2, 2), stride=1, padding=1)[..., :28, :28]
    return torch.where(amount > 0, images.lerp(thick, amount.clamp(0)), images.lerp(thin, (-amount).clamp(0) * 0.7))


def _resolution(images: Tensor, uniform: Tensor, probability: float) -> Tensor:
    """Some images seen through a coarser grid; every image goes through all grids, so shapes stay static."""
    result = images
    for part, size in ((3, 22), (2, 18), (1, 14)):  # a third of them each: the last to be chosen stays
        coarse = F.interpolate(images, size=(size, size), mode="area")
        coarse = F.interpolate(coarse, size=images.shape[-2:], mode="bilinear", align_corners=False)
        # As in MNIST, the brightest ink is white.
        coarse = coarse / coarse.amax(dim=(2, 3), keepdim=True).clamp(min=0.3)
        result = torch.where(uniform < probability * part / 3, coarse.clamp(max=1), result)
    return result


def _cut(images: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Some images with what lies beyond a straight line near one side of the digit's box missing."""
    row, column = _rows_and_columns(images)
    # One draw says whether and at which of four sides, the other how deep into the box of 20 pixels.
    side, edge = (uniform[0] / probability * 4).long(), (5 + uniform[1] * 4).long()
    rows = (row < edge) & (side == 0) | (row >= 28 - edge) & (side == 1)
    columns = (column < edge) & (side == 2) | (column >= 28 - edge) & (side == 3)
    return images.masked_fill(rows | columns, 0.0)


def _stretch(images: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """By how much to widen each image: 1, or for some a factor up to 3 that does not exceed 20 pixels of ink."""
    width = (images.amax(dim=2, keepdim=True) > 0.3).sum(dim=3, keepdim=True).clamp(min=1)
    widest = (20 / width).clamp(1, 3)
    return torch.where(uniform[0] < probability, 1 + uniform[1] * (widest - 1), 1.0)


def _erased(images: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """A square of 4x4 pixels is black at a random place in some images."""
    row, column = _rows_and_columns(images)
    top, left = (uniform[1:] * 24).long()
    rows = (row >= top) & (row < top + 4) & (uniform[0] < probability)
    return images.masked_fill(rows & ((column >= left) & (column < left + 4)), 0.0)


def _continental(images: Tensor, labels: Tensor, probability: float, uniform: Tensor) -> Tensor:
    """Some 1s with an upstroke and sometimes a foot, 7s with a bar through the stem, 9s with a hook."""
    inked = (images.amax(dim=3, keepdim=True) > 0.5).to(torch.uint8)
    top, bottom = inked.argmax(dim=2, keepdim=True), 27 - inked.flip(2).argmax(dim=2, keepdim=True)
    height = (bottom - top).clamp(min=1).to(images.dtype)
    y, x = _rows_and_columns(images)
    half_width = 0.6 + uniform[1] * 0.9  # of the pen, in pixels

    def centre(row: Tensor) -> Tensor:
        line = images.take_along_dim(row.long().clamp(0, 27), dim=2)
        return (line * x).sum(dim=3, keepdim=True) / line.sum(dim=3, keepdim=True).clamp(min=1e-3)

    def stroke(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
        """A straight stroke of the pen with soft edges between two points, in pixels."""
        dx, dy = x2 - x1, y2 - y1
        along = (((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy).clamp(min=1e-3)).clamp(0, 1)
        distance = ((x - x1 - along * dx) ** 2 + (y - y1 - along * dy) ** 2).sqrt()
        return (half_width + 0.5 - distance).clamp(0, 1)

    top_x, top_y = centre(top + 1), top.to(images.dtype) + 1
    reach = height * (0.2 + 0.4 * uniform[2])
    upstroke = stroke(top_x - reach, top_y + reach * (0.6 + 0.9 * uniform[3]), top_x, top_y)
    foot_x, foot_y = centre(bottom - 1), bottom.to(images.dtype) - 0.5
    half_foot = height * (0.1 + 0.15 * uniform[4])
    foot = stroke(foot_x - half_foot, foot_y, foot_x + half_foot, foot_y) * (uniform[5] < 0.4)
    bar_y = top.to(images.dtype) + height * (0.4 + 0.2 * uniform[2])
    bar_x, half_bar = centre(bar_y.round()), height * (0.15 + 0.15 * uniform[3])
    tilt = half_bar * (uniform[6] - 0.5)
    bar = stroke(bar_x - half_bar, bar_y + tilt, bar_x + half_bar, bar_y - tilt)
    hook = stroke(foot_x - reach, foot_y - reach * (0.4 * uniform[3]), foot_x, foot_y)
    one, seven, nine = ((uniform[0] < probability) & (labels == digit) for digit in (1, 7, 9))
    return torch.maximum(images, torch.maximum(upstroke, foot) * one + bar * seven + hook * nine)
