"""Whatever the `datasets` library reads, local folders and the Hub, as uint8 tensors; the Hub in bounded time."""

import io
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_accel.cli import UserError
from mnist_accel.data import SIZE, ImageData, Split, check_data, numbered_classes, scale_image

HUB_SECONDS = 6.0  # longest silence of the Hub in any one request
HUB_ATTEMPTS = 2  # how often one request is made before the Hub counts as out of reach


def _decode(value: dict[str, Any] | None, where: str) -> np.ndarray:
    """One undecoded value of an image column, {"bytes": ..., "path": ...}, as uint8 (28, 28)."""
    from PIL import Image

    if not value or not (value["bytes"] or value["path"]):
        raise UserError(f"{where} is empty: remove this row from the data set")
    try:
        with Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]) as image:
            return scale_image(image, where)
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
    return check_data(train, held_out, class_names or numbered_classes(train, held_out), source)


def load_folder(name: str, folder: Path, config: str) -> ImageData:
    """Decode a local folder that the `datasets` library reads.

    Raises:
        UserError: it does not, or finds no labelled images with a training and a test split.
    """
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


def load_hub(name: str, hub_id: str, config: str) -> ImageData:
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
