"""Which files below a folder are images, and processes that read them."""

import math
import os
import pickle
import stat
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple, TypeVar

import numpy as np

from mnist_accel.cli import UserError

T = TypeVar("T")
U = TypeVar("U")

# HEIC is what phones make; where no plug-in for it is installed, its rows say so.
IMAGE_ENDINGS = (
    *(b".png", b".jpg", b".jpeg", b".jpe", b".jfif", b".bmp", b".dib", b".gif", b".tif", b".tiff", b".webp"),
    *(b".ppm", b".pgm", b".pbm", b".pnm", b".avif", b".jp2", b".pcx", b".ico", b".heic", b".heif"),
)
THUMBNAIL = 56  # longest side, in pixels, of the picture of a file that a contact sheet shows
# Files to a request: enough to make a pipe's cost small, few enough for a folder of photos to occupy all readers.
TOGETHER = 32
# Files that are read before they are asked for, as many as small files take while torch is imported (13 MB of digits).
AHEAD = 16_384
PROGRAM = "from mnist_accel.image_files import serve; serve()"


def find_images(folder: str | Path, leaving_out: Path | None = None) -> tuple[list[bytes], int]:
    """The image files below a folder, by their endings: paths relative to it, `/` between parts, sorted.

    Also returns how many folders could not be read: each is named on stderr and left out. So are, without a word, the
    file `leaving_out`, hidden files and folders, links to folders (they can form loops), pipes, sockets and devices;
    links to files are followed. Raises a `UserError` where there is no such folder, or no image in it.
    """
    root = os.path.join(os.fsencode(folder), b"")
    if os.path.isfile(folder):
        raise UserError(f"{folder} is a file: give the folder that it is in")
    if not os.path.isdir(root):
        raise UserError(f"no folder {str(folder)!r}: give a folder of images")

    def passed_over(error: OSError) -> None:
        if error.filename == root:
            raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error
        skipped.append(error)
        below = readable(error.filename.removeprefix(root))
        print(f"warning: skipped the folder {below}/: {error.strerror}", file=sys.stderr)

    own = leaving_out.stat() if leaving_out is not None and leaving_out.exists() else None
    found: list[bytes] = []
    skipped: list[OSError] = []
    for parent, folders, files in os.walk(root, onerror=passed_over):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        for name in files:
            path = os.path.join(parent, name)
            if not name.startswith(b".") and name.lower().endswith(IMAGE_ENDINGS) and _wanted(path, own):
                found.append(path.removeprefix(root))
    if not found:
        raise UserError(f"no images in {folder}: it should hold files such as .png or .jpg, in subfolders too")
    return sorted(found, key=lambda path: (readable(path), path)), len(skipped)


def _wanted(path: bytes, leaving_out: os.stat_result | None) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return True  # a dangling link: the user should see its row
    return stat.S_ISREG(status.st_mode) and not (leaving_out and os.path.samestat(status, leaving_out))


def readable(path: bytes) -> str:
    """A path as text; bytes that are no UTF-8 are written as \\xNN."""
    return path.decode("utf-8", "backslashreplace")


class Seen(NamedTuple):
    """What is known of a file: at first the error, or the digit and a thumbnail where one is wanted; then the answer.

    The digit is (28, 28) uint8, the prediction the index of a class, the probabilities those of all classes.
    """

    path: str
    digit: np.ndarray | None = None
    picture: np.ndarray | None = None
    error: str | None = None
    prediction: int | None = None
    probabilities: tuple[float, ...] = ()

    @property
    def confidence(self) -> float | None:
        """The highest probability; None without an answer."""
        return max(self.probabilities, default=None)


class Readers:
    """Processes that read images of a folder, started as they are needed, until `close` ends them.

    They are programs of their own, without torch: Python's lock would let threads wait for its import, and a file that
    crashes a decoder takes nothing with it but its own row.
    """

    def __init__(self, folder: str | Path, processes: int, as_is: bool = False) -> None:
        self._common = os.fsencode(folder), as_is
        self._ended = False
        # Of this moment: imports change the environment while a thread starts a process, which then got half of it.
        self._environment = os.environ.copy()
        self._processes = processes
        self._pool = ThreadPoolExecutor(processes)  # a thread for each process, to wait for it
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []

    def close(self) -> None:
        self._ended = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._pool.shutdown()
        for process in self._all:
            process.communicate()

    def read(self, files: Sequence[tuple[bytes, bool]]) -> Iterator[Seen]:
        """What each file gave, in order, for paths below the folder and whether a thumbnail is wanted.

        The reading begins at once and goes up to AHEAD files ahead of what is asked for.
        """
        together = max(1, min(TOGETHER, math.ceil(len(files) / self._processes)))  # few large photos: for each a reader
        return chain.from_iterable(in_order(self._pool, self._answer, grouped(files, together), AHEAD // together))

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-c", PROGRAM]
        pipe = subprocess.PIPE
        # In a group of its own: Ctrl-C is for the process that asks.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=self._environment, process_group=0)
        self._all.append(process)
        return process

    def _answer(self, files: list[tuple[bytes, bool]]) -> list[Seen]:
        try:
            process = self._idle.get_nowait()
        except Empty:  # as many threads come here as there may be processes
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((*self._common, files), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
            self._idle.put(process)
            return answer
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if process.wait() >= 0 or self._ended:
                raise RuntimeError("a process that reads images ended: its message is above") from error
        # A signal ended it: a decoder crashed, or the kernel wanted its memory. Which file was it?
        if len(files) == 1:
            return [Seen(readable(files[0][0]), error="reading it crashed the decoder or took all memory")]
        return [seen for file in files for seen in self._answer([file])]


def serve() -> None:
    """Answer the requests that come on stdin, on stdout, until stdin ends: the program of a reader's process."""
    if hasattr(os, "nice"):  # not on Windows
        os.nice(5)  # importing torch, and then the network, is what everything waits for
    import cv2

    from mnist_accel.images import see

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between them
    cv2.setNumThreads(1)  # the processes are the parallelism
    # What is wrong with a file stands in its row; Pillow's remarks on what it could read all the same help nobody.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        while True:
            folder, as_is, files = pickle.load(sys.stdin.buffer)
            pickle.dump([see(folder, path, as_is, with_picture) for path, with_picture in files], answers)
            answers.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # who asked has gone


def usable_cores() -> int:
    """The logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last perhaps shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], U], items: Iterable[T], ahead: int) -> Iterator[U]:
    """work(item) for each item, in order; begins at once, and is at most `ahead` items ahead, which bounds memory."""
    submitted = (pool.submit(work, item) for item in items)
    pending = deque(islice(submitted, ahead))

    def results() -> Iterator[U]:
        while pending:
            result = pending.popleft().result()
            pending.extend(islice(submitted, 1))
            yield result

    return results()
