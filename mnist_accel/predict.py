"""A folder of images -> a stream of rows, one per file in the order of paths -> a file."""

import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from numpy.typing import NDArray
from tqdm import tqdm

from mnist_accel.cli import UserError
from mnist_accel.distributed import build_accelerator, together
from mnist_accel.images import SIDE, ImageError, read_image, resized, thumbnail, to_mnist
from mnist_accel.models import SHIPPED, WEIGHTS_NAME, DigitClassifier, load_model
from mnist_accel.output import check_output, write_table
from mnist_accel.sheet import PICTURES, check_sheet, draw_sheet

T = TypeVar("T")
U = TypeVar("U")

# HEIC is what phones make; Pillow does not read it without a plug-in, and its rows say so.
IMAGE_ENDINGS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .avif .jp2 .heic .heif".split()
)
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
    picture: NDArray[np.uint8] | None = None
    seen: NDArray[np.uint8] | None = None

    @property
    def confidence(self) -> float | None:
        return max(self.probabilities) if self.probabilities else None


# --- which files -----------------------------------------------------------------------------------------------------


def find_images(folder: Path, leaving_out: Path | None = None) -> list[bytes]:
    """The image files below a folder, by their endings: paths relative to it, `/` between parts, sorted.

    Hidden files and folders, links to folders (they can form loops), pipes, sockets and devices are left out; links to
    files are followed. A folder that cannot be read is named on stderr and left out, and so is the file `leaving_out`.

    Raises:
        UserError: no such folder, or no image in it.
    """
    root = os.fsencode(folder)
    if not os.path.isdir(root):
        raise UserError(f"no folder {folder}: give a folder of images")
    found: list[bytes] = []
    waiting = [b""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(os.path.join(root, below)) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    path = below + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path + b"/")
                    elif os.path.splitext(entry.name)[1].lower().decode("latin-1") in IMAGE_ENDINGS and _may_read(entry):
                        found.append(path)
        except OSError as error:
            if not below:
                raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error
            print(f"warning: skipped the folder {readable(below)}: {error.strerror}", file=sys.stderr)
    if leaving_out is not None and leaving_out.exists():
        found = [path for path in found if not os.path.samefile(os.path.join(root, path), leaving_out)]
    if not found:
        raise UserError(f"no images in {folder}: it should hold files such as .png or .jpg, in subfolders too")
    return sorted(found, key=readable)


