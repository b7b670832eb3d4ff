"""A folder of images -> a stream of rows, one per file in the order of paths -> a file."""

import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from mnist_accel.cli import UserError
from mnist_accel.distributed import build_accelerator, together, usable_cores
from mnist_accel.image_files import find_images, readable
from mnist_accel.images import SIDE, ImageError, read_image, resized, thumbnail, to_mnist
from mnist_accel.models import SHIPPED, WEIGHTS_NAME, DigitClassifier, load_model
from mnist_accel.output import check_output, write_table
from mnist_accel.sheet import PICTURES, check_sheet, draw_sheet
from mnist_accel.summary import Summary, label_of

T = TypeVar("T")
U = TypeVar("U")

# The network always sees this many images, the last batch filled up with blanks: kernels round differently for
# different batch sizes, and the same folder must give the same file on any number of processes and threads.
BATCH_SIZE = 128
READ_TOGETHER = 16


@dataclass(frozen=True)
class Row:
    """One file's answer. prediction is an index into the class names, None where the file could not be read."""

    path: str
    prediction: int | None
    probabilities: tuple[float, ...]
    error: str | None
    picture: np.ndarray | None = None
    seen: np.ndarray | None = None

    @property
    def confidence(self) -> float | None:
        return max(self.probabilities) if self.probabilities else None


# --- what is in them -------------------------------------------------------------------------------------------------


