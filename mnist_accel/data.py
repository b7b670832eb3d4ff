"""Data sets as uint8 tensors: the Hub, local folders, IDX files, and the embedded `digits`.

A data set is decoded once and kept as one safetensors file in `$HF_HOME/mnist_accel`; later starts read that file
and touch neither the network nor the `datasets` library, which alone takes seconds to import.
"""

import gzip
import hashlib
import json
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from mnist_accel.cli import UserError, is_first_rank

SIZE = 28
CACHE_VERSION = 3  # part of every key: raise it when the same source would decode to other tensors
OWN_IMAGES = "of your own images each lies in train/CLASS/ or test/CLASS/, of two classes or more"
SPLITS, KINDS = ("train", "test"), ("images", "labels")
EMBEDDED = Path(__file__).parent / "assets" / "digits.npz"


@dataclass(frozen=True)
class Split:
    """One split: `images` uint8 (N, 28, 28), white ink on black; `labels` int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData:
    """A data set in memory; `fingerprint` is a hash of what it holds, `source` says in words where it came from.

    `inverted` where its files are dark on light: `images` are their negatives.
    """

    train: Split
    test: Split
    class_names: list[str]
    fingerprint: str
    source: str
    inverted: bool


def load_data(name: str) -> ImageData:
    """The data set of this name, decoded, from the cache where it has been decoded before.

    `name` is `digits`, a folder of the four IDX files, a folder that `datasets.load_dataset` reads or a Hub id;
    `NAME:CONFIG` picks one of several configurations. Raises a `UserError` where there is no such data set, it is
    out of reach, or it is not made of images with class labels.
    """
    if name == "digits":
        return _embedded_digits()
    from mnist_accel.data_hub import load_folder
    from mnist_accel.hub import download_files

    base, _, config = (name, "", "") if os.path.isdir(os.path.expanduser(name)) else name.partition(":")
    folder = Path(os.path.expanduser(base)).resolve()
    if base and folder.is_dir():
        idx = _find_idx(folder)
        files = idx or _files_below(folder)
        if not files:
            raise UserError(f"no data files in {folder}: give a folder of IDX files, of parquet files, or a Hub id")
        facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        make = partial(_from_idx, name, *idx) if idx else partial(load_folder, name, folder, config)
        return _cached(name, [facts, config], make)
    if folder.is_file():
        raise UserError(f"{base} is a file: give the folder that it is in")
    hub_id = hub_dataset(name)
    if hub_id is None:
        raise UserError(f"no folder {base!r}: give an existing folder, a Hub id such as ylecun/mnist, or digits")
    return _cached(name, [hub_id, config], lambda: load_folder(name, download_files(hub_id, kind="dataset"), config))


def _files_below(folder: Path) -> list[Path]:
    below = list(folder.rglob("[!.]*"))  # which enters no links
    below += [path for link in below if link.is_symlink() and link.is_dir() for path in link.rglob("[!.]*")]
    return sorted(filter(Path.is_file, below))


def hub_dataset(name: str) -> str | None:
    """The Hub id in a data set's name as `load_data` takes it; None for `digits` and for what lies on this disk."""
    base = name.partition(":")[0]
    on_disk = any(os.path.exists(os.path.expanduser(path)) for path in (name, base))
    is_id = name != "digits" and not on_disk and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base)
    return base if is_id else None


def check_data(train: Split, test: Split, class_names: list[str], source: str) -> ImageData:
    """Check what was decoded, number classes without names, bring images to white on black, and fingerprint it all.

    Raises a `UserError` where a split is empty, has labels outside the classes, or a class has a name that no file can
    record.
    """
    if not len(train.images) or not len(test.images):
        raise UserError(
            f"{source} has no {'test' if len(train.images) else 'training'} images: choose another data set"
        )
    labels = torch.cat((train.labels, test.labels)).unique()
    low, high = labels.aminmax()
    if not class_names and high > 10 + 2 * len(labels):
        raise UserError(
            f"{source} has labels up to {high}, but only {len(labels)} different ones: number its classes from 0"
        )
    class_names = class_names or [str(label) for label in range(int(high) + 1)]
    for name in class_names:
        if name != name.encode(errors="ignore").decode():
            raise UserError(f"{source} has a class {name!r}, which is not in UTF-8: give it another name")
    if low == -1:
        raise UserError(f"{source} has images without a label: give each its label, or remove it; {OWN_IMAGES}")
    if low < 0 or high >= len(class_names):
        raise UserError(
            f"{source} has labels from {low} to {high}, but {len(class_names)} classes (0 to {len(class_names) - 1}): "
            "remove or relabel these images"
        )
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    inverted = bool(train.images[:1000, border].float().mean() > 127.5)
    if inverted:
        source += " (dark on light, inverted)"
        train, test = (Split(255 - split.images, split.labels) for split in (train, test))
    return ImageData(train, test, class_names, _fingerprint(train, test, class_names), source, inverted)


