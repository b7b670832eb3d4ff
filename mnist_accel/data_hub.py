"""Folders that the `datasets` library reads, from the Hub or a user's own, as uint8 tensors."""

import glob
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_accel.cli import UserError
from mnist_accel.data import OWN_IMAGES, SIZE, ImageData, Split, check_data, scale_image
from mnist_accel.hub import reason

LABEL_NAMES = ("labels", "digit", "class", "target")


def load_folder(name: str, folder: Path, config: str) -> ImageData:
    """Decode a folder that the `datasets` library reads; `name` is for messages, `config` may be empty.

    Raises a `UserError` where there are no labelled images with a training and a test split.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are told below
    try:
        # Streaming reads the files where they are; `datasets` would copy them all into its own cache first.
        with tempfile.TemporaryDirectory() as locks:
            own = None if config else _files_by_split(folder)
            splits = datasets.load_dataset(str(folder), config or None, data_files=own, streaming=True, cache_dir=locks)
            test = "test" if "test" in splits else "validation"
            if "train" not in splits or test not in splits:
                raise UserError(
                    f"{name} has the splits {', '.join(splits)}, but 'train' and 'test' are needed: {OWN_IMAGES}"
                )
            image, label, class_names = _columns(splits["train"].features or {}, name)
            raw = splits.cast_column(image, datasets.Image(decode=False))
            train, held_out = (_read_split(raw[s], f"{name}'s {s} split", image, label) for s in ("train", test))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} cannot be read as a data set of images (NAME:CONFIG chooses one of several, `git lfs pull` gets "
            f"the files of a clone): {reason(error)}"
        ) from error
    return check_data(train, held_out, class_names, name if test == "test" else f"{name} (tested on validation)")


def _files_by_split(folder: Path) -> dict[str, list[str]] | None:
    """Which files of a user's folder are of which split, where each split has a folder.

    `datasets` looks for a split's name in the whole path, and a class may be called train. It takes a path for a
    pattern, and enters a link to a folder only where the pattern begins with it.
    """
    names = [split for split in ("train", "test", "validation") if (folder / split).is_dir()]
    if "train" not in names or len(names) < 2 or (folder / "README.md").exists():
        return None
    roots = {split: [folder / split, *filter(Path.is_symlink, sorted((folder / split).glob("*/")))] for split in names}
    return {split: [f"{glob.escape(str(path))}/**" for path in roots[split]] for split in names}


def _columns(features: dict[str, Any], name: str) -> tuple[str, str, list[str]]:
    """The image column, the label column and the class names (none without a ClassLabel) of a data set's features."""
    from datasets import ClassLabel, Image, Value

    image = [column for column, feature in features.items() if isinstance(feature, Image)]
    label = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    numbers = [column for column, f in features.items() if isinstance(f, Value) and "int" in f.dtype]
    if "label" in features:
        label = [column for column in (*label, *numbers) if column == "label"]
    elif not label:  # among several columns, any integer is as likely the row's number
        label = numbers if len(features) == 2 else [column for column in numbers if column in LABEL_NAMES]
    if len(image) != 1 or len(label) != 1:
        found = ", ".join(f"{column}: {getattr(f, 'dtype', type(f).__name__)}" for column, f in features.items())
        raise UserError(
            f"{name} has {len(image)} columns of images and {len(label)} of class labels ({found or 'unknown'}): "
            f"give one of each; parquet files say that a column is one where `datasets` wrote them; {OWN_IMAGES}"
        )
    return image[0], label[0], list(getattr(features[label[0]], "names", None) or [])


def _read_split(split: Any, name: str, image_column: str, label_column: str) -> Split:
    images: list[np.ndarray] = []
    labels: list[int] = []
    # In one thread: on images this small threads only wait for each other, and made it twice as slow.
    for batch in split.iter(batch_size=1024):
        count = len(images)
        images += [_decode(value, f"image {count + i} of {name}") for i, value in enumerate(batch[image_column])]
        # A row without a label is None, or -1 where the column is a ClassLabel.
        labels += [-1 if label is None else label for label in batch[label_column]]
    pixels = np.stack(images) if images else np.empty((0, SIZE, SIZE), np.uint8)
    return Split(torch.from_numpy(pixels), torch.tensor(labels, dtype=torch.int64))


def _decode(value: dict[str, Any] | None, where: str) -> np.ndarray:
    """One undecoded value of an image column, {"bytes": ..., "path": ...}, as uint8 (28, 28)."""
    from PIL import Image

    if not value or not (value["bytes"] or value["path"]):
        raise UserError(f"{where} is empty: remove this row from the data set")
    # For an image file of a folder, the path says which; inside parquet it is only a name, if anything.
    where = f"{where} ({value['path'] or 'unnamed'})"
    try:
        image = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"])
        image.load()
    except Exception as error:  # Pillow's decoders raise whatever comes on damaged bytes
        raise UserError(f"{where} is damaged or not an image: remove it") from error
    return scale_image(image, where)
