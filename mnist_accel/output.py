"""Write files that are complete or not there at all: rows of predictions, pictures, and whatever a run leaves."""

import csv
import errno
import glob
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
from PIL import Image

from mnist_accel.cli import UserError
from mnist_accel.image_files import grouped

# Parquet compresses and is read by groups of rows; this many take a few megabytes with all probabilities.
ROW_GROUP = 16_384


def check_output(output: str) -> None:
    """Raises UserError if predictions cannot be written to `output`: before the work, not after it."""
    if output == "-":
        return
    if Path(output).suffix.lower() not in WRITERS:
        raise UserError(f"cannot tell the format of {output}: its name should end in .csv, .jsonl or .parquet")
    check_writable(Path(output))


def check_writable(path: Path) -> None:
    """Raises UserError if there can be no file of this name."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: no folder {path.parent}; make it, or give another name")
    with writing(path):
        _refuse_write_protected(path)
        if path.is_file() or not path.exists():  # a pipe or a device is written to where it is
            tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))).close()


def _refuse_write_protected(path: Path) -> None:
    if path.exists() and not os.access(path, os.W_OK):  # a folder's rights are enough to replace it
        raise PermissionError(errno.EACCES, "it is write-protected", str(path))


@contextmanager
def writing(what: Path | str, way_on: str = "give another name") -> Iterator[None]:
    """Around what writes a file: where the operating system refuses that, it is a `UserError`."""
    try:
        yield
    except BrokenPipeError:  # whoever read it, a pipe, has gone
        raise
    except OSError as error:
        raise UserError(f"cannot write {what}: {error.strerror or error}; make room, or {way_on}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; flushed, it takes the place of `path` at the end; an error leaves nothing."""
    if path.exists() and not path.is_file():
        # A pipe or a device cannot be replaced, only written to.
        yield path
        return
    _refuse_write_protected(path)
    target, host = Path(os.path.realpath(path)), socket.gethostname()
    for left in target.parent.glob(f".{glob.escape(target.name)}.*@{glob.escape(host)}.tmp"):
        process = left.name.removesuffix(f"@{host}.tmp").rpartition(".")[2]
        if process.isdigit() and not psutil.pid_exists(int(process)):  # it was killed, on this host
            left.unlink(missing_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}@{host}.tmp")
    # SIGTERM raises, as Ctrl-C does. Only here: it must still end a process that waits inside torch for the others.
    unhandled = threading.current_thread() is threading.main_thread()
    unhandled = unhandled and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        if unhandled:
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        yield temporary
        with open(temporary, "rb+") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())
        os.replace(temporary, target)
        flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
        if unhandled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a loss of power."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """As `replacing`, in a folder that is made where it is missing; what the user can mend is a `UserError`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary


def picture_format(path: Path) -> str:
    """The format that a picture's name ends in; raises `UserError` where pictures cannot be written so."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"cannot write the picture {path}: its name should end in .png")
    return kind


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Write RGB pixels uint8 (H, W, 3) in the format of the name's ending; raises `UserError` where that fails."""
    kind = picture_format(path)
    with new_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format=kind)


def write_table(rows: Iterable[dict[str, Any]], output: str, columns: dict[str, type]) -> None:
    """Write rows to a .csv, .jsonl or .parquet file, or as CSV to stdout for `-`, as they come.

    A file appears under its name, in place of an older one, only when it is complete; a `UserError` where it cannot be
    written. Rows are column -> value, None for none, in the order of `columns`, which are name -> str, int or float.
    """
    if output == "-":
        _write_csv(rows, sys.stdout.fileno(), columns)
        return
    with new_file(Path(output)) as path:
        WRITERS[Path(output).suffix.lower()](rows, path, columns)


def _write_csv(rows: Iterable[dict[str, Any]], path: Path | int, columns: dict[str, type]) -> None:
    with open(path, "w", encoding="utf-8", newline="", closefd=not isinstance(path, int)) as file:
        # The writer quotes only those line ends that it uses itself, \r\n, and a name can hold a carriage return.
        plain_newlines: Any = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
        writer = csv.DictWriter(plain_newlines, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _write_jsonl(rows: Iterable[dict[str, Any]], path: Path | int, _: dict[str, type]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_parquet(rows: Iterable[dict[str, Any]], path: Path | int, columns: dict[str, type]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        for group in grouped(rows, ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(group, schema))


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
