"""Whatever the `datasets` library reads, local folders and the Hub, as uint8 tensors; the Hub in bounded time."""

import io
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_accel.cli import UserError
from mnist_accel.data import SIZE, ImageData, Split, check_data, numbered_classes, scale_image
from mnist_accel.hub import impatient_hub, probe_hub, reason


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

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
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
    return reason(error)


# The Hub


def load_hub(name: str, hub_id: str, config: str) -> ImageData:
    """Download and decode a data set of the Hub, in bounded time whatever the Hub does.

    The `datasets` library alone waits up to 400 s for a Hub that accepts connections and never answers.
    """
    trouble = probe_hub("dataset", hub_id, "try ylecun/mnist, a folder, or digits")
    with impatient_hub(), _offline(bool(trouble)):
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


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Let `datasets` take what it has in its cache and ask the Hub for nothing, if `wanted`."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if wanted:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
