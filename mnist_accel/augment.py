"""Random distortions of whole batches on their device.

The parameters of a step are drawn for the global batch from a generator keyed on (seed, step), and each process uses its
slice: the images that the network sees do not depend on the number of processes, nor on the kind of device.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_accel.seeding import generator

DEGREES, TRANSLATION_PIXELS, SCALE, SHEAR = 10.0, 2.0, 0.10, 0.10


def draw_affine(batch_size: int, seed: int, step: int) -> Tensor:
    """Affine parameters for every image of a global batch.

    Rotation is uniform in +-10 degrees, translation in +-2 pixels, scale in 0.9..1.1 along each axis, horizontal shear in
    +-0.1.

    Returns:
        float32 (batch_size, 2, 3), on the CPU: maps output to input coordinates, as `affine_grid` takes them.
    """
    draws = torch.rand(batch_size, 6, generator=generator(seed, "augment", step)) * 2 - 1
    angle = draws[:, 0] * math.radians(DEGREES)
    shift_x, shift_y = draws[:, 1] * TRANSLATION_PIXELS / 14, draws[:, 2] * TRANSLATION_PIXELS / 14
    scale_x, scale_y = 1 + draws[:, 3] * SCALE, 1 + draws[:, 4] * SCALE
    shear = draws[:, 5] * SHEAR
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos / scale_x, (shear * cos - sin) / scale_x, shift_x], dim=1)
    row_y = torch.stack([sin / scale_y, (shear * sin + cos) / scale_y, shift_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def apply_affine(images: Tensor, theta: Tensor) -> Tensor:
    """Bilinear resampling of float images (N, 1, H, W) under `theta` (N, 2, 3); what comes from outside is black."""
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
