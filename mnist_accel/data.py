"""Data sets as uint8 tensors: the Hub, local folders, IDX files, and the embedded `digits`.

A data set is decoded once and kept as one safetensors file in `$HF_HOME/mnist_accel`; later starts read that file
and touch neither the network nor the `datasets` library, which alone takes seconds to import.
"""

import gzip
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import threading
import time
import warnings
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
HUB_SECONDS = 6.0  # longest silence of the Hub in any one request
HUB_ATTEMPTS = 2  # how often one request is made before the Hub counts as out of reach
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
        return _cached(key, lambda: _from_folder(name, folder, config))
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
        raise UserError(f"no folder {base!r}: give an existing folder, a Hub id such as ylecun/mnist, or digits")
    return _cached([base, config], lambda: _from_hub(name, base, config))


def _image_data(train: Split, test: Split, class_names: list[str], source: str) -> ImageData:
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


def _numbered(*splits: Split) -> list[str]:
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
    return _image_data(train, test, [str(digit) for digit in range(10)], "the embedded digits (UCI)")


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
            scaled = [_scaled(Image.fromarray(image), str(files[split, "images"])) for image in images]
            images = np.stack(scaled) if scaled else np.empty((0, SIZE, SIZE), np.uint8)
        splits.append(Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))))
    train, test = splits
    return _image_data(train, test, _numbered(train, test), str(folder))


# Anything that the datasets library reads


def _scaled(image: Any, where: str) -> np.ndarray:
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


def _decode(value: dict[str, Any] | None, where: str) -> np.ndarray:
    """One undecoded value of an image column, {"bytes": ..., "path": ...}, as uint8 (28, 28)."""
    from PIL import Image

    if not value or not (value["bytes"] or value["path"]):
        raise UserError(f"{where} is empty: remove this row from the data set")
    try:
        with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]) as image:
            return _scaled(image, where)
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever comes on damaged bytes
        # For an image file of a folder, the path says which; inside parquet it is only a name, if anything.
        raise UserError(f"{where} ({value['path'] or 'unnamed'}) is damaged or not an image: remove it") from error


