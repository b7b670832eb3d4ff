"""Any image of a handwritten digit -> 28x28 pixels as MNIST's makers would have made them.

MNIST's rule (LeCun et al., "Gradient-based learning applied to document recognition", 1998, III.A): the tight box
around the ink is scaled so that its longest side is 20 pixels, its aspect ratio kept, and set into 28x28 with its
centre of mass in the middle. What people have needs more first: find the paper and which side of it is ink, even out
the light, leave out frames, ruled lines, specks and the neighbours' strokes. All lengths here are relative to the
image, the digit or its stroke width, and all thresholds to the image's own contrast and noise: the same digit gives the
same result from a 16-pixel scan and from a 12-megapixel photo. Imports no torch.
"""

import os
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_accel.image_files import Seen, readable
from mnist_accel.ink import Ink, box_of, find_digit, fitted

SIDE, BOX = 28, 20
# What Pillow may try: pixels only. Its other decoders run Ghostscript on the file, or follow it to other files.
FORMATS = ["PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "PCX", "ICO", "HEIF"]
with suppress(ImportError):  # what phones make is read where this plug-in for Pillow is installed
    import pillow_heif

    pillow_heif.register_heif_opener()
Image.init()  # Pillow cannot be asked for formats that it has not loaded yet, and builds differ in what they have.
FORMATS = [name for name in FORMATS if name in Image.OPEN]
HEIC_STARTS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")}
# No image may unpack to more pixels: few cameras make more, and a few kilobytes can claim billions. (Larger JPEG files
# are fine: they are decoded at a reduced size.)
MAX_PIXELS = 100_000_000
# Larger images are reduced to this longest side when they are read: at that size a digit that fills a fifth of a
# page's width still has ten times the pixels that MNIST keeps.
READ_SIDE = 1024
# Longest side at which ink is looked for. Small scans are enlarged to the first so that a threshold follows their
# grey edges between pixels; photos are reduced to the second, which also averages their noise away.
SMALL_SIDE, LARGE_SIDE = 96, 224


class ImageError(ValueError):
    """A file that cannot be read as an image; its message is the reason, on one line."""


def read_digit(path: str | Path) -> np.ndarray:
    """The (28, 28) uint8 image, white ink on black, of an image file of a digit; all zeros if it shows no ink.

    Raises:
        ImageError: the file cannot be read, is no image, is truncated or damaged, or is too large.
    """
    return to_mnist(read_image(path))


def see(folder: bytes, path: bytes, as_is: bool, with_picture: bool) -> Seen:
    """What reading an image file gives; with `as_is` the digit is the whole image, only made grey and 28x28."""
    try:
        pixels = read_image(os.fsdecode(os.path.join(folder, path)))
        digit = resized(pixels) if as_is else to_mnist(pixels)
        return Seen(readable(path), digit, thumbnail(pixels) if with_picture else None)
    except ImageError as error:
        return Seen(readable(path), error=str(error))


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of an image file, (H, W), (H, W, 3) or (H, W, 4), uint8, or uint16 where it holds more than 8 bits.

    The content decides the format, not the file's name. The camera's orientation is applied, palettes and CMYK become
    RGB, an animation gives its first frame, and very large images are reduced to READ_SIDE.

    Raises:
        ImageError: the file cannot be read, is no image, is truncated or damaged, or is too large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _pixels(image)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("too large for this machine's memory") from error
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file makes them trip over: OSError, SyntaxError, struct.error,
        # zlib.error, ValueError, KeyError, IndexError, ... and a user's folder must be read to its end all the same.
        raise ImageError(_reason(error, path)) from error


def _reason(error: Exception, path: str | Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        with open(path, "rb") as file:
            if file.read(12)[4:] in HEIC_STARTS and "HEIF" not in FORMATS:
                return "a HEIC image: to read these, pip install pillow-heif"
        return "not an image, or of a format that is not supported"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels: a decompression bomb?"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"damaged image: {error or type(error).__name__}".split())[:200]


def _pixels(image: Image.Image) -> np.ndarray:
    # JPEG can be decoded at a half, a quarter or an eighth, at that fraction of the cost; others ignore this.
    image.draft(None, (READ_SIDE, READ_SIDE))
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"too many pixels ({image.width} x {image.height}): a decompression bomb?")
    image.load()
    if image.format != "PNG" or "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB", "RGBA"):
        return _reduced(np.asarray(image))
    if image.mode == "1":
        return _reduced(np.asarray(image.convert("L")))
    if image.mode.startswith("I") or image.mode == "F":
        # More than 8 bits, of unknown depth (12 bits in 16, floats in 0..1): the image's own range is what counts.
        wide = _reduced(np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)).astype(np.float64)
        low, high = wide.min(), wide.max()
        return np.rint((wide - low) * (65535 / max(high - low, 1e-30))).astype(np.uint16)
    transparent = image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info
    return _reduced(np.asarray(image.convert("RGBA" if transparent else "RGB")))


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """The same array, or one averaged down to READ_SIDE."""
    return pixels if max(pixels.shape[:2]) <= READ_SIDE else fitted(pixels, READ_SIDE)


