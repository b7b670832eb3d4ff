"""Small data sets that tests make for themselves."""

import gzip
import struct
from pathlib import Path

import numpy as np


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of uint8, gzipped where the name ends in .gz."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def make_small_dataset(folder: Path) -> Path:
    """A folder of IDX files: 150 training and 53 test images of ten classes, each a bright bar at its class's place."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for prefix, count in (("train", 150), ("t10k", 53)):
        labels = np.arange(count) % 10
        images = generator.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[4:24, 2 + 2 * label : 5 + 2 * label] = 255
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
    return folder
