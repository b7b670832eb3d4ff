"""Data sets as uint8 tensors: the Hub, local folders, IDX files, and the embedded `digits`.

A data set is decoded once and kept as one safetensors file in `$HF_HOME/mnist_accel`; later starts read that file
and touch neither the network nor the `datasets` library, which alone takes seconds to import.
"""

import gzip
import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
CACHE_VERSION = 1  # part of every key: raise it when the same source would decode to other tensors
EMBEDDED = Path(__file__).parent / "assets" / "digits.npz"
SPLITS, KINDS = ("train", "test"), ("images", "labels")


@dataclass(frozen=True)
class Split:
    """One split: `images` uint8 (N, 28, 28), white ink on black; `labels` int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    `fingerprint` is a hash of the pixels, labels and class names, so that the same data has the same one
    whether it came from the Hub, from parquet or from IDX files; `source` says in words where it came from.
    """

    train: Split
    test: Split
    class_names: list[str]
    fingerprint: str
    source: str


def load_data(name: str) -> ImageData:
    """The data set of this name, decoded, from the cache where it has been decoded before.

    Args:
        name: `digits`, the embedded set; a folder of the four IDX files; a folder that `datasets.load_dataset` reads,
            such as a copy of a Hub repository; or a Hub id. `ID:CONFIG` picks one of several configurations.

    Raises:
        UserError: there is no such data set, it is out of reach, or it is not made of images with class labels.
    """
    if name == "digits":
        return _embedded_digits()
    from mnist_accel.data_hub import load_folder, load_hub

    base, _, config = (name, "", "") if os.path.isdir(os.path.expanduser(name)) else name.partition(":")
    folder = Path(os.path.expanduser(base)).resolve()
    if base and folder.is_dir():
        idx = _find_idx(folder)
        files = sorted(idx.values()) if idx else _visible_files(folder)
        if not files:
            raise UserError(f"no data files in {folder}: give a folder of IDX files, of parquet files, or a Hub id")
        facts = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = [str(folder), config, facts]
        if idx:
            return _cached(key, lambda: _from_idx(folder, idx))
        return _cached(key, lambda: load_folder(name, folder, config))
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
        raise UserError(f"no folder {base!r}: give an existing folder, a Hub id such as ylecun/mnist, or digits")
    return _cached([base, config], lambda: load_hub(name, base, config))