def predict(
    model: DigitClassifier,
    folder: Path,
    paths: Sequence[bytes],
    *,
    device: torch.device | str = "cpu",
    workers: int = 1,
    pictures: int = 0,
    as_is: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[Row]]:
    """Rows for the files, in their order, in lists of BATCH_SIZE; reads only a few batches ahead.

    Of several processes, each yields every world-th list, from its rank on.

    Args:
        model: in eval mode, on the device; on a CPU the memory format channels_last is three times as fast.
        folder: what the paths are relative to.
        device: where the model is.
        workers: threads that read images and run the network. Each runs it on one core.
        pictures: how many rows, from the first, carry the image and what the network saw.
        as_is: the images already look like the network's training images: only make them grey and 28x28.
        rank, world: this process and how many there are.
    """
    mine = ((i, path) for i, path in enumerate(paths) if i // BATCH_SIZE % world == rank)

    def read(part: list[tuple[int, bytes]]) -> list[tuple[bytes, Any, Any]]:
        return [
            (path, *_read(os.path.join(os.fsencode(folder), path), index < pictures, as_is)) for index, path in part
        ]

    def classify(part: list[tuple[bytes, Any, Any]]) -> list[Row]:
        return _classify(model, device, part)

    # Decoders, OpenCV and the network let go of Python's lock: these threads are the parallelism. Within each, one
    # core, also because kernels round differently on different numbers of cores.
    cv2.setNumThreads(1)
    # What is wrong with a file stands in its row; Pillow's remarks on what it could read all the same help nobody.
    warnings.filterwarnings("ignore", module="PIL")
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        parts = in_order(pool, read, grouped(mine, READ_TOGETHER), ahead=BATCH_SIZE // READ_TOGETHER + 4 * workers)
        images = (image for part in parts for image in part)
        yield from in_order(pool, classify, grouped(images, BATCH_SIZE), ahead=workers + 1)
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: bytes, with_picture: bool, as_is: bool) -> tuple[Any, Any]:
    """The (28, 28) uint8 digit or the ImageError, and the picture for the sheet."""
    try:
        pixels = read_image(os.fsdecode(path))
        digit = resized(pixels) if as_is else to_mnist(pixels)
        return digit, thumbnail(pixels) if with_picture else None
    except ImageError as error:
        return error, None


def _classify(model: DigitClassifier, device: torch.device | str, part: list[tuple[bytes, Any, Any]]) -> list[Row]:
    images = np.zeros((BATCH_SIZE, 1, SIDE, SIDE), np.uint8)
    for i, (_, digit, _) in enumerate(part):
        if not isinstance(digit, ImageError):
            images[i, 0] = digit
    with torch.inference_mode():
        batch = torch.from_numpy(images).to(device).float() / 255
        logits = model(batch.to(memory_format=torch.channels_last)).double().cpu()
    probabilities = model.probabilities(logits).round(decimals=4).numpy()
    # Where there is nothing to see, every class is as likely.
    probabilities[~images.any((1, 2, 3))] = round(1 / logits.shape[1], 4)
    answers = logits.argmax(1).tolist()
    return [
        Row(readable(path), None, (), str(digit))
        if isinstance(digit, ImageError)
        else Row(
            readable(path),
            answers[i],
            tuple(probabilities[i].tolist()),
            None,
            picture,
            digit if picture is not None else None,
        )
        for i, (path, digit, picture) in enumerate(part)
    ]


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last perhaps shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
    """work(item) for each item, in order, done in the pool at most `ahead` items early, which bounds its memory."""
    pending: deque[Any] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# --- the whole folder ------------------------------------------------------------------------------------------------


def predict_folder(
    folder: Path,
    *,
    model: str | None = None,
    output: str = "predictions.csv",
    probabilities: bool = False,
    sheet: Path | None = None,
    labels: str | None = None,
    workers: int | None = None,
    as_is: bool = False,
) -> int:
    """Predict all images of a folder, with all processes of the launch, and write the rows; print a summary.

    The arguments are the options of scripts/predict_dir.py.

    Returns:
        How many files could not be read.

    Raises:
        UserError: any mistake in the arguments, found before the work begins; a disk that fills up.
    """
    accelerator = build_accelerator()
    shared: list[Any] = [None, None]
    with together(accelerator):
        if accelerator.is_main_process:
            check_output(output)
            if sheet is not None:
                check_sheet(sheet)
            shared = [model or default_model(), find_images(folder, leaving_out=sheet)]
    # All processes work through the list that the first one saw, whatever happens in the folder meanwhile.
    source, paths = broadcast_object_list(shared)
    with together(accelerator):
        network = load_model(source)
        classes = network.class_names
        if labels and all(label_of(readable(path), folder, labels, classes) is None for path in paths):
            wanted = "lies in a folder named" if labels == "folder" else "has a name that begins with"
            raise UserError(f"--labels {labels}: none of {len(paths)} images {wanted} one of {', '.join(classes)}")
    if workers is None:
        workers = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    network.to(accelerator.device).to(memory_format=torch.channels_last)
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    pictures = PICTURES if sheet else 0
    batches = predict(
        network, folder, paths, device=accelerator.device, workers=workers, pictures=pictures, as_is=as_is, **place
    )
    batches = gathered(batches, -(-len(paths) // BATCH_SIZE), accelerator.num_processes)
    if not accelerator.is_main_process:
        return sum(row.error is not None for batch in batches for row in batch)

    out = sys.stderr if output == "-" else sys.stdout
    used = "shipped with mnist_accel" if source == SHIPPED else source
    print(f"model: {used} ({network.name}) on {accelerator.device}; {len(paths)} images", file=out, flush=True)
    summary, shown, began = Summary(classes), [], time.perf_counter()
    progress = tqdm(total=len(paths), unit=" images", disable=not sys.stderr.isatty())

    def counted() -> Iterator[Row]:
        for batch in batches:
            for row in batch:
                label = label_of(row.path, folder, labels, classes) if labels else None
                summary.add(row.prediction, row.confidence, label)
                if row.picture is not None:
                    shown.append((row, label))
                yield row
            progress.update(len(batch))

    with closing(batches), progress:
        write_rows(counted(), output, classes, probabilities)
    print(summary.text(time.perf_counter() - began, bool(labels)), file=out)
    if output != "-":
        print(f"predictions: {output}", file=out)
    if sheet is not None:
        draw_sheet(shown, classes, sheet)
        cut = f" (the first {pictures} of {len(paths)} files)" if len(paths) > pictures else ""
        print(f"contact sheet: {sheet}{cut}", file=out)
    return summary.unreadable


def write_rows(rows: Iterable[Row], output: str, class_names: list[str], probabilities: bool) -> None:
    """Write rows as `write_table` does: path, prediction, confidence, error, and with `probabilities` p0, p1, ...

    The prediction is a class's name, and a number where all of them are numbers.
    """
    numbers = all(name.isdecimal() for name in class_names)
    answers: list[Any] = [int(name) for name in class_names] if numbers else class_names
    columns: dict[str, type] = {"path": str, "prediction": int if numbers else str, "confidence": float, "error": str}
    if probabilities:
        columns |= {f"p{k}": float for k in range(len(class_names))}
    nothing = (None,) * len(class_names)

    def values(row: Row) -> list[Any]:
        answer = None if row.prediction is None else answers[row.prediction]
        more = row.probabilities or nothing if probabilities else ()
        return [row.path, answer, row.confidence, row.error, *more]

    write_table(map(values, rows), output, columns)


def gathered(batches: Iterator[list[Row]], count: int, world: int) -> Generator[list[Row], None, None]:
    """The lists of all processes in their global order, on every process, `count` in all.

    Whoever fails, or stops listening, tells the others at the next exchange, so that none waits for it.

    Raises:
        UserError: another process failed.
    """
    rounds = -(-count // world)
    for turn in range(rounds):
        try:
            mine = next(batches, [])
        except BaseException:
            gather_object([None])
            raise
        everyone = gather_object([mine])
        if any(rows is None for rows in everyone):
            raise UserError("another process could not go on: its message is above")
        try:
            yield from (rows for rows in everyone if rows)
        except BaseException:
            if turn + 1 < rounds:
                gather_object([None])
            raise


def default_model() -> Path:
    """The newest runs/*/best below the current folder, runs on `digits` aside; else the weights in the package."""
    newest = (0.0, SHIPPED)
    for best in Path("runs").glob("*/best"):
        try:
            written = (best / WEIGHTS_NAME).stat().st_mtime
            config = best.parent / "config.yaml"
            options = yaml.safe_load(config.read_text()) if config.is_file() else {}
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if not (isinstance(options, dict) and options.get("dataset") == "digits"):
            newest = max(newest, (written, best))
    return newest[1]
