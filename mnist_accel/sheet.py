"""A contact sheet: each image, what the network saw of it, and its answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from mnist_accel.cli import UserError
from mnist_accel.output import check_writable, replacing

if TYPE_CHECKING:
    from mnist_accel.predict import Row

# The sheet shows this many images, from the first: more would not be looked at.
PICTURES = 200
COLUMNS = 10
IMAGE, GAP, LINE = 56, 4, 18
PAPER, TEXT, FAINT, RIGHT, WRONG = "#ffffff", "#222222", "#8a8a8a", "#2a7f3f", "#c0202a"


def check_sheet(path: Path) -> None:
    """Raises UserError if no picture can be written under this name."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"cannot draw a sheet as {path}: its name should end in .png")
    check_writable(path)


def draw_sheet(items: Sequence[tuple["Row", int | None]], class_names: Sequence[str], path: Path) -> None:
    """Draw rows that carry pictures, with their labels' indices where they are known, and write the sheet to `path`."""
    cell_width, cell_height = 2 * IMAGE + 3 * GAP, IMAGE + LINE + 3 * GAP
    columns = max(1, min(COLUMNS, len(items)))
    rows = max(1, -(-len(items) // columns))
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (row, label) in enumerate(items):
        x, y = GAP + i % columns * cell_width, GAP + i // columns * cell_height
        assert row.file.picture is not None and row.file.digit is not None and row.prediction is not None
        picture = Image.fromarray(row.file.picture)
        draw.rectangle((x, y, x + IMAGE - 1, y + IMAGE - 1), fill="#ececec")
        sheet.paste(picture, (x + (IMAGE - picture.width) // 2, y + (IMAGE - picture.height) // 2))
        seen = Image.fromarray(row.file.digit).resize((IMAGE, IMAGE), Image.Resampling.NEAREST)
        sheet.paste(seen, (x + IMAGE + GAP, y))
        wrong = label is not None and label != row.prediction
        colour = TEXT if label is None else WRONG if wrong else RIGHT
        if wrong:
            draw.rectangle((x - 2, y - 2, x + 2 * IMAGE + GAP + 1, y + IMAGE + LINE + 2), outline=WRONG, width=2)
        answer = class_names[row.prediction]
        if wrong and label is not None:
            answer += f"  not {class_names[label]}"
        draw.text((x + 2, y + IMAGE + 1), answer, fill=colour, font=font)
        confidence = f"{row.confidence:.0%}"
        draw.text(
            (x + 2 * IMAGE + GAP - draw.textlength(confidence, font), y + IMAGE + 1), confidence, fill=FAINT, font=font
        )
    try:
        with replacing(path) as temporary:
            sheet.save(temporary, format={".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