def check_data(train: Split, test: Split, class_names: list[str], source: str) -> ImageData:
    """Check what was decoded, bring it to white on black and fingerprint it.

    Raises:
        UserError: a split is empty or has labels outside the classes.
    """
    for kind, split in (("training", train), ("test", test)):
        if not len(split.images):
            raise UserError(f"{source} has no {kind} images: choose another data set")
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= len(class_names):
            raise UserError(
                f"{source} has {kind} labels from {low} to {high}, but {len(class_names)} classes "
                f"(0 to {len(class_names) - 1}): remove or relabel these images"
            )
    border = torch.ones(SIZE, SIZE, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if train.images[:1000, border].float().mean() > 127.5:
        source += " (dark on light, inverted)"
        train, test = (Split(255 - split.images, split.labels) for split in (train, test))
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for tensor in (train.images, train.labels, test.images, test.labels):
        digest.update(json.dumps(list(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return ImageData(train, test, class_names, digest.hexdigest(), source)


def numbered_classes(*splits: Split) -> list[str]:
    """The class names of labels that have none: "0" to the highest one."""
    return [str(label) for label in range(1 + max((int(s.labels.max()) for s in splits if len(s.labels)), default=0))]


# The embedded set


def _embedded_digits() -> ImageData:
    """The 1,797 digits that scikit-learn bundles, scaled to look like MNIST; every fifth of a class is for testing.

    They are the test part of the UCI Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998,
    https://doi.org/10.24432/C50P49, CC BY 4.0): 8x8 images of 0..16, each the ink of one 4x4 block of a 32x32 scan.
    """
    with np.load(EMBEDDED) as archive:
        small, labels = torch.from_numpy(archive["images"]).float(), torch.from_numpy(archive["labels"]).long()
    boxes = F.interpolate(small[:, None], size=(20, 20), mode="bicubic", align_corners=False)[:, 0].clamp(min=0)
    boxes = (boxes * 255 / boxes.amax(dim=(1, 2), keepdim=True)).round().to(torch.uint8)
    # MNIST's own placement: a 20x20 box moved so that its centre of mass falls on the centre of the 28x28 image.
    mass, middle = boxes.float(), torch.arange(20) + 0.5
    total = mass.sum(dim=(1, 2))
    tops = (15 - (mass.sum(dim=2) @ middle) / total).int().clamp(0, SIZE - 20).tolist()
    lefts = (15 - (mass.sum(dim=1) @ middle) / total).int().clamp(0, SIZE - 20).tolist()
    images = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.uint8)
    for image, box, top, left in zip(images, boxes, tops, lefts, strict=True):
        image[top : top + 20, left : left + 20] = box
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[4::5]] = True
    train, test = (Split(images[chosen], labels[chosen]) for chosen in (~held_out, held_out))
    return check_data(train, test, [str(digit) for digit in range(10)], "the embedded digits (UCI)")


# IDX files

IDX_NAMES = {
    (split, kind): f"{prefix}-{kind}{{}}idx{rank}-ubyte"
    for split, prefix in (("train", "train"), ("test", "t10k"))
    for kind, rank in (("images", 3), ("labels", 1))
}


def _find_idx(folder: Path) -> dict[tuple[str, str], Path]:
    """The four IDX files by (split, kind), gzipped or not, in the folder or where torchvision leaves them; or none.

    Raises:
        UserError: some of the four are there and some are missing.
    """
    for place in (folder, folder / "MNIST" / "raw", folder / "raw"):
        found = {}
        for key, pattern in IDX_NAMES.items():
            spellings = [pattern.format(dash) + gz for dash in "-." for gz in ("", ".gz")]
            if present := [place / spelling for spelling in spellings if (place / spelling).is_file()]:
                found[key] = present[0]
        if missing := [pattern.format("-") for key, pattern in IDX_NAMES.items() if key not in found]:
            if found:
                raise UserError(f"{place} lacks {', '.join(missing)}: all four IDX files are needed, .gz or not")
            continue
        return found
    return {}


def _visible_files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file (http://yann.lecun.com/exdb/mnist/): magic 0, 0, 8, rank; big-endian sizes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < header:
        raise UserError(f"{path} is not an IDX file of {dimensions}-dimensional unsigned bytes: fetch it again")
    shape = np.frombuffer(data, ">u4", dimensions, 4).tolist()
    if len(data) != header + int(np.prod(shape, dtype=object)):
        raise UserError(f"{path} has {len(data)} bytes, not what its header {shape} says: fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _from_idx(folder: Path, files: dict[tuple[str, str], Path]) -> ImageData:
    from PIL import Image

    splits = []
    for split in ("train", "test"):
        images, labels = (_read_idx(files[split, kind], rank) for kind, rank in (("images", 3), ("labels", 1)))
        if len(images) != len(labels):
            raise UserError(f"{files[split, 'images']} has {len(images)} images, its label file {len(labels)} labels")
        if images.shape[1:] != (SIZE, SIZE):
            scaled = [scale_image(Image.fromarray(image), str(files[split, "images"])) for image in images]
            images = np.stack(scaled) if scaled else np.empty((0, SIZE, SIZE), np.uint8)
        splits.append(Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))))
    train, test = splits
    return check_data(train, test, numbered_classes(train, test), str(folder))


def scale_image(image: Any, where: str) -> np.ndarray:
    """A Pillow image as uint8 (28, 28): grey, and scaled if it is square and of another size.

    Raises:
        UserError: it is not square, or its pixels have more than 8 bits.
    """
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        raise UserError(f"{where} has pixels of more than 8 bits (mode {image.mode}): save it with 8 bits a channel")
    if image.width != image.height:
        raise UserError(f"{where} is {image.width}x{image.height}: only square images can be scaled to {SIZE}x{SIZE}")
    grey = image.convert("L")
    if grey.size != (SIZE, SIZE):
        # As MNIST was made: shrinking averages over area.
        grey = grey.resize((SIZE, SIZE), Image.Resampling.BOX if grey.width > SIZE else Image.Resampling.BICUBIC)
    return np.asarray(grey)


# The cache


def _cache_folder() -> Path:
    # The rule of huggingface_hub, without importing it.
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(cache, "huggingface")).expanduser() / "mnist_accel"


def _cached(key: list[Any], make: Callable[[], ImageData]) -> ImageData:
    """The data set of this key from the cache, else made and put there by one process while the others wait."""
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, *key]).encode()).hexdigest()[:32]
    file = _cache_folder() / f"{digest}.safetensors"
    if data := _read_cache(file):
        return data
    began = time.time()
    with _lock(file.with_suffix(".lock")):
        if data := _read_cache(file):
            return data
        failure = file.with_suffix(".failed")
        if message := _failed_since(began, failure):  # do not wait for the Hub once more for every process
            raise UserError(message)
        try:
            data = make()
        except UserError as error:
            with suppress(OSError):
                failure.write_text(json.dumps([time.time(), str(error)]))
            raise
        _write_cache(file, data)
    return data


def _failed_since(began: float, failure: Path) -> str:
    with suppress(OSError, ValueError):
        when, message = json.loads(failure.read_text())
        return message if when >= began else ""
    return ""


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        pass  # a cache that cannot be written: every process makes its own
    try:
        yield
    finally:
        lock.release()


def _write_cache(file: Path, data: ImageData) -> None:
    tensors = {f"{name}_{kind}": getattr(getattr(data, name), kind) for name in SPLITS for kind in KINDS}
    facts = {"class_names": json.dumps(data.class_names), "fingerprint": data.fingerprint, "source": data.source}
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(save(tensors, facts))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        if is_first_rank():
            print(f"warning: cannot keep the decoded images in {file.parent} ({error}): set HF_HOME", file=sys.stderr)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _read_cache(file: Path) -> ImageData | None:
    """The data set of a cache file, mapped into memory; nothing if the file is missing or damaged."""
    try:
        with safe_open(file, "pt") as archive:
            facts = archive.metadata()
            train, test = (Split(*(archive.get_tensor(f"{name}_{kind}") for kind in KINDS)) for name in SPLITS)
        return ImageData(train, test, json.loads(facts["class_names"]), facts["fingerprint"], facts["source"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
