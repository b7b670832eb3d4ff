"""Thousands of damaged files: each gives a digit or a reason of one line, within the time of a healthy file."""

import csv
import io
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_digits import draw, paint
from PIL import Image, UnidentifiedImageError

from mnist_accel import images
from mnist_accel.images import FORMATS, ImageError, read_digit, see
from mnist_accel.models import build_model, save_model
from mnist_accel.predict import predict_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

KINDS = [
    ("PNG", {}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}), ("WEBP", {}), ("PPM", {}), ("ICO", {}), ("PCX", {}), ("AVIF", {}),
    ("JPEG2000", {}),
]  # fmt: skip


def encoded(kind: str, options: dict) -> bytes:
    file = io.BytesIO()
    Image.fromarray(paint(draw(5, 64, 64))).save(file, kind, **options)
    return file.getvalue()


def damaged(data: bytes, random: np.random.Generator, way: int) -> bytes:
    content = bytearray(data)
    if way == 0:
        return bytes(content[: random.integers(0, len(content))])
    if way == 1:
        for _ in range(random.integers(1, 8)):
            content[random.integers(0, len(content))] ^= 1 << random.integers(0, 8)
    elif way == 2:
        for _ in range(random.integers(1, 8)):
            content[random.integers(0, min(len(content), 200))] = random.integers(0, 256)
    else:
        at = random.integers(0, len(content))
        content[at:at] = random.bytes(int(random.integers(1, 100)))
    return bytes(content)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_hundreds_of_damaged_files_of_each_format(kind, options, tmp_path: Path):
    if kind not in FORMATS:
        pytest.skip(f"this Pillow has no {kind}")
    random, whole, file = np.random.default_rng(0), encoded(kind, options), tmp_path / "x.png"
    file.write_bytes(whole)
    assert read_digit(file).any()
    reasons, slowest = 0, 0.0
    for i in range(240):
        file.write_bytes(damaged(whole, random, i % 4))
        began = time.process_time()
        try:
            digit = read_digit(file)
            assert digit.shape == (28, 28) and digit.dtype == np.uint8
        except ImageError as error:
            reasons += 1
            assert str(error) and "\n" not in str(error) and len(str(error)) <= 200
        slowest = max(slowest, time.process_time() - began)
    assert reasons >= 20, "damage goes unnoticed"
    assert slowest < 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_truncated_file_is_never_taken_for_a_whole_one(kind, tmp_path: Path):
    whole = encoded(kind, {})
    for share in (0.0, 0.1, 0.5, 0.9):
        (tmp_path / "x").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ImageError):
            read_digit(tmp_path / "x")


def test_a_folder_of_damaged_files_is_read_to_its_end(tmp_path: Path):
    folder, random = tmp_path / "images", np.random.default_rng(1)
    folder.mkdir()
    for i in range(300):
        whole = encoded(*KINDS[i % 5])
        content = random.bytes(200) if i % 3 == 0 else damaged(whole, random, i % 4) if i % 3 == 1 else whole
        (folder / f"{i:03}.png").write_bytes(content)
    save_model(build_model("mnist_net"), tmp_path / "model")
    unreadable = predict_folder(folder, model=str(tmp_path / "model"), output=str(tmp_path / "out.csv"))
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"{i:03}.png" for i in range(300)]
    assert all(bool(row["error"]) != bool(row["prediction"]) for row in rows)
    assert all(not row["error"] for row in rows[2::3])
    assert 100 <= unreadable == sum(bool(row["error"]) for row in rows)


def test_what_nobody_expected_of_a_file_costs_no_other_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "vanishes.png"
    file.write_bytes(b"half of a download")

    def identify(path: str, formats: list[str]):
        file.unlink()
        raise UnidentifiedImageError

    def no_memory(pixels: np.ndarray):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", identify)
        seen = see(bytes(tmp_path), b"vanishes.png", False, False)
    assert seen.path == "vanishes.png" and seen.digit is None and "No such file" in seen.error
    Image.new("L", (30, 30)).save(file)
    monkeypatch.setattr(images, "to_mnist", no_memory)
    assert see(bytes(tmp_path), b"vanishes.png", False, False).error == "MemoryError"
    monkeypatch.setattr(images, "to_mnist", lambda pixels: cv2.resize(pixels, (0, 0)))  # whose message ends a line
    assert "resize" in (reason := see(bytes(tmp_path), b"vanishes.png", False, False).error) and "\n" not in reason
