"""A contact sheet: each image, what the network saw of it, its answer and the file's name."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mnist_accel.image_files import THUMBNAIL, Seen
from mnist_accel.output import write_picture

# The sheet shows this many images, from the first: more would not be looked at.
PICTURES = 200
COLUMNS = 10
IMAGE, GAP, LINE, NAME = THUMBNAIL, 4, 18, 13
PAPER, SURROUND, EDGE = "#ffffff", "#ececec", "#b8b8b8"
TEXT, FAINT, RIGHT, WRONG = "#222222", "#5f6368", "#2a7f3f", "#c0202a"


def draw_sheet(items: Sequence[tuple[Seen, int | None]], class_names: Sequence[str], path: Path) -> None:
    """Draw files that carry pictures, with their labels' indices where they are known, and write that to `path`."""
    width, height = 2 * IMAGE + 3 * GAP, IMAGE + LINE + NAME + 3 * GAP
    columns = max(1, min(COLUMNS, len(items)))
    rows = max(1, math.ceil(len(items) / columns))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), PAPER)
    names = [_drawable(name) for name in class_names]
    draw, font, small = ImageDraw.Draw(sheet), _font(13), _font(9)
    for i, (file, label) in enumerate(items):
        x, y = GAP + i % columns * width, GAP + i // columns * height
        right, line = x + 2 * IMAGE + GAP, y + IMAGE + 1
        assert file.picture is not None and file.digit is not None and file.prediction is not None
        picture = Image.fromarray(file.picture)
        draw.rectangle((x, y, x + IMAGE - 1, y + IMAGE - 1), fill=SURROUND)
        sheet.paste(picture, (x + (IMAGE - picture.width) // 2, y + (IMAGE - picture.height) // 2))
        draw.rectangle((x - 1, y - 1, x + IMAGE, y + IMAGE), outline=EDGE)  # where paper on paper begins
        digit = Image.fromarray(file.digit).resize((IMAGE, IMAGE), Image.Resampling.NEAREST)
        sheet.paste(digit, (x + IMAGE + GAP, y))
        answer, colour = names[file.prediction], TEXT if label is None else RIGHT
        if label not in (None, file.prediction):
            answer, colour = f"{answer}  not {names[label]}", WRONG
            draw.rectangle((x - 2, y - 2, right + 1, y + IMAGE + LINE + NAME + 2), outline=WRONG, width=2)
        confidence = f"{file.confidence:.0%}"
        draw.text((right, line), confidence, fill=FAINT, font=font, anchor="ra")
        room = right - x - 8 - draw.textlength(confidence, font)
        fitting = font if draw.textlength(answer, font) <= room else small
        while draw.textlength(answer, fitting) > room:
            answer = answer.removesuffix("…")[:-1] + "…"
        draw.text((x + 2, line), answer, fill=colour, font=fitting)
        name = _drawable(file.path.rpartition("/")[2])
        while draw.textlength(name, small) > right - x - 4:
            name = "…" + name.removeprefix("…")[1:]  # the end of a name tells files of a camera apart
        draw.text((x + 2, line + LINE), name, fill=FAINT, font=small)
    write_picture(np.asarray(sheet), path)


def _drawable(text: str) -> str:
    """The text on one line: no font draws what ends a line or controls a terminal, and Pillow can fail at it."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, as figures have it: Pillow's own font knows no accents, no Greek and no Cyrillic."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
