"""A folder of images -> a stream of rows, one per file in the order of paths -> a file."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mnist_accel import SHIPPED
from mnist_accel.cli import UserError, importing, launched_processes
from mnist_accel.image_files import Readers, Seen, find_images, grouped, in_order, readable, usable_cores
from mnist_accel.output import check_output, check_writable, picture_format, write_table
from mnist_accel.summary import Summary, label_of

# torch and what imports it stand inside functions here: reading images begins before.
if TYPE_CHECKING:
    import torch

    from mnist_accel.models import DigitClassifier

# The network always sees this many images, the last batch filled up with blanks: kernels round differently for
# different batch sizes, and the same folder must give the same file on any number of processes and threads.
BATCH_SIZE = 128


def predict_folder(
    folder: str | Path,
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

    The arguments are the options of scripts/predict_dir.py. Returns how many files, and folders of files, could not be
    read. Raises a `UserError` for a mistake in the arguments, before anything is written, and for a disk that fills up.
    """
    from mnist_accel.sheet import PICTURES, draw_sheet

    def check_and_list() -> tuple[list[bytes], int]:
        check_output(output)
        if sheet is not None:
            picture_format(sheet)
            check_writable(sheet)
        return find_images(folder, leaving_out=sheet)

    def read_share(paths: list[bytes], rank: int = 0, world: int = 1) -> Iterator[Seen]:
        """This rank's share of the files: every world-th batch, from the rank's on."""
        pictures = PICTURES if sheet else 0
        return readers.read([(path, i < pictures) for i, path in enumerate(paths) if i // BATCH_SIZE % world == rank])

    began = time.perf_counter()
    alone = launched_processes() == "1"
    workers = workers or max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    paths, skipped = check_and_list() if alone else ([], 0)
    with closing(Readers(folder, workers, as_is)) as readers, ThreadPoolExecutor(workers) as pool:
        # Importing torch takes longer than reading 10,000 digits, and a process alone knows by now what to read.
        files = read_share(paths)
        with importing():
            from accelerate.utils import broadcast_object_list

            from mnist_accel.distributed import build_accelerator, together
            from mnist_accel.models import load_model
        accelerator = build_accelerator()
        with together():
            if accelerator.is_main_process and not alone:
                paths, skipped = check_and_list()
        # All processes work through the list that the first one saw, whatever happens in the folder meanwhile.
        source, paths = broadcast_object_list([model or default_model(), paths])
        if not alone:
            files = read_share(paths, accelerator.process_index, accelerator.num_processes)
        with together():
            network = load_model(source)
            classes = network.class_names
            label = partial(label_of, folder=folder, source=labels, class_names=classes)
            if labels and all(label(readable(path)) is None for path in paths):
                wanted = "lies in a folder named" if labels == "folder" else "has a name that begins with"
                raise UserError(
                    f"--labels {labels}: none of {len(paths)} images {wanted} one of {', '.join(classes)}: rename "
                    "them, or leave --labels out"
                )
        mine = predict(network.to(accelerator.device), files, pool, accelerator.device, as_is and network.inverted)
        batches = gathered(mine, rounds=math.ceil(len(paths) / (BATCH_SIZE * accelerator.num_processes)))
        if not accelerator.is_main_process:
            return sum(row.error is not None for batch in batches for row in batch)

        out = sys.stderr if output == "-" else sys.stdout
        found = "shipped with mnist_accel" if source == SHIPPED else f"{source}, the newest run here"
        print(
            f"{_described(model or found, network, as_is)} on {accelerator.device}; {len(paths)} images",
            file=out,
            flush=True,
        )
        summary, rows = Summary(classes, label, began), chain.from_iterable(batches)
        progress = tqdm(rows, total=len(paths), unit=" images", disable=not sys.stderr.isatty())
        write_rows(map(summary.count, progress), output, classes, probabilities)
    print(summary.text(bool(labels)), file=out)
    if output != "-":
        print(f"predictions: {output}", file=out)
    if sheet is not None:
        draw_sheet(summary.shown, classes, sheet)
        cut = f" (the first {PICTURES} of {len(paths)} files)" if len(paths) > PICTURES else ""
        print(f"contact sheet: {sheet}{cut}", file=out)
    return summary.unreadable + skipped


def _described(model: str, network: "DigitClassifier", as_is: bool) -> str:
    """The model as a user should see it: that it tells digits apart is not worth a word, what may surprise is."""
    names, facts = network.class_names, [network.name]
    if not all(name.isdecimal() and len(name) == 1 for name in names):
        facts.append(f"of {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    if network.inverted and not as_is:
        facts.append("trained on dark-on-light files as they were: --as-is reads these so")
    return f"model: {model} ({'; '.join(facts)})"


def default_model() -> Path:
    """The newest runs/*/best below the current folder, runs on `digits` aside; else the weights in the package."""
    from mnist_accel.models import CONFIG_NAME, WEIGHTS_NAME

    newest = (0.0, SHIPPED)
    for best in Path("runs").glob("*/best"):
        try:
            written = (best / WEIGHTS_NAME).stat().st_mtime
            dataset = json.loads((best / CONFIG_NAME).read_text()).get("dataset")
        except (OSError, ValueError, AttributeError):
            continue
        if dataset != "digits":
            newest = max(newest, (written, best))
    return newest[1]


def predict(
    model: "DigitClassifier",
    files: Iterable[Seen],
    pool: ThreadPoolExecutor,
    device: "torch.device | str" = "cpu",
    invert: bool = False,
) -> Iterator[list[Seen]]:
    """Rows for the files, in their order, in lists of BATCH_SIZE; the model is in eval mode and on the device.

    With `invert` the model sees, and the rows hold, the digits' negatives. Each thread of the pool runs the network on
    one core: kernels round differently on different numbers of them.
    """
    import torch

    # On a CPU this memory format is three times as fast.
    model.to(memory_format=torch.channels_last)

    def classify(part: list[Seen]) -> list[Seen]:
        torch.set_num_threads(1)  # holds for this thread
        if invert:
            part = [file if file.digit is None else file._replace(digit=255 - file.digit) for file in part]
        images = np.zeros((BATCH_SIZE, 1, 28, 28), np.uint8)
        for image, file in zip(images, part, strict=False):
            if file.digit is not None:
                image[0] = file.digit
        with torch.inference_mode():
            batch = torch.from_numpy(images).to(device).float().div_(255).to(memory_format=torch.channels_last)
            logits = model(batch).double().cpu()
        shares = model.probabilities(logits).round(decimals=4)
        # Where there is nothing to see, every class is as likely.
        shares[torch.from_numpy(~images.any((1, 2, 3)))] = round(1 / logits.shape[1], 4)
        answers = zip(part, logits.argmax(1).tolist(), shares.tolist(), strict=False)
        return [
            file if file.error else file._replace(prediction=best, probabilities=tuple(each))
            for file, best, each in answers
        ]

    return in_order(pool, classify, grouped(files, BATCH_SIZE), ahead=4)


def gathered(batches: Iterator[list[Seen]], rounds: int) -> Iterator[list[Seen]]:
    """All processes' lists in their global order, on every process; a round takes one of each that has one left."""
    from accelerate.utils import gather_object

    for _ in range(rounds):
        yield from filter(None, gather_object([next(batches, [])]))


def write_rows(rows: Iterable[Seen], output: str, class_names: list[str], probabilities: bool) -> None:
    """Write rows as `write_table` does: path, prediction, confidence, error, and with `probabilities` p0, p1, ...

    The prediction is a class's name, and a number where all of them are numbers.
    """
    numbers = all(name.isdecimal() for name in class_names)
    answers: list[Any] = [int(name) for name in class_names] if numbers else class_names
    columns: dict[str, type] = {"path": str, "prediction": int if numbers else str, "confidence": float, "error": str}
    shares = [f"p{k}" for k in range(len(class_names))] if probabilities else []
    columns |= dict.fromkeys(shares, float)

    def values() -> Iterator[dict[str, Any]]:
        for row in rows:
            answer = None if row.prediction is None else answers[row.prediction]
            known = {"path": row.path, "prediction": answer, "confidence": row.confidence, "error": row.error}
            yield dict.fromkeys(columns) | known | dict(zip(shares, row.probabilities, strict=False))

    write_table(values(), output, columns)