def _fingerprint(train: Split, test: Split, class_names: list[str]) -> str:
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(json.dumps(list(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _embedded_digits() -> ImageData:
    """The 1,797 digits that scikit-learn bundles, scaled to look like MNIST; every fifth of a class is for testing.

    They are the test part of the UCI Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998,
    https://doi.org/10.24432/C50P49, CC BY 4.0): 8x8 images of 0..16, each the ink of one 4x4 block of a 32x32 scan.
    """
    from mnist_accel.images import centred

    with np.load(EMBEDDED) as archive:
        small, labels = torch.from_numpy(archive["images"]).float(), torch.from_numpy(archive["labels"]).long()
    boxes = F.interpolate(small[:, None], size=(20, 20), mode="bicubic", align_corners=False)[:, 0].clamp(min=0)
    boxes = (boxes * 255 / boxes.amax(dim=(1, 2), keepdim=True)).round()
    images = torch.from_numpy(np.stack([centred(box) for box in boxes.numpy()]))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[4::5]] = True
    train, test = (Split(images[chosen], labels[chosen]) for chosen in (~held_out, held_out))
    return check_data(train, test, [], "the embedded digits (UCI)")


# IDX files

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _find_idx(folder: Path) -> list[Path]:
    """The four IDX files in the order above, gzipped or not, in the folder or where torchvision puts them; or none."""
    for place in (folder, folder / "MNIST" / "raw", folder / "raw"):
        found: dict[str, Path] = {}
        for name in IDX_NAMES:
            for path in sorted(filter(Path.is_file, place.glob(name.replace("-idx", "[-.]idx") + "*")))[:1]:
                found[name] = path
        if len(found) == len(IDX_NAMES):
            return list(found.values())
        if found:
            missing = ", ".join(name for name in IDX_NAMES if name not in found)
            raise UserError(f"{place} lacks {missing}: all four IDX files are needed, .gz or not")
    return []


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (http://yann.lecun.com/exdb/mnist/): magic 0, 0, 8, rank; big-endian sizes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", data)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    header = 4 + 4 * dimensions
    if magic != 0x800 + dimensions or len(data) != header + math.prod(shape) or 0 in shape[1:]:
        raise UserError(f"{path} is not a whole IDX file of {dimensions}-dimensional unsigned bytes: fetch it again")
    return np.frombuffer(bytearray(data), np.uint8, offset=header).reshape(shape)


def _from_idx(name: str, *files: Path) -> ImageData:
    from PIL import Image

    splits = []
    for image_file, label_file in (files[:2], files[2:]):
        images, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
        if len(images) != len(labels):
            raise UserError(f"{image_file} has {len(images)} images, its label file {len(labels)} labels")
        if len(images) and images.shape[1:] != (SIZE, SIZE):
            images = np.stack([scale_image(Image.fromarray(image), str(image_file)) for image in images])
        splits.append(Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))))
    return check_data(splits[0], splits[1], [], name)


def scale_image(image: Any, where: str) -> np.ndarray:
    """A Pillow image as grey uint8 (28, 28), as `predict_dir.py --as-is` makes it.

    Raises a `UserError` if it is not square, its pixels have more than 8 bits, or it is far too large.
    """
    from mnist_accel.images import ImageError, decoded, resized

    if image.mode.startswith(("I", "F")):
        raise UserError(f"{where} has pixels of more than 8 bits (mode {image.mode}): save it with 8 bits a channel")
    if image.width != image.height:
        raise UserError(f"{where} is {image.width}x{image.height}: crop or pad it to a square")
    try:
        return resized(decoded(image))
    except ImageError as error:
        raise UserError(f"{where}: {error}") from error


# The cache


def _cached(name: str, key: list[Any], make: Callable[[], ImageData]) -> ImageData:
    """The data set of this key from the cache, else made and put there; `name` is what it is called this time.

    One folder can be given in several ways. Processes that come here together each make it: let one of them go ahead.
    """
    # The folder follows the rule of huggingface_hub, without importing it.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, *key]).encode()).hexdigest()[:32]
    file = Path(os.path.expanduser(home), "mnist_accel", f"{digest}.safetensors")
    data = _read_cache(file, name)
    if data is None:
        data = make()
        _write_cache(file, name, data)
    return data


def _write_cache(file: Path, name: str, data: ImageData) -> None:
    from mnist_accel.output import replacing  # which imports Pillow

    tensors = {f"{split}_{kind}": tensor for split in SPLITS for kind, tensor in vars(getattr(data, split)).items()}
    facts = {"class_names": data.class_names, "fingerprint": data.fingerprint, "inverted": data.inverted}
    facts["remarks"] = data.source.removeprefix(name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:
            unfinished.write_bytes(save(tensors, {"facts": json.dumps(facts)}))
    except OSError as error:
        if is_first_rank():
            print(f"warning: cannot keep the decoded images in {file.parent} ({error}): set HF_HOME", file=sys.stderr)


def _read_cache(file: Path, name: str) -> ImageData | None:
    """The data set of a cache file, mapped into memory; nothing if the file is missing or damaged."""
    try:
        with safe_open(file, "pt") as archive:
            facts = json.loads(archive.metadata()["facts"])
            train, test = (Split(*(archive.get_tensor(f"{split}_{kind}") for kind in KINDS)) for split in SPLITS)
        source = name + facts.pop("remarks")
        if _fingerprint(train, test, facts["class_names"]) != facts["fingerprint"]:  # a decayed disk
            return None
        return ImageData(train, test, source=source, **facts)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
