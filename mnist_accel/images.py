"""Any image of a handwritten digit -> 28x28 pixels as MNIST's makers would have made them.

MNIST's rule (LeCun et al., "Gradient-based learning applied to document recognition", 1998, III.A): the tight box
around the ink is scaled so that its longest side is 20 pixels, its aspect ratio kept, and set into 28x28 with its
centre of mass in the middle. What people have needs more first: find the paper and which side of it is ink, even out
the light, leave out frames, ruled lines, specks and the neighbours' strokes. All lengths here are relative to the
image, the digit or its stroke width, and all thresholds to the image's own contrast and noise: the same digit gives the
same result from a 16-pixel scan and from a 12-megapixel photo. Imports no torch.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_accel.channels import one_channel, over_paper, saturation, without_margin
from mnist_accel.image_files import THUMBNAIL, Seen, readable
from mnist_accel.ink import (
    find_digit,
    find_digit_across,
    find_digit_of_crop,
    find_light_sheet,
    find_sheet,
    other_readings,
    upright,
)
from mnist_accel.paper import even_light, is_two_toned
from mnist_accel.parts import Grey, Parts, box_of, fitted, is_narrow, longest_side, reduced
from mnist_accel.second_look import clearest
from mnist_accel.strokes import Digit

SIDE, BOX = 28, 20
with suppress(ImportError):  # what phones make is read where this plug-in for Pillow is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit refuses the JPEG files of 200-megapixel phones too; MAX_PIXELS does not
Image.init()  # Pillow cannot be asked for formats that it has not loaded yet, and builds differ in what they have.
# What Pillow may try: pixels only. Its other decoders run Ghostscript on the file, or follow it to other files.
FORMATS = ["PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "PCX", "ICO", "HEIF"]
FORMATS = [name for name in FORMATS if name in Image.OPEN]
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# No image may unpack to more pixels: few cameras make more, and a few kilobytes can claim billions. (Larger JPEG files
# are fine: they are decoded at a reduced size.)
MAX_PIXELS = 100_000_000
# Larger images are reduced to this longest side when they are read: at that size a digit that fills a fifth of a
# page's width still has ten times the pixels that MNIST keeps.
READ_SIDE = 1024
# Longest side at which ink is looked for. Small scans are enlarged to the first so that a threshold follows their
# grey edges between pixels; photos are reduced to the second, which also averages their noise away.
SMALL_SIDE, LARGE_SIDE = 96, 224
SHEET_SIDE = 160  # that at which a sheet of paper is looked for


class ImageError(ValueError):
    """A file that cannot be read as an image; its message is the reason, on one line."""


def read_digit(path: str | Path) -> np.ndarray:
    """The (28, 28) uint8 image, white ink on black, of an image file of a digit; all zeros if it shows no ink.

    Raises what `read_image` does.
    """
    return to_mnist(read_image(path))


def see(folder: bytes, path: bytes, as_is: bool, with_picture: bool) -> Seen:
    """What reading an image file gives; with `as_is` the digit is the whole image, only made grey and 28x28."""
    try:
        pixels = read_image(os.fsdecode(os.path.join(folder, path)))
        digit = resized(pixels) if as_is else to_mnist(pixels)
        return Seen(readable(path), digit, thumbnail(pixels) if with_picture else None)
    except Exception as error:  # also of memory, or of a file that vanishes meanwhile: no other row is lost
        return Seen(readable(path), error=" ".join(str(error).split()) or type(error).__name__)


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of an image file, (H, W), (H, W, 3) or (H, W, 4), uint8, or uint16 where it holds more than 8 bits.

    The content decides the format, not the file's name. The camera's orientation is applied, palettes and CMYK become
    RGB, an animation gives its first frame, and very large images are reduced to READ_SIDE. An `ImageError` where the
    file cannot be read, is no image, is truncated or damaged, or is too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return decoded(image)
    except ImageError:
        raise
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file makes them trip over: OSError, SyntaxError, struct.error,
        # zlib.error, ValueError, KeyError, IndexError, ... and a user's folder must be read to its end all the same.
        raise ImageError(_reason(error, path)) from error


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, UnidentifiedImageError):
        with open(path, "rb") as file:
            start = file.read(12)
        if not start:
            return "an empty file"
        if start[4:8] == b"ftyp" and start[8:] in HEIC_BRANDS and "HEIF" not in FORMATS:
            return "a HEIC image: to read these, pip install pillow-heif"
        return "not an image, or of a format that is not supported"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"damaged image: {error or type(error).__name__}".split())[:200]


def decoded(image: Image.Image) -> np.ndarray:
    """The pixels of an opened image, as from `read_image`; raises what its decoder does, or `ImageError`."""
    # JPEG can be decoded at a half, a quarter or an eighth, at that fraction of the cost; others ignore this.
    image.draft(None, (READ_SIDE, READ_SIDE))
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"too many pixels ({image.width} x {image.height}): a decompression bomb?")
    image.load()
    if image.format != "PNG" or "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # More than 8 bits, of unknown depth (12 bits in 16, floats in 0..1): the image's own range is what counts.
        wide = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
        wide = reduced(wide, READ_SIDE).astype(np.float64)
        low, high = wide.min(), wide.max()
        return np.rint((wide - low) * (65535 / max(high - low, 1e-30))).astype(np.uint16)
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "RGBA"):
        transparent = image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "RGB")
    return reduced(np.asarray(image), READ_SIDE)


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """The image for a contact sheet, (h, w, 3) uint8 RGB, transparency laid over paper."""
    values = over_paper(pixels)
    shrinks = max(values.shape[:2]) > THUMBNAIL
    small = fitted(values, THUMBNAIL, how=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)
    return _as_bytes(cv2.cvtColor(small, cv2.COLOR_GRAY2RGB) if small.shape[2] == 1 else small)


def resized(pixels: np.ndarray) -> np.ndarray:
    """(28, 28) uint8: the whole image, made grey and squeezed to the network's size, and nothing else."""
    values = over_paper(pixels)
    grey = values[..., 0] if values.shape[2] == 1 else cv2.cvtColor(values, cv2.COLOR_RGB2GRAY)
    enlarged = min(grey.shape) < SIDE  # as training data is
    return _as_bytes(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC if enlarged else cv2.INTER_AREA))


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def to_mnist(pixels: np.ndarray, second_look: bool = True) -> np.ndarray:
    """A digit's image as MNIST's makers would have made it.

    Args:
        pixels: uint8 or uint16, (H, W) grey, (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGB and alpha; one digit in ink of
            any colour on paper of any other, light or dark.
        second_look: whether a photo in which the rules find no digit is read in other ways too (`second_look.py`).

    Returns:
        (28, 28) uint8, white ink on black. An image that already follows MNIST's rule comes back bit for bit (its
        negative as the positive); one in which no ink can be told from the paper comes back all zeros.

    Raises a `ValueError` for another shape or dtype.
    """
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ValueError(f"expected (H, W) or (H, W, C) of uint8 or uint16, not {pixels.shape} of {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        raise ValueError(f"expected 1, 3 or 4 channels, not {pixels.shape[2]}")
    made_so = _already_mnist(pixels)
    if made_so is not None:
        return made_so
    values = without_margin(over_paper(reduced(_as_before_enlarging(pixels), READ_SIDE)))
    digit = _find(values)
    first = np.zeros((SIDE, SIDE), np.uint8) if digit is None else _set_in_box(digit.strength)
    if not second_look or _is_tiny(values):
        return first
    # In a close crop the digit is large.
    across = find_digit_across(_at_working_size(one_channel(reduced(values, SMALL_SIDE))))
    wholes = [] if across is None else [_set_in_box(across.strength)]
    if digit is None:
        return clearest(first, wholes, [], [], []) if wholes else first
    if digit.with_fainter_strokes is not None:
        wholes.append(_set_in_box(digit.with_fainter_strokes))
    return clearest(first, wholes, _coloured(values), _parts_of(digit.strength), _other_readings(values))


def _as_before_enlarging(pixels: np.ndarray) -> np.ndarray:
    """The image at the size from which it was enlarged by repeating pixels, as coarse scans often are to be looked at.

    The edges of its large pixels would pass for those of strokes.
    """
    if (pixels[:1] != pixels[1:2]).any():  # so it is in a photo, whose other rows need not be compared
        return pixels
    sides = pixels, pixels.swapaxes(0, 1)
    within = tuple(range(1, pixels.ndim))
    changes = [np.flatnonzero((side[1:] != side[:-1]).any(within)) + 1 for side in sides]
    size = min(int(np.diff([0, *ends, len(side)]).min()) for ends, side in zip(changes, sides, strict=True))
    middles = []
    for ends, side in zip(changes, sides, strict=True):
        count = round(len(side) / size)
        factor = len(side) / count
        if (np.abs(ends - factor * np.rint(ends / factor)) >= 1).any():
            return pixels
        middles.append((factor * (np.arange(count) + 0.5)).astype(int))
    return pixels[np.ix_(*middles)]


def _parts_of(strength: Grey) -> Iterator[np.ndarray]:
    """The separate parts of what was found, (28, 28) uint8 each, specks aside."""
    parts = Parts(strength > 0.5)
    for part in np.flatnonzero(parts.area > 0.1 * parts.area.max()):
        yield _set_in_box(strength * parts.mask(part))


def _coloured(values: np.ndarray) -> Iterator[np.ndarray]:
    """What ink of more colour than the paper shows by itself, (28, 28) uint8, if there is any."""
    colour = _at_working_size(saturation(values))
    digit = find_digit(colour)
    if digit is not None and np.median(colour[digit.mask > 0]) > np.median(colour):
        yield _set_in_box(digit.strength)


def _other_readings(values: np.ndarray) -> Iterator[np.ndarray]:
    """What else an image may show than what `_find` sees in it, (28, 28) uint8 each, for `clearest` to choose from."""
    grey = one_channel(values)
    if is_two_toned(grey):
        return  # no shadow falls on a drawing
    for digit in (find_digit(_at_working_size(saturation(values))), *other_readings(_at_working_size(grey))):
        if digit is not None:
            yield _set_in_box(digit.strength)


def _is_tiny(values: np.ndarray) -> bool:
    """Whether there is room for a digit alone, as in the size-normalised crops of USPS, Semeion and optdigits."""
    return min(values.shape[:2]) <= 40


def _already_mnist(pixels: np.ndarray) -> np.ndarray | None:
    """The image or its negative where it follows MNIST's rule, and making it (28, 28) uint8 loses nothing."""
    if pixels.shape[:2] != (SIDE, SIDE):
        return None
    white = np.iinfo(pixels.dtype).max
    channels, step = pixels.reshape(SIDE, SIDE, -1), white // 255
    grey = channels[..., 0]
    if (channels[..., :3] != grey[..., None]).any() or (channels[..., 3:] != white).any() or (grey % step).any():
        return None
    grey = (grey // step).astype(np.uint8)
    return next((candidate for candidate in (grey, 255 - grey) if follows_mnist_rule(candidate)), None)


def follows_mnist_rule(image: np.ndarray) -> bool:
    """Whether (28, 28) uint8 pixels are what MNIST's rule makes: a box of 20, peak ink, the centre in the middle."""
    box = box_of(image)
    # 19: faint ink at the box's end can round to zero.
    if image.max() < 250 or max(image[box].shape) not in (BOX - 1, BOX):
        return False
    for extent, sums in zip(box, (image.sum(1), image.sum(0)), strict=True):
        # int(15 - c) leaves the centre in [14, 15), unless the box met the edge before. The slack is MNIST's own.
        centre = _centre(sums)
        clamped = (extent.start == 0 and centre >= 14.9) or (extent.stop == SIDE and centre < 14.1)
        if not (13.9 <= centre <= 15.1 or clamped):
            return False
    return True


def _centre(sums: np.ndarray) -> float:
    """The centre of mass, in pixels from the edge, of an image's sums over rows or columns."""
    return float(sums @ (np.arange(len(sums)) + 0.5)) / float(sums.sum())


def _find(values: np.ndarray) -> Digit | None:
    """The digit in (H, W, 1 or 3) float32; a sheet of paper on a desk is looked at alone."""
    grey = one_channel(values)
    if _is_tiny(values):
        return find_digit_of_crop(_at_working_size(grey), tiny=True)
    sheet = find_light_sheet(fitted(grey, SHEET_SIDE))
    on_sheet = None if sheet is None else _find(upright(values, sheet, max(grey.shape) / SHEET_SIDE))
    # A digit that the sheet's edge cuts lies in a patch of light.
    if on_sheet is not None and not Parts(on_sheet.strength > 0.5).at_edge().any():
        return on_sheet
    even = even_light(grey)
    digit = find_digit(_at_working_size(even))
    on_sheet = None if digit is None else _find_on_sheet(values, digit.strength)
    if on_sheet is not None:
        return on_sheet
    # A narrow image is a phone's photo, with paper around the digit, or else a close crop of a digit as narrow.
    if is_narrow(grey) and (digit is None or longest_side(digit.strength > 0.5) > 0.8 * max(digit.strength.shape)):
        as_crop = find_digit_of_crop(_at_working_size(grey), tiny=False)
        if as_crop is not None:
            return as_crop
    return None if digit is None else _seen_closer(digit, even)


def _seen_closer(digit: Digit, grey: Grey) -> Digit:
    """The digit as found in the whole image; one that is small in it as found in what lies around it alone."""
    extent = digit.strength if digit.with_fainter_strokes is None else digit.with_fainter_strokes
    scale = max(grey.shape) / max(extent.shape)
    box = box_of(extent > 0.5)
    longest = max(extent[box].shape)
    if longest >= SMALL_SIDE // 2 or scale <= 1.5:
        return digit
    rows, columns = (
        slice(max(0, int((ends.start - 0.5 * longest) * scale)), int((ends.stop + 0.5 * longest) * scale) + 1)
        for ends in box
    )
    closer = find_digit(_at_working_size(grey[rows, columns]))
    return digit if closer is None else closer


def _find_on_sheet(values: np.ndarray, strength: Grey) -> Digit | None:
    """The digit on the sheet of paper that was found instead of it, where that is so."""
    scale = max(values.shape[:2]) / max(strength.shape)
    for level in (0.5, 0.1):  # the fainter part of a sheet lies in a shadow
        sheet = find_sheet((strength > level).astype(np.uint8))
        found = None if sheet is None else _find(upright(values, sheet, scale))
        if found is not None:
            return found
    return None


def _at_working_size(grey: Grey) -> Grey:
    height, width = grey.shape
    factor = math.ceil(SMALL_SIDE / max(height, width))
    if factor > 1:
        grey = cv2.resize(grey, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)
    return reduced(grey, LARGE_SIDE)


def _set_in_box(strength: Grey) -> np.ndarray:
    """MNIST's last steps: the box to 20 by area average, peak ink to 255, the centre of mass to the middle."""
    small = fitted(strength[box_of(strength > 0.5)], BOX)
    return centred(small * (255.0 / float(small.max())))


def centred(box: np.ndarray) -> np.ndarray:
    """A box of at most 28x28 pixels in 0..255 set into (28, 28) uint8 so that its centre of mass is in the middle."""
    y, x = (min(max(int(SIDE / 2 + 1 - _centre(sums)), 0), SIDE - len(sums)) for sums in (box.sum(1), box.sum(0)))
    result = np.zeros((SIDE, SIDE), np.uint8)
    result[y : y + box.shape[0], x : x + box.shape[1]] = np.rint(box)
    return result