def _may_read(entry: os.DirEntry[bytes]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        # A dangling link: the user should see its row.
        return True


def readable(path: bytes) -> str:
    """A path as text; bytes that are no UTF-8 are written as \\xNN."""
    return path.decode("utf-8", "backslashreplace")


# --- what is in them -------------------------------------------------------------------------------------------------


def predict(
    model: DigitClassifier,
    folder: Path,
    paths: Sequence[bytes],
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
        return [(path, *_read(os.path.join(os.fsencode(folder), path), index < pictures, as_is)) for index, path in part]

    def classify(part: list[tuple[bytes, Any, Any]]) -> list[Row]:
        return _classify(model, device, part)

    # Decoders and OpenCV let go of Python's lock, and so does the network: the threads are the parallelism. Within each,
    # one core: kernels also round differently on different numbers of threads.
    cv2.setNumThreads(1)
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
        logits = model(batch.to(memory_format=torch.channels_last)).double().cpu() / model.temperature
    probabilities = logits.softmax(1).round(decimals=4).numpy()
    # Where there is nothing to see, every class is as likely.
    probabilities[~images.any((1, 2, 3))] = round(1 / logits.shape[1], 4)
    answers = logits.argmax(1).tolist()
    return [
        Row(readable(path), None, (), str(digit))
        if isinstance(digit, ImageError)
        else Row(readable(path), answers[i], tuple(probabilities[i].tolist()), None, picture, digit if picture is not None else None)
        for i, (path, digit, picture) in enumerate(part)
    ]


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last perhaps shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
    """work(item) for each item, in order, done in the pool at most `ahead` items early: the memory it takes is bounded."""
    pending: deque[Any] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# --- the whole folder ------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What a user wants to know of all rows: counted as they pass."""

    class_names: list[str]
    answered: NDArray[np.int64]
    confusion: NDArray[np.int64]
    total_confidence: float = 0.0
    unreadable: int = 0
    unlabelled: int = 0

    @classmethod
    def of(cls, class_names: list[str]) -> "Summary":
        size = len(class_names)
        return cls(class_names, np.zeros(size, np.int64), np.zeros((size, size), np.int64))

    def add(self, row: Row, label: int | None) -> None:
        self.unlabelled += label is None
        if row.prediction is None or row.confidence is None:
            self.unreadable += 1
            return
        self.answered[row.prediction] += 1
        self.total_confidence += row.confidence
        if label is not None:
            self.confusion[label, row.prediction] += 1

    def text(self, seconds: float, labelled: bool) -> str:
        """Several lines: counts, mean confidence, unreadable files, speed; and with labels accuracy and confusion matrix."""
        read = int(self.answered.sum())
        counts = "  ".join(f"{name}: {n}" for name, n in zip(self.class_names, self.answered, strict=True))
        confidence = f", mean confidence {self.total_confidence / read:.3f}" if read else ""
        lines = [
            counts,
            f"{read} images read{confidence}, {self.unreadable} could not be read, "
            f"{(read + self.unreadable) / seconds:.0f} images/s",
        ]
        if labelled:
            right, known = int(np.trace(self.confusion)), int(self.confusion.sum())
            accuracy = f"{right}/{known} ({right / known:.2%})" if known else "none of the labelled images could be read"
            lines.append(f"Accuracy: {accuracy}" + (f", {self.unlabelled} without a label" if self.unlabelled else ""))
            width = max(5, *(len(name) + 1 for name in self.class_names), len(str(self.confusion.max())) + 1)
            lines.append("Confusion matrix (rows: label, columns: prediction)")
            lines.append(" " * width + "".join(name.rjust(width) for name in self.class_names))
            for name, counts_of in zip(self.class_names, self.confusion, strict=True):
                lines.append(name.rjust(width) + "".join(str(n).rjust(width) for n in counts_of))
        return "\n".join(lines)


def label_of(path: str, folder: Path, source: str, class_names: list[str]) -> int | None:
    """The index of a file's true class, from its parent folder's name or its own name's first character; None if none."""
    parts = path.split("/")
    if source == "name":
        name = parts[-1][:1]
    else:
        name = parts[-2] if len(parts) > 1 else folder.resolve().name
    return class_names.index(name) if name in class_names else None


def gathered(batches: Iterator[list[Row]], count: int, world: int) -> Iterator[list[Row]]:
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
    """The newest runs/*/best below the current folder, runs on `digits` aside; else the weights shipped in the package."""
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


def predict_folder(
    folder: Path,
    model: str | None = None,
    output: str = "predictions.csv",
    probabilities: bool = False,
    sheet: Path | None = None,
    labels: str | None = None,
    workers: int | None = None,
    as_is: bool = False,
) -> int:
    """Predict all images of a folder, with all processes of the launch, and write the rows; print a summary.

    Returns:
        How many files could not be read.

    Raises:
        UserError: any mistake in the arguments, found before the work begins; a disk that fills up.
    """
    accelerator = build_accelerator()
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    shared: list[Any] = [None, None]
    with together(accelerator):
        if accelerator.is_main_process:
            check_output(output)
            if sheet is not None:
                check_sheet(sheet)
            source = model or default_model()
            shared = [source, find_images(folder, leaving_out=sheet)]
    # All processes work through the list that the first one saw, whatever happens in the folder meanwhile.
    source, paths = broadcast_object_list(shared)
    with together(accelerator):
        network = load_model(source)
    classes = network.class_names
    truth: Callable[[str], int | None] = lambda path: label_of(path, folder, labels, classes) if labels else None
    if labels and all(truth(readable(path)) is None for path in paths):
        wanted = "lie in a folder named" if labels == "folder" else "have a name that begins with"
        raise UserError(f"--labels {labels}: none of the {len(paths)} images in {folder} {wanted} one of {', '.join(classes)}")
    out = sys.stderr if output == "-" else sys.stdout
    if accelerator.is_main_process:
        shipped = "shipped with mnist_accel" if source == SHIPPED else source
        print(f"model: {shipped} ({network.name}) on {accelerator.device}; {len(paths)} images", file=out, flush=True)

    summary, shown = Summary.of(classes), []
    began = time.perf_counter()
    batches = predict(
        network.to(accelerator.device, memory_format=torch.channels_last), folder, paths, accelerator.device, workers, PICTURES if sheet else 0, as_is,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    gathering = gathered(batches, -(-len(paths) // BATCH_SIZE), accelerator.num_processes)
    if not accelerator.is_main_process:
        return sum(row.error is not None for batch in gathering for row in batch)
    columns: dict[str, type] = {"path": str, "prediction": str, "confidence": float, "error": str}
    answers: list[Any] = list(classes)
    if all(name.isdecimal() for name in classes):
        columns["prediction"], answers = int, [int(name) for name in classes]
    if probabilities:
        columns |= {f"p{k}": float for k in range(len(classes))}

    def values() -> Iterator[list[Any]]:
        with closing(gathering), tqdm(total=len(paths), unit=" images", disable=not sys.stderr.isatty()) as progress:
            for batch in gathering:
                for row in batch:
                    label = truth(row.path)
                    summary.add(row, label)
                    if row.picture is not None:
                        shown.append((row, label))
                    answer = None if row.prediction is None else answers[row.prediction]
                    more = row.probabilities or (None,) * len(classes) if probabilities else ()
                    yield [row.path, answer, row.confidence, row.error, *more]
                progress.update(len(batch))

    with closing(values()) as rows:
        write_table(rows, output, columns)
    print(summary.text(time.perf_counter() - began, bool(labels)), file=out)
    if output != "-":
        print(f"predictions: {output}", file=out)
    if sheet is not None:
        draw_sheet(shown, classes, sheet)
        cut = f" (the first {len(shown)} of {len(paths)} images)" if len(paths) > PICTURES else ""
        print(f"contact sheet: {sheet}{cut}", file=out)
    return summary.unreadable
