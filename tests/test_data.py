"""Loading from folders, IDX files and the embedded set: what comes out, what is cached, what is refused."""

import gzip
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file

from mnist_accel import data
from mnist_accel.cli import UserError
from mnist_accel.data import ImageData, load_data


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pictures(count: int, seed: int = 0, size: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, (count, size, size), dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, train: np.ndarray, test: np.ndarray, spelling: str = "-", zipped: bool = False) -> Path:
    """Four IDX files; labels count 0, 1, 2, 0, 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, images in (("train", train), ("t10k", test)):
        for kind, array in (("images", images), ("labels", np.arange(len(images)) % 3)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{kind}{spelling}idx{array.ndim}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


def write_parquet(
    folder: Path,
    splits: dict[str, np.ndarray],
    names: list[str] | None = None,
    labels: Callable[[int], Any] = lambda i: i % 3,
    encode: Callable[[Image.Image], Any] = lambda image: image,
) -> Path:
    """A folder as on the Hub; the label column is a ClassLabel if there are names, else plain integers."""
    import datasets

    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(image=datasets.Image(), label=label)
    for split, images in splits.items():
        rows = {"image": [encode(Image.fromarray(i)) for i in images], "label": [labels(i) for i in range(len(images))]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def write_columns(folder: Path, columns: dict[str, str]) -> Path:
    """A folder of three images a split, with columns of texts or numbers, which of type int8 are 2, 1, 0."""
    import datasets

    features = datasets.Features({"image": datasets.Image()} | {n: datasets.Value(k) for n, k in columns.items()})
    (folder / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows: dict[str, list] = {"image": [Image.fromarray(pixels) for pixels in pictures(3)]}
        rows |= {n: {"string": ["0", "1", "2"], "int8": [2, 1, 0]}.get(kind, [0, 1, 2]) for n, kind in columns.items()}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def same(one: ImageData, other: ImageData) -> bool:
    return all(
        torch.equal(getattr(getattr(one, split), kind), getattr(getattr(other, split), kind))
        for split in ("train", "test")
        for kind in ("images", "labels")
    )


# The embedded set


def test_the_embedded_digits_are_1797_images_split_the_same_way_every_time_and_by_class() -> None:
    first, second = load_data("digits"), load_data("digits")
    assert len(first.train.images) + len(first.test.images) == 1797
    assert first.fingerprint == second.fingerprint
    assert same(first, second)
    assert first.class_names == [str(digit) for digit in range(10)]
    counts = torch.bincount(first.test.labels)
    assert counts.min() >= 34 and counts.max() <= 36


def test_the_embedded_digits_are_placed_as_mnist_places_its_own() -> None:
    digits = load_data("digits").train
    assert digits.images.dtype == torch.uint8 and digits.images.shape[1:] == (28, 28)
    assert digits.labels.dtype == torch.int64
    assert (digits.images.amax(dim=(1, 2)) == 255).all()
    mass = digits.images.double()
    centres = torch.arange(28) + 0.5
    down = (mass.sum(dim=2) @ centres.double()) / mass.sum(dim=(1, 2))
    across = (mass.sum(dim=1) @ centres.double()) / mass.sum(dim=(1, 2))
    assert ((down - 14.5).abs() <= 0.51).all()
    assert ((across - 14.5).abs() <= 0.51).all()
    rows = (digits.images > 0).any(dim=2).sum(dim=1)
    assert rows.max() <= 20


def test_the_embedded_digits_need_no_cache(home: Path) -> None:
    load_data("digits")
    assert not home.exists()


# IDX files


@pytest.mark.parametrize(
    ("spelling", "zipped", "below"), [("-", False, ""), (".", False, ""), ("-", True, "MNIST/raw")]
)
def test_idx_files_are_read_in_all_their_spellings(tmp_path: Path, spelling: str, zipped: bool, below: str) -> None:
    train, test = pictures(7), pictures(5, seed=1)
    write_idx(tmp_path / "idx" / below, train, test, spelling, zipped)
    loaded = load_data(str(tmp_path / "idx"))
    assert torch.equal(loaded.train.images, torch.from_numpy(train))
    assert torch.equal(loaded.test.images, torch.from_numpy(test))
    assert loaded.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert loaded.class_names == ["0", "1", "2"]


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", pictures(3), pictures(3))
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"lacks t10k-labels-idx1-ubyte"):
        load_data(str(folder))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read"),
        (b"\0\0\x08\x01" + bytes(20), "not a whole IDX file"),
        (idx_bytes(pictures(3))[:-1], "not a whole IDX file"),
        (idx_bytes(pictures(3)) + b"x", "not a whole IDX file"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "not a whole IDX file"),
        (idx_bytes(pictures(4)), "4 images, its label file 3 labels"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    folder = write_idx(tmp_path / "idx", pictures(3), pictures(3))
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.*{complaint}"):
        load_data(str(folder))


def test_a_cut_off_gzip_file_is_named(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", pictures(3), pictures(3), zipped=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz cannot be read"):
        load_data(str(folder))


# Folders that the datasets library reads


def test_parquet_and_idx_of_the_same_images_are_the_same_data_with_the_same_fingerprint(tmp_path: Path) -> None:
    splits = {"train": pictures(7), "test": pictures(5, seed=1)}
    parquet = load_data(str(write_parquet(tmp_path / "parquet", splits, ["0", "1", "2"])))
    idx = load_data(str(write_idx(tmp_path / "idx", splits["train"], splits["test"])))
    assert same(parquet, idx)
    assert parquet.fingerprint == idx.fingerprint
    named = load_data(str(write_parquet(tmp_path / "named", splits, ["shirt", "shoe", "bag"])))
    assert named.class_names == ["shirt", "shoe", "bag"]
    assert named.fingerprint != idx.fingerprint


def test_integer_labels_without_names_become_numbered_classes(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "plain", {"train": pictures(6), "test": pictures(6)})
    assert load_data(str(folder)).class_names == ["0", "1", "2"]


def test_a_folder_of_image_files_has_the_names_of_its_folders_as_classes(tmp_path: Path) -> None:
    image = pictures(1)[0]
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            path = tmp_path / "files" / split / name / "picture.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(image).save(path)
    loaded = load_data(str(tmp_path / "files"))
    assert loaded.class_names == ["cat", "dog"]
    assert torch.equal(loaded.train.images, torch.from_numpy(np.stack([image, image])))
    assert sorted(loaded.test.labels.tolist()) == [0, 1]


def test_larger_and_coloured_square_images_are_averaged_to_grey_28x28(tmp_path: Path) -> None:
    checks = np.zeros((2, 56, 56), np.uint8)
    checks[:, ::2, ::2] = checks[:, 1::2, 1::2] = 200  # half of the pixels of every 2x2 block
    folder = write_parquet(
        tmp_path / "large", {"train": checks, "test": checks}, encode=lambda image: image.convert("RGB")
    )
    images = load_data(str(folder)).train.images
    assert images.shape == (2, 28, 28)
    assert (images.int() - 100).abs().max() <= 1


def test_photos_that_the_camera_stored_turned_are_turned_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            picture = Image.fromarray(np.triu(np.full((28, 28), 250, np.uint8)))
            picture.save(folder / "0.jpg", exif=turned, quality=95)
    seen = load_data(str(tmp_path / "set")).train.images[0].numpy().astype(int)
    assert np.abs(seen - np.rot90(np.triu(np.full((28, 28), 250)), -1)).mean() < 10


@pytest.mark.parametrize(
    "columns",
    [{"id": "int64", "label": "string"}, {"digit": "string", "writer": "int32"}, {"id": "int64", "n": "int8"}],
)
def test_a_number_that_may_be_anything_is_not_taken_for_the_label(tmp_path: Path, columns: dict[str, str]) -> None:
    with pytest.raises(UserError, match="1 columns of images and 0 of class labels"):
        load_data(str(write_columns(tmp_path / "set", columns)))


@pytest.mark.parametrize("name", ["label", "labels", "digit", "class", "target"])
def test_a_number_that_is_called_a_label_is_one_beside_others(tmp_path: Path, name: str) -> None:
    data = load_data(str(write_columns(tmp_path / "set", {"id": "int64", name: "int8"})))
    assert data.train.labels.tolist() == [2, 1, 0]


def test_classes_may_have_the_names_of_splits(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 4)):
        for name in ("car", "test", "train"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for index, pixels in enumerate(pictures(count)):
                Image.fromarray(pixels).save(folder / f"{index}.png")
    data = load_data(str(tmp_path / "set"))
    assert data.class_names == ["car", "test", "train"]
    assert (data.train.labels.bincount().tolist(), data.test.labels.bincount().tolist()) == ([6] * 3, [4] * 3)


def write_classes(folder: Path, count: int) -> None:
    for name in ("0", "1"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index, pixels in enumerate(pictures(count)):
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_own_images_that_lie_elsewhere_than_in_folders_of_classes_are_told_where_to_lie(tmp_path: Path) -> None:
    for name in ("stray", "single", "flat"):
        for split in ("train", "test"):
            write_classes(tmp_path / name / split, 2)
            if name != "stray":
                shutil.rmtree(tmp_path / name / split / "1")
            if name != "single":
                (tmp_path / name / split / "0" / "0.png").rename(tmp_path / name / split / "0.png")
            if name == "flat":
                shutil.rmtree(tmp_path / name / split / "0")
        with pytest.raises(UserError, match="of your own images each lies in train/CLASS/ or test/CLASS/, of two"):
            load_data(str(tmp_path / name))


def test_an_own_image_that_cannot_be_used_is_named_by_its_path(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_classes(tmp_path / split, 2)
    Image.new("L", (28, 20)).save(tmp_path / "train" / "1" / "1.png")
    with pytest.raises(UserError, match=r"train/1/1\.png\) is 28x20: crop or pad it to a square"):
        load_data(str(tmp_path))


def test_a_folder_may_have_a_name_like_a_pattern(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_classes(tmp_path / "mine [1]*?:2" / split, 2)
    assert len(load_data(str(tmp_path / "mine [1]*?:2")).train.images) == 4


def test_classes_may_be_links_to_folders_whose_changes_are_seen(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_classes(tmp_path / "set" / split, 2)
    (tmp_path / "set" / "train" / "1").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "train" / "1").symlink_to(tmp_path / "elsewhere")
    assert load_data(str(tmp_path / "set")).train.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "elsewhere" / "0.png").unlink()
    assert load_data(str(tmp_path / "set")).train.labels.tolist() == [0, 0, 1]


def test_dark_ink_on_light_paper_is_inverted_in_both_splits_and_said_so(tmp_path: Path) -> None:
    train, test = pictures(6), pictures(4, seed=1)
    dark = write_parquet(tmp_path / "dark", {"train": 255 - train, "test": 255 - test})
    loaded = load_data(str(dark))
    assert torch.equal(loaded.train.images, torch.from_numpy(train))
    assert torch.equal(loaded.test.images, torch.from_numpy(test))
    from_cache = load_data(str(dark))
    for each in (loaded, from_cache):
        assert "inverted" in each.source and each.inverted


def test_a_validation_split_stands_in_for_a_missing_test_split_and_is_said_so(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "set", {"train": pictures(6), "validation": pictures(4, seed=1)})
    loaded = load_data(str(folder))
    assert torch.equal(loaded.test.images, torch.from_numpy(pictures(4, seed=1)))
    assert "validation" in loaded.source
    three = {"train": pictures(6), "validation": pictures(4, seed=1), "test": pictures(5, seed=2)}
    assert torch.equal(
        load_data(str(write_parquet(tmp_path / "all", three))).test.images, torch.from_numpy(three["test"])
    )


def test_one_of_several_configurations_is_chosen_after_a_colon(tmp_path: Path) -> None:
    for config, count in (("letters", 4), ("numbers", 5)):
        write_parquet(tmp_path / "set" / config, {"train": pictures(count), "test": pictures(3)})
    lines = ["---", "configs:"]
    for config in ("letters", "numbers"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {config}/data/{split}-*"]
    (tmp_path / "set" / "README.md").write_text("\n".join([*lines, "---", ""]))
    assert len(load_data(f"{tmp_path / 'set'}:numbers").train.images) == 5
    assert len(load_data(f"{tmp_path / 'set'}:letters").train.images) == 4
    with pytest.raises(UserError, match=r"NAME:CONFIG.*letters.*numbers"):
        load_data(str(tmp_path / "set"))


def broken_png(image: Image.Image) -> dict[str, Any]:
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"nothing", "path": "x.png"}


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.full((28, 28), 40000, np.uint16))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"labels": lambda i: -1}, r"has images without a label"),
        ({"labels": lambda i: None}, r"has images without a label"),
        ({"encode": broken_png}, r"image 0 of .*train split \(x.png\) is damaged"),
        ({"encode": lambda image: None}, r"image 0 of .*train split is empty"),
        ({"encode": lambda image: image.resize((28, 20))}, r"is 28x20: crop or pad it to a square"),
        ({"encode": sixteen_bits}, r"more than 8 bits"),
    ],
)
def test_images_and_labels_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    folder = write_parquet(tmp_path / "bad", {"train": pictures(2), "test": pictures(2)}, ["a", "b", "c"], **options)
    with pytest.raises(UserError, match=complaint) as caught:
        load_data(str(folder))
    assert "\n" not in str(caught.value)


def test_integer_labels_above_the_class_names_are_refused() -> None:
    split = data.Split(torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([0, 3]))
    with pytest.raises(UserError, match=r"labels from 0 to 3, but 3 classes \(0 to 2\)"):
        data.check_data(split, split, ["a", "b", "c"], "here")


def test_a_class_whose_name_no_file_can_record_is_refused() -> None:
    split = data.Split(torch.zeros(2, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="not in UTF-8: give it another name"):
        data.check_data(split, split, ["a", os.fsdecode(b"b\xff")], "here")


@pytest.mark.parametrize(
    ("splits", "complaint"),
    [
        (
            {"train": 3},
            "the splits train, but 'train' and 'test' are needed: of your own images each lies in train/CLASS/",
        ),
        ({"test": 3}, "has the splits test, but"),
        ({"train": 3, "test": 0}, "has no test images"),
    ],
)
def test_a_missing_or_empty_split_is_named(tmp_path: Path, splits: dict[str, int], complaint: str) -> None:
    folder = write_parquet(tmp_path / "set", {split: pictures(count) for split, count in splits.items()})
    with pytest.raises(UserError, match=complaint):
        load_data(str(folder))


def test_folders_without_images_and_names_of_nothing_are_refused(tmp_path: Path) -> None:
    empty, text, table = tmp_path / "empty", tmp_path / "text", tmp_path / "table"
    for folder in (empty, text, table):
        folder.mkdir()
    (text / "notes.xyz").write_text("no data")
    for split in ("train", "test"):
        (table / f"{split}.csv").write_text("a,b\n1,2\n")
    for name, complaint in (
        (str(empty), "no data files"),
        (str(text), "cannot be read as a data set"),
        (str(table), "has 0 columns of images and 0 of class labels"),
        (str(tmp_path / "missing"), "no folder"),
        (str(table / "train.csv"), "is a file: give the folder"),
        ("./missing", "no folder"),
        ("~nobody/missing", "no folder"),
        ("", "no folder"),
    ):
        with pytest.raises(UserError, match=complaint) as caught:
            load_data(name)
        assert "\n" not in str(caught.value)


# The cache


def cache_files(home: Path) -> list[Path]:
    return sorted((home / "mnist_accel").glob("*.safetensors"))


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    return write_idx(tmp_path / "idx", pictures(6), pictures(4, seed=1))


def test_a_second_load_comes_from_one_safetensors_file_and_decodes_nothing(
    idx: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_data(str(idx))
    (file,) = cache_files(home)
    assert load_file(file).keys() == {"train_images", "train_labels", "test_images", "test_labels"}
    monkeypatch.setattr(data, "_from_idx", lambda *_: pytest.fail("decoded again"))
    second = load_data(str(idx))
    assert same(first, second)
    assert (second.class_names, second.fingerprint, second.source) == (
        first.class_names,
        first.fingerprint,
        first.source,
    )


def test_a_changed_file_is_decoded_anew(idx: Path) -> None:
    first = load_data(str(idx))
    path = idx / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(pictures(6, seed=9)))
    os.utime(path, ns=(0, time.time_ns() + 10**9))
    second = load_data(str(idx))
    assert torch.equal(second.train.images, torch.from_numpy(pictures(6, seed=9)))
    assert second.fingerprint != first.fingerprint


def flip_a_bit(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 64]) + content[-99:]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\xff" * len(b), lambda b: b[:40], flip_a_bit]
)
def test_a_damaged_cache_file_is_made_anew_in_silence(
    idx: Path, home: Path, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = load_data(str(idx)).fingerprint
    (file,) = cache_files(home)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(load_data(str(idx)).train.images, torch.from_numpy(pictures(6)))
    restored = data._read_cache(file, str(idx))
    assert restored and restored.fingerprint == fingerprint
    assert len(file.read_bytes()) == len(whole)
    assert capsys.readouterr() == ("", "")


def test_writing_into_loaded_images_does_not_change_the_cache(idx: Path) -> None:
    load_data(str(idx))
    load_data(str(idx)).train.images.zero_()
    assert torch.equal(load_data(str(idx)).train.images, torch.from_numpy(pictures(6)))


@pytest.mark.parametrize("kind", ["idx", "parquet"])
def test_where_nothing_can_be_written_a_warning_is_all_that_happens(
    tmp_path: Path, idx: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    folder = idx if kind == "idx" else write_parquet(tmp_path / "set", {"train": pictures(6), "test": pictures(4)})
    capsys.readouterr()  # of writing the set
    assert torch.equal(load_data(str(folder)).train.images, torch.from_numpy(pictures(6)))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: cannot keep the decoded images")
    assert warning.count("\n") == 1


def test_the_cache_lies_where_the_hub_client_keeps_its_own(
    idx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_data(str(idx))
    assert len(cache_files(tmp_path / "xdg" / "huggingface")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    load_data(str(idx))
    assert len(cache_files(tmp_path / "user" / ".cache" / "huggingface")) == 1


def test_a_data_set_is_called_what_it_is_called_this_time(idx: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(idx)
    assert load_data(str(idx)).source == str(idx)
    assert load_data(str(tmp_path / "link")).source == str(tmp_path / "link")


def test_labels_that_are_no_class_numbers_are_refused(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", pictures(6), pictures(4))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 250, 0, 1, 250], np.uint8)))
    with pytest.raises(UserError, match="labels up to 250, but only"):
        load_data(str(folder))


def test_images_without_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a whole IDX file"):
        load_data(str(write_idx(tmp_path / "idx", np.zeros((6, 0, 0), np.uint8), np.zeros((4, 0, 0), np.uint8))))


@pytest.mark.parametrize("ink", [0, 255])
def test_ink_on_transparent_paper_is_seen(ink: int) -> None:
    alpha = Image.fromarray(pictures(1)[0])
    picture = Image.merge("LA", (Image.new("L", alpha.size, ink), alpha))
    seen = np.asarray(data.scale_image(picture.convert("RGBA"), "a picture"))
    expected = pictures(1)[0] if ink else 255 - pictures(1)[0]
    assert np.abs(seen.astype(int) - expected).max() <= 2
