"""Which files below a folder are images."""

import os
import stat
import sys
from pathlib import Path

from mnist_accel.cli import UserError

# HEIC is what phones make; Pillow does not read it without a plug-in, and its rows say so.
IMAGE_ENDINGS = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".pcx", ".ico", ".heic", ".heif"),
}


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
                    elif os.path.splitext(entry.name)[1].lower().decode("latin-1") in IMAGE_ENDINGS and _may_read(
                        entry
                    ):
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
