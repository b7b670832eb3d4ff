"""Which files below a folder are images, and processes that read them."""

import os
import pickle
import signal
import stat
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mnist_accel.cli import UserError

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
U = TypeVar("U")

# HEIC is what phones make; where no plug-in for it is installed, its rows say so.
IMAGE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".pcx", ".ico", ".heic", ".heif"),
)
# Files to a request: enough to make a pipe's cost small, few enough for a folder of photos to occupy all readers.
TOGETHER = 32
# Files that are read before they are asked for, as many as small files take while torch is imported (13 MB of digits).
AHEAD = 16_384
PROGRAM = "from mnist_accel.image_files import serve; serve()"


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
                    path = below + entry.name
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path + b"/")
                    elif readable(entry.name).lower().endswith(IMAGE_ENDINGS) and _may_read(entry):
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
        return True  # a dangling link: the user should see its row


def readable(path: bytes) -> str:
    """A path as text; bytes that are no UTF-8 are written as \\xNN."""
    return path.decode("utf-8", "backslashreplace")


class Seen(NamedTuple):
    """What reading a file gave: the digit, (28, 28) uint8, and the thumbnail where one is wanted; or the error."""

    path: str
    digit: "np.ndarray | None" = None
    picture: "np.ndarray | None" = None
    error: str | None = None


class Readers:
    """Processes that read images of a folder; as a context, it ends them.

    They are programs of their own, without torch: Python's lock would let threads wait for its import, and a file that
    crashes a decoder takes nothing with it but its own row.
    """

    def __init__(self, folder: Path, processes: int, as_is: bool = False) -> None:
        self._common = os.fsencode(folder), as_is
        self._ended = False
        self._pool = ThreadPoolExecutor(processes)  # a thread for each process, to wait for it
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []
        for _ in range(processes):
            self._start()

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._pool.shutdown()
        for process in self._all:
            process.communicate()

    def read(self, files: Iterable[tuple[bytes, bool]]) -> Iterator[Seen]:
        """What each file gave, in order, for paths below the folder and whether a thumbnail is wanted.

        The reading begins at once and goes up to AHEAD files ahead of what is asked for.
        """
        answers = in_order(self._pool, self._answer, grouped(files, TOGETHER), AHEAD // TOGETHER)
        return (seen for answer in answers for seen in answer)

    def _start(self) -> None:
        command = [sys.executable, "-P", "-c", PROGRAM]
        self._all.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self._idle.put(self._all[-1])

    def _answer(self, files: list[tuple[bytes, bool]]) -> list[Seen]:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((*self._common, files), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if process.wait() >= 0 or self._ended:
                raise RuntimeError("a process that reads images ended: its message is above") from error
        else:
            self._idle.put(process)
            return answer
        # A signal ended it: a decoder crashed, or the kernel wanted its memory. Which file was it?
        self._start()
        if len(files) == 1:
            return [Seen(readable(files[0][0]), error="reading it crashed the decoder or took all memory")]
        return [seen for file in files for seen in self._answer([file])]


def serve() -> None:
    """Answer the requests that come on stdin, on stdout, until stdin ends: the program of a reader's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
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
    iterator = iter(items)
    pending = deque(pool.submit(work, item) for item in islice(iterator, ahead))

    def results() -> Iterator[U]:
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(iterator, 1))
            yield result

    return results()