def _read_split(split: Any, name: str, image_column: str, label_column: str) -> Split:
    images, labels = [np.empty((0, SIZE, SIZE), np.uint8)], [np.empty(0, np.int64)]
    count = 0
    # In one thread: on images this small threads only wait for each other, and made it twice as slow.
    for batch in split.iter(batch_size=1024):
        values = batch[image_column]
        images.append(np.stack([_decode(value, f"image {count + i} of {name}") for i, value in enumerate(values)]))
        # A row without a label is None, or -1 where the column is a ClassLabel.
        labels.append(np.array([-1 if label is None else label for label in batch[label_column]], np.int64))
        count += len(values)
    return Split(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def _columns(features: Any, name: str) -> tuple[str, str, list[str]]:
    """The image column, the label column and the class names (none without a ClassLabel) of a data set's features."""
    from datasets import ClassLabel, Image, Value

    features = features or {}
    image = [column for column, feature in features.items() if isinstance(feature, Image)]
    label = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    label = label or [column for column, f in features.items() if isinstance(f, Value) and "int" in f.dtype]
    if "label" in label:
        label = ["label"]
    if len(image) != 1 or len(label) != 1:
        raise UserError(
            f"{name} has {len(image)} image and {len(label)} label columns (of {', '.join(features) or 'none'}): "
            "give a data set with one image and one class label in a row"
        )
    return image[0], label[0], list(getattr(features[label[0]], "names", None) or [])


def _from_datasets(name: str, path: str, config: str, **options: Any) -> ImageData:
    """Decode what `datasets.load_dataset(path, config, **options)` gives.

    Raises:
        UserError: it is not a data set of labelled images with a training and a test split.
        Exception: whatever the `datasets` library raises.
    """
    import datasets
    from huggingface_hub.utils import disable_progress_bars, logging

    datasets.logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        splits = datasets.load_dataset(path, config or None, **options)
        test = next((split for split in ("test", "validation") if split in splits), None)
        if "train" not in splits or test is None:
            raise UserError(f"{name} has the splits {', '.join(splits)}, but 'train' and 'test' are needed")
        image, label, class_names = _columns(splits["train"].features, name)
        raw = splits.cast_column(image, datasets.Image(decode=False))
        train, held_out = (_read_split(raw[s], f"{name}'s {s} split", image, label) for s in ("train", test))
    source = name if test == "test" else f"{name} (tested on its validation split)"
    return _image_data(train, held_out, class_names or _numbered(train, held_out), source)


def _from_folder(name: str, folder: Path, config: str) -> ImageData:
    try:
        # Streaming reads the files where they are; `datasets` would copy them all into its own cache first.
        with tempfile.TemporaryDirectory() as locks:
            return _from_datasets(name, str(folder), config, streaming=True, cache_dir=locks)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be read as a data set of images: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Config name is missing"):
        return f"it has several configurations, choose one as NAME:CONFIG; {lines[1]}"
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# The Hub


class HubTimeout(Exception):
    """The Hub did not answer; not an OSError, so that no library takes it for something to retry."""


def _from_hub(name: str, hub_id: str, config: str) -> ImageData:
    """Download and decode a data set of the Hub, in bounded time whatever the Hub does.

    The `datasets` library alone waits up to 400 s for a Hub that accepts connections and never answers.
    """
    trouble = _probe_hub(hub_id)
    with _impatient_hub(offline=bool(trouble)):
        try:
            return _from_datasets(name, hub_id, config)
        except UserError:
            raise
        except (ValueError, RuntimeError) as error:  # of `datasets`: an unknown configuration, a data set of scripts
            if not trouble:
                raise UserError(f"{name} cannot be loaded: {_reason(error)}") from error
        except Exception as error:
            trouble = trouble or _reason(error)
    raise UserError(
        f"{name} is not in the cache and cannot be fetched from the Hub ({trouble}): try again later, or use "
        "--dataset FOLDER or --dataset digits; to bring MNIST from another machine, run there "
        "`hf download ylecun/mnist --repo-type dataset --local-dir mnist`, copy the folder and use --dataset ./mnist"
    )


def _probe_hub(hub_id: str) -> str:
    """Why the Hub is out of reach, or nothing if it knows this data set.

    Raises:
        UserError: it does not know it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(hub_id, timeout=HUB_SECONDS)
            answer.append(None)
        except Exception as error:
            answer.append(error)

    # In a thread, because nothing else bounds a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS + 1)
    error = answer[0] if answer else HubTimeout(f"no answer within {HUB_SECONDS:.0f} seconds")
    if isinstance(error, GatedRepoError):
        raise UserError(f"{hub_id} is gated: accept its terms on the Hub and log in with `hf auth login`") from error
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        raise UserError(
            f"unknown data set {hub_id}: no such folder, and the Hub has no such data set (or it is private: log in "
            "with `hf auth login`); try ylecun/mnist, a folder, or digits"
        ) from error
    return _reason(error) if error else ""


@contextmanager
def _impatient_hub(offline: bool) -> Iterator[None]:
    """Let no request of huggingface_hub wait long, nor be repeated often; or let it make none at all if `offline`."""
    import datasets
    from huggingface_hub import constants, get_session, set_client_factory

    requests = threading.local()

    def limit(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), HUB_SECONDS)
        # A download that goes on where it broke off asks for another range: that is progress, not a repetition.
        this = (request.method, request.url, request.headers.get("range"))
        requests.count = requests.count + 1 if getattr(requests, "last", None) == this else 1
        requests.last = this
        if requests.count > HUB_ATTEMPTS:
            raise HubTimeout(f"no answer to {HUB_ATTEMPTS} requests for {request.url}")

    # The client's class is httpx's or httpx2's, by the version of huggingface_hub.
    client = type(get_session())
    hooks = get_session().event_hooks
    limited = {**hooks, "request": [*hooks["request"], limit]}
    before = constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET, datasets.config.HF_HUB_OFFLINE
    set_client_factory(lambda: client(event_hooks=limited, follow_redirects=True))
    # Xet's own client, which the hook does not reach, has no such limits.
    constants.HF_HUB_DISABLE_XET = True
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True, timeout=None))
        constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET, datasets.config.HF_HUB_OFFLINE = before


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