def _in_unit_range(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1 or 3) float32 in 0..1, transparency laid over paper."""
    return _over_paper(pixels.astype(np.float32) / np.iinfo(pixels.dtype).max)


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def thumbnail(pixels: np.ndarray, side: int = 56) -> np.ndarray:
    """The image at `side` pixels on its longest side, (h, w, 3) uint8 RGB, transparency laid over paper."""
    values = _in_unit_range(pixels)
    small = fitted(values, side, how=cv2.INTER_AREA if max(values.shape[:2]) > side else cv2.INTER_NEAREST)
    return _as_bytes(cv2.cvtColor(small, cv2.COLOR_GRAY2RGB) if small.ndim == 2 else small)


def resized(pixels: np.ndarray) -> np.ndarray:
    """(28, 28) uint8: the whole image, made grey and squeezed to the network's size, and nothing else."""
    values = _in_unit_range(pixels)
    grey = values[..., 0] if values.shape[2] == 1 else cv2.cvtColor(values, cv2.COLOR_RGB2GRAY)
    return _as_bytes(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA))


def to_mnist(pixels: np.ndarray) -> np.ndarray:
    """A digit's image as MNIST's makers would have made it.

    Args:
        pixels: uint8 or uint16, (H, W) grey, (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGB and alpha; one digit in ink of
            any colour on paper of any other, light or dark.

    Returns:
        (28, 28) uint8, white ink on black. An image that already follows MNIST's rule comes back bit for bit (its
        negative as the positive); one in which no ink can be told from the paper comes back all zeros.

    Raises:
        ValueError: another shape or dtype.
    """
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ValueError(f"expected (H, W) or (H, W, C) of uint8 or uint16, not {pixels.shape} of {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4):
        raise ValueError(f"expected 1, 3 or 4 channels, not {pixels.shape[2]}")
    if pixels.shape[:2] == (SIDE, SIDE):
        grey = _exact_grey(pixels)
        if grey is not None:
            for candidate in (grey, 255 - grey):
                if follows_mnist_rule(candidate):
                    return candidate
    digit = _find(_one_channel(_in_unit_range(_reduced(pixels))))
    return np.zeros((SIDE, SIDE), np.uint8) if digit is None else _set_in_box(digit)


def _exact_grey(pixels: np.ndarray) -> np.ndarray | None:
    """The pixels as uint8 (H, W) where that loses nothing, else None."""
    if pixels.dtype == np.uint16:
        if (pixels % 257).any():
            return None
        pixels = (pixels // 257).astype(np.uint8)
    if pixels.ndim == 2:
        return pixels
    first = pixels[..., :1]
    grey = (pixels[..., :3] == first).all() and (pixels.shape[2] < 4 or (pixels[..., 3] == 255).all())
    return np.ascontiguousarray(pixels[..., 0]) if grey else None


def follows_mnist_rule(image: np.ndarray) -> bool:
    """Whether (28, 28) uint8 pixels are what MNIST's rule makes: a box of 20, peak ink, the centre in the middle."""
    if image.max() < 250:
        return False
    top, left, bottom, right = box_of(image > 0)
    # 19: faint ink at the box's end can round to zero.
    if max(bottom - top, right - left) not in (BOX - 1, BOX):
        return False
    for start, end, sums in ((top, bottom, image.sum(1)), (left, right, image.sum(0))):
        centre = float(sums @ (np.arange(SIDE) + 0.5)) / float(sums.sum())
        # int(15 - c) leaves the centre in [14, 15), unless the box met the edge before. The slack is MNIST's own.
        clamped = (start == 0 and centre >= 14.9) or (end == SIDE and centre < 14.1)
        if not (13.9 <= centre <= 15.1 or clamped):
            return False
    return True


def _over_paper(values: np.ndarray) -> np.ndarray:
    """(H, W, C) in 0..1 with an alpha channel laid over paper that its ink stands out from."""
    if values.ndim == 2:
        return values[..., None]
    if values.shape[2] != 4:
        return values
    colour, alpha = values[..., :3], values[..., 3:]
    if alpha.min() >= 0.999:
        return colour
    visible = colour[alpha[..., 0] > 0.5]
    if not len(visible):
        return np.zeros_like(colour[..., :1])
    if visible.mean(1).std() > 0.15:
        # Paper and ink are both there and something around them is cut away: the paper goes on.
        paper = np.median(visible, axis=0)
    else:
        paper = np.full(3, 0.0 if visible.mean() > 0.5 else 1.0, np.float32)
    return (colour * alpha + paper * (1 - alpha)).astype(np.float32)


def _one_channel(values: np.ndarray) -> np.ndarray:
    """(H, W) float32 in 0..1: the mix of the colours in which ink and paper differ most.

    That is the first principal component of the image less its blur: of strokes, not of slow changes of light. For grey
    images it is the grey, for blue ink mostly red, and red ink on a green as bright as it is not lost.
    """
    if values.shape[2] == 1:
        return values[..., 0]
    small = fitted(values, 128) if max(values.shape) > 128 else values
    reach = max(small.shape[:2]) // 4 * 2 + 1
    strokes = (small - cv2.blur(small, (reach, reach))).reshape(-1, 3)
    _, vectors = np.linalg.eigh(strokes.T.astype(np.float64) @ strokes)
    mix = vectors[:, -1] * (1.0 if vectors[:, -1].sum() >= 0 else -1.0)
    mixed = values @ (mix / np.abs(mix).sum()).astype(np.float32)
    # Negative weights (a difference of colours) move the range below 0: move it back.
    return np.clip(mixed + np.float32(-np.minimum(mix, 0).sum() / np.abs(mix).sum()), 0, 1)


def _find(grey: np.ndarray) -> Ink | None:
    """The digit's ink, looked for at a working size; a digit small in its image is looked at again, closer."""
    height, width = grey.shape
    # Below 40 pixels there is no room for a line beside the digit: such images are the size-normalised crops of
    # archives (USPS, Semeion, optdigits). Nor is there in a crop less than 0.6 as wide as it is high.
    tight = min(height, width) <= max(40, 0.6 * max(height, width))
    digit = _find_at_working_size(grey, tight)
    if digit is None:
        return None
    scale = max(height, width) / max(digit.strength.shape)
    top, left, bottom, right = digit.box
    longest = max(bottom - top, right - left)
    if longest >= SMALL_SIDE // 2 or scale <= 1.5:
        return digit
    margin = 0.5 * longest
    rows = slice(max(0, int((top - margin) * scale)), int((bottom + margin) * scale) + 1)
    columns = slice(max(0, int((left - margin) * scale)), int((right + margin) * scale) + 1)
    return _find_at_working_size(grey[rows, columns], False) or digit


def _find_at_working_size(grey: np.ndarray, tight: bool) -> Ink | None:
    height, width = grey.shape
    longest = max(height, width)
    if longest < SMALL_SIDE:
        factor = -(-SMALL_SIDE // longest)
        grey = cv2.resize(grey, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)
    elif longest > LARGE_SIDE:
        grey = fitted(grey, LARGE_SIDE)
    return find_digit(grey, tight)


def _set_in_box(digit: Ink) -> np.ndarray:
    """MNIST's last steps: the box to 20 by area average, peak ink to 255, the centre of mass to the middle."""
    top, left, bottom, right = digit.box
    small = fitted(digit.strength[top:bottom, left:right], BOX)
    small = small * (255.0 / max(float(small.max()), 1e-6))
    result = np.zeros((SIDE, SIDE), np.uint8)
    offsets = []
    for sums in (small.sum(1), small.sum(0)):
        centre = float(sums @ (np.arange(len(sums)) + 0.5)) / float(sums.sum())
        offsets.append(min(max(int(SIDE / 2 + 1 - centre), 0), SIDE - len(sums)))
    y, x = offsets
    result[y : y + small.shape[0], x : x + small.shape[1]] = np.rint(small)
    return result
