"""What predict_dir.py promises: one row per image, in order, the same on any number of threads and processes."""

import csv
import errno
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from drawn_digits import draw, paint, write_photos
from PIL import Image, ImageColor
from pyarrow import parquet

from mnist_accel import image_files
from mnist_accel import predict as predict_module
from mnist_accel.cli import UserError
from mnist_accel.data import scale_image
from mnist_accel.image_files import Readers, Seen, find_images, in_order, readable
from mnist_accel.images import read_digit, resized
from mnist_accel.models import DIGITS, SHIPPED, build_model, load_model, save_model
from mnist_accel.output import WRITERS, check_output, write_table
from mnist_accel.predict import BATCH_SIZE, default_model, predict_folder
from mnist_accel.sheet import RIGHT, WRONG, draw_sheet
from mnist_accel.sheet import _font as sheet_font

SCRIPT = Path(__file__).parents[1] / "scripts" / "predict_dir.py"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build_model("mnist_net")
    network.temperature = 1.7
    save_model(network, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six digits in two folders, one file that is none, and a hidden one."""
    folder = tmp_path / "images"
    (folder / "b" / "deep").mkdir(parents=True)
    places = "4.png", "b/0.JPG", "b/deep/7.bmp", "b-1.gif", "2.webp", "5.tiff"
    for place, digit in zip(places, (0, 1, 2, 4, 5, 7), strict=True):
        Image.fromarray(paint(draw(digit, 80, 80))).save(folder / place)
    (folder / "broken.png").write_text("no image")
    (folder / ".hidden.png").write_bytes((folder / "4.png").read_bytes())
    (folder / "notes.txt").write_text("no image either")
    return folder


PATHS = ["2.webp", "4.png", "5.tiff", "b-1.gif", "b/0.JPG", "b/deep/7.bmp", "broken.png"]


def run(folder: Path, model: Path, output: Path, **options) -> list[dict]:
    predict_folder(folder, model=str(model), output=str(output), **options)
    with open(output, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def script(*arguments: object, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=120, check=False
    )


def test_one_row_per_image_sorted_by_path_with_the_networks_answer(folder, model, tmp_path):
    rows = run(folder, model, tmp_path / "out.csv")
    assert list(rows[0]) == ["path", "prediction", "confidence", "error"]
    assert [row["path"] for row in rows] == PATHS
    network = load_model(model)
    for row in rows[:-1]:
        image = torch.from_numpy(read_digit(folder / row["path"]))[None, None].float() / 255
        with torch.inference_mode():
            probabilities = (network(image) / 1.7).softmax(1)[0]
        assert int(row["prediction"]) == int(probabilities.argmax())
        assert float(row["confidence"]) == pytest.approx(float(probabilities.max()), abs=1e-4)
        assert row["error"] == ""
    assert rows[-1]["prediction"] == rows[-1]["confidence"] == "" and "not an image" in rows[-1]["error"]


def test_the_three_formats_say_the_same(folder, model, tmp_path):
    rows = run(folder, model, tmp_path / "out.csv", probabilities=True)
    predict_folder(folder, model=str(model), output=str(tmp_path / "out.jsonl"), probabilities=True)
    predict_folder(folder, model=str(model), output=str(tmp_path / "out.parquet"), probabilities=True)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [{k: "" if v is None else str(v) for k, v in line.items()} for line in lines] == rows
    assert b"\r" not in (tmp_path / "out.csv").read_bytes() + (tmp_path / "out.jsonl").read_bytes()
    assert list(rows[0])[4:] == [f"p{k}" for k in range(10)]
    assert sum(lines[0][f"p{k}"] for k in range(10)) == pytest.approx(1, abs=1e-3)


def test_a_blank_image_is_as_likely_any_digit(model, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (50, 50), 255).save(tmp_path / "images" / "blank.png")
    [row] = run(tmp_path / "images", model, tmp_path / "out.csv")
    assert row["confidence"] == "0.1" and row["prediction"] != "" and row["error"] == ""


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More images than two batches hold, all different, one unreadable in the middle."""
    folder = tmp_path / "many"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(2 * BATCH_SIZE + 20):
        Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "150.png").write_bytes(b"")
    return folder


def test_as_is_inverts_what_training_inverted(tmp_path):
    """A model of dark digits on light paper reads such files as it learned them, enlarged or not."""
    dark, light = tmp_path / "dark", tmp_path / "light"
    network = build_model("fast_net")
    for folder, inverted in ((dark, True), (light, False)):
        network.inverted = inverted
        save_model(network, tmp_path / f"{folder.name} model")
        folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    for index, side in enumerate((8, 28, 64)):
        image = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_NEAREST)
        Image.fromarray(255 - image).save(dark / f"{index}.png")
        Image.fromarray(image).save(light / f"{index}.png")
    rows = {
        folder.name: run(
            folder, tmp_path / f"{folder.name} model", tmp_path / "out.csv", as_is=True, probabilities=True
        )
        for folder in (dark, light)
    }
    assert len(rows["dark"]) == len(rows["light"]) == 3
    for dark_row, light_row in zip(rows["dark"], rows["light"], strict=True):
        for name in (f"p{digit}" for digit in DIGITS):  # a grey of one half is rounded up in both
            assert abs(float(dark_row[name]) - float(light_row[name])) < 5e-4
    photos = [run(light, tmp_path / f"{name} model", tmp_path / "out.csv", probabilities=True) for name in rows]
    assert photos[0] == photos[1], "without the option both see white ink on black"
    for side in (14, 32, 60):  # as the training data was brought to 28x28
        drawn = (255 * draw(5, side, side)).astype(np.uint8)
        exact = cv2.resize(drawn.astype(np.float32), (28, 28), interpolation=cv2.INTER_AREA)
        learned = scale_image(Image.fromarray(drawn), "")
        assert np.array_equal(resized(drawn), learned) and (side < 28 or np.abs(learned - exact).max() < 1), side


def test_a_model_of_other_things_than_digits_is_called_so(folder, tmp_path, capsys):
    network = build_model("fast_net", ["7", "dog"])  # as letters and digits together
    network.inverted = True
    save_model(network, tmp_path / "pets")
    run(folder, tmp_path / "pets", tmp_path / "out.csv")
    assert "(fast_net; of 7, dog; trained on dark-on-light files as they were: --as-is" in capsys.readouterr().out
    run(folder, tmp_path / "pets", tmp_path / "out.csv", as_is=True)
    assert "(fast_net; of 7, dog)" in capsys.readouterr().out


def test_threads_do_not_change_a_byte(many, model, tmp_path):
    for workers in (1, 3):
        run(many, model, tmp_path / f"{workers}.csv", workers=workers, as_is=True, probabilities=True)
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()


def two_ranks(*arguments: object) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip


def test_two_processes_write_the_same_file_byte_for_byte(many, model, tmp_path):
    run(many, model, tmp_path / "one.csv", as_is=True, probabilities=True)
    ranks = two_ranks(many, "--model", model, "--as-is", "--probabilities", "--output", tmp_path / "two.csv")
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert "images/s" in outputs[0] and "images/s" not in outputs[1]


@pytest.mark.parametrize("killed", [0])  # the one that writes; 1 passes as well and takes as long
def test_a_rank_killed_in_the_middle_leaves_the_old_file_and_the_next_run_clears_up(killed, model, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir(), out.mkdir()
    (out / "p.csv").write_text("old")
    Image.fromarray(paint(draw(4, 300, 300))).save(folder / "first.png")
    for i in range(20 * BATCH_SIZE):
        os.link(folder / "first.png", folder / f"{i}.png")
    ranks = two_ranks(folder, "--model", model, "--output", out / "p.csv")
    try:
        deadline = time.monotonic() + 100
        # The temporary file exists for a moment before the work, too; only in the middle of the work it has a heading.
        while not any(file.stat().st_size for file in out.glob(".p.csv.*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.01)
        ranks[killed].kill()
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    survivor = ranks[1 - killed]
    assert survivor.returncode == 2 and ranks[killed].returncode == -9, outputs
    assert (out / "p.csv").read_text() == "old", outputs
    (tmp_path / "few").mkdir()
    (folder / "first.png").rename(tmp_path / "few" / "first.png")
    assert len(run(tmp_path / "few", model, out / "p.csv")) == 1
    assert [file.name for file in out.iterdir()] == ["p.csv"]


def test_only_so_many_files_are_read_ahead():
    taken = []
    endless = (taken.append(i) or i for i in count())
    with ThreadPoolExecutor(2) as pool:
        answers = in_order(pool, str, endless, ahead=5)
        assert len(taken) == 5, "it begins at once"
        assert [next(answers) for _ in range(3)] == ["0", "1", "2"] and len(taken) == 8


def test_files_that_kill_their_reader_get_a_row_and_cost_no_other(folder, monkeypatch):
    """A decoder's crash, played by a program that ends itself by a signal when it comes to certain files."""
    fatal = (
        "import os, signal; from mnist_accel import images, image_files; read = images.read_image; "
        "images.read_image = lambda p: os.kill(os.getpid(), signal.SIGSEGV) if p.endswith(('4.png', '.bmp')) "
        "else read(p); image_files.serve()"
    )
    monkeypatch.setattr(image_files, "PROGRAM", fatal)
    with closing(Readers(folder, 2)) as readers:
        seen = list(readers.read([(path, False) for path in find_images(folder)[0]]))
    assert [file.path for file in seen] == PATHS
    assert ["crashed" in (file.error or "") for file in seen] == [path in ("4.png", "b/deep/7.bmp") for path in PATHS]
    assert sum(file.digit is not None for file in seen) == 4


def test_a_few_large_files_occupy_a_reader_each_and_no_reader_is_started_in_vain(folder, monkeypatch):
    slow = (
        "import time; from mnist_accel import images, image_files; read = images.read_image; "
        "images.read_image = lambda p: time.sleep(1) or read(p); image_files.serve()"
    )
    monkeypatch.setattr(image_files, "PROGRAM", slow)
    for files, processes, started in ((3, 64, 3), (6, 2, 2)):
        with closing(Readers(folder, processes)) as readers:
            paths = find_images(folder)[0][:files]
            assert len(list(readers.read([(path, False) for path in paths]))) == files
            assert len(readers._all) == started


def test_a_reader_gets_the_environment_of_the_beginning_whatever_imports_do_to_it_meanwhile(folder, monkeypatch):
    with closing(Readers(folder, 1)) as readers:
        monkeypatch.setenv("CHANGED_MEANWHILE", "1")
        assert "CHANGED_MEANWHILE" not in psutil.Process(readers._start().pid).environ()


def test_readers_that_cannot_start_are_an_error_and_no_endless_loop(folder, monkeypatch):
    monkeypatch.setattr(image_files, "PROGRAM", "raise SystemExit(3)")
    with closing(Readers(folder, 2)) as readers, pytest.raises(RuntimeError, match="its message is above"):
        next(readers.read([(b"4.png", False)]))


def test_no_reader_outlives_who_asked(folder, tmp_path):
    code = """
import sys, time
from pathlib import Path
from mnist_accel.image_files import Readers
readers = Readers(Path(sys.argv[1]), 2)
list(readers.read([(b"4.png", False)] * 2))
print(*(process.pid for process in readers._all), flush=True)
time.sleep(60)
"""
    asking = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    readers = [psutil.Process(int(pid)) for pid in asking.stdout.readline().split()]
    asking.kill()
    asking.communicate()
    assert len(readers) == 2 and not psutil.wait_procs(readers, timeout=20)[1]


def test_labels_from_names_and_folders(folder, model, tmp_path, capsys):
    run(folder, model, tmp_path / "out.csv", labels="name")
    text = capsys.readouterr().out
    assert "/5 (" in text and "2 without a label" in text and "Confusion matrix" in text
    (folder / "b" / "deep").rename(folder / "7")
    run(folder, model, tmp_path / "out.csv", labels="folder")
    assert "/1 (" in capsys.readouterr().out
    run(folder / "7", model, tmp_path / "out.csv", labels="folder")
    assert "/1 (" in capsys.readouterr().out, "the folder itself is a parent too"
    with pytest.raises(UserError, match=r"none of 1 images .* rename them"):
        run(folder / "b", model, tmp_path / "out.csv", labels="folder")


def test_the_sheet_shows_the_images_and_is_not_predicted_itself(folder, model, tmp_path):
    for _ in range(2):
        rows = run(folder, model, tmp_path / "out.csv", sheet=folder / "sheet.png", labels="name")
        assert [row["path"] for row in rows] == PATHS
    with Image.open(folder / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50, "it shows more than paper and text"


def test_the_photos_of_the_readme_s_sheet_are_made_from_the_embedded_digits_and_mostly_read(tmp_path):
    write_photos(tmp_path / "images", of_each=1)
    answers = run(tmp_path / "images", SHIPPED, tmp_path / "out.csv")
    assert [row["path"] for row in answers] == [f"{digit}_0.jpg" for digit in range(10)]
    assert sum(row["prediction"] == row["path"][0] for row in answers) >= 8


def test_the_sheet_shows_file_names_of_any_kind_below_their_images(tmp_path):
    def drawn(name):
        blank = np.zeros((28, 28), np.uint8)
        first, second = (Seen(path, blank, blank, prediction=3, probabilities=(1.0,)) for path in (name, "b/2.png"))
        draw_sheet([(first, None), (second, None)], DIGITS, tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            pixels = np.asarray(sheet.convert("L"))
        return np.hsplit(pixels, 2)

    (short, after_short), (long, after_long) = drawn("a/1.png"), drawn(f"a/{'ー' * 50}\n{'1' * 100}.png")
    assert np.array_equal(after_short, after_long) and np.array_equal(after_short, drawn("a/\n.png")[1])
    assert np.array_equal(drawn("a/Icon\r\u2028\x1c.png")[0], drawn("a/Icon   .png")[0])
    assert (long != short).any() and (long < 128).sum() > (short < 128).sum()
    assert not np.array_equal(short, drawn("a/7.png")[0])


def test_the_summary_counts(folder, model, tmp_path, capsys):
    rows = run(folder, model, tmp_path / "out.csv")
    text = capsys.readouterr().out
    mean = sum(float(row["confidence"]) for row in rows[:-1]) / 6
    assert f"6 images read, mean confidence {mean:.3f}, 1 could not be read" in text
    assert str(model) in text and "\npredicted  0: " in text


def test_the_default_model_is_the_newest_run_that_is_not_on_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_model() == SHIPPED
    mnist = "ylecun/mnist"
    runs = {"old": (0, mnist), "c": (9, "digits"), "a": (7, mnist), "damaged": (8, mnist), "b": (6, mnist)}
    for name, (written, dataset) in runs.items():
        best = Path("runs") / name / "best"
        save_model(build_model("mnist_net"), best, dataset=dataset)
        os.utime(best / "model.safetensors", (1e9 + written, 1e9 + written))
    (Path("runs") / "damaged" / "best" / "config.json").write_text("[")
    assert default_model() == Path("runs/a/best")


def test_a_run_that_fails_leaves_the_old_file_and_nothing_else(folder, model, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "p.csv").write_text("old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(WRITERS, ".csv", full_disk)
    with pytest.raises(UserError, match="No space left"):
        run(folder, model, tmp_path / "out" / "p.csv")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.csv"]
    assert (tmp_path / "out" / "p.csv").read_text() == "old"

    def interrupted():
        yield {"path": "a", "n": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_table(interrupted(), str(tmp_path / "out" / "p.jsonl"), {"path": str, "n": int})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.csv"]


def test_rows_can_be_written_to_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    check_output(str(tmp_path / "pipe.csv"))
    reader = os.open(tmp_path / "pipe.csv", os.O_RDONLY | os.O_NONBLOCK)
    write_table([{"path": "a"}], str(tmp_path / "pipe.csv"), {"path": str})
    assert os.read(reader, 100) == b"path\na\n"
    os.close(reader)


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    file = tmp_path / "p.csv"
    file.write_text("old")
    file.chmod(0o444)
    # What the system says to everybody but root.
    monkeypatch.setattr(os, "access", lambda path, _: bool(os.stat(path).st_mode & 0o200))
    for attempt in (check_output, lambda output: write_table([], output, {"path": str})):  # before the work, and after
        with pytest.raises(UserError, match=r"p\.csv: it is write-protected"):
            attempt(str(file))
    assert file.read_text() == "old"


def test_a_link_that_leads_nowhere_or_to_itself_is_no_obstacle(tmp_path):
    for name, target in (("loop.csv", "loop.csv"), ("new.csv", "target.csv")):
        (tmp_path / name).symlink_to(target)
        check_output(str(tmp_path / name))
        write_table([], str(tmp_path / name), {"path": str})
        assert (tmp_path / name).read_text() == "path\n"
    assert (tmp_path / "new.csv").is_symlink() and not (tmp_path / "loop.csv").is_symlink()


@pytest.mark.parametrize(("options", "message"), [
    ({"output": "p.txt"}, ".csv, .jsonl or .parquet"),
    ({"output": "nowhere/p.csv"}, "cannot write"),
    ({"output": "images.csv"}, "is a folder"),
    ({"sheet": Path("sheet.txt")}, "end in .png"),
    ({"model": "nowhere"}, "no model folder"),
])  # fmt: skip
def test_mistakes_are_found_before_anything_is_written(options, message, folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("images.csv").mkdir()
    monkeypatch.setattr(predict_module, "write_rows", lambda *_: pytest.fail("rows were written"))
    with pytest.raises(UserError, match=message):
        predict_folder(folder, **{"model": str(model), "output": "p.csv"} | options)


def test_a_single_file_is_pointed_to_its_folder(folder, model):
    with pytest.raises(UserError, match=r"4\.png is a file: give the folder"):
        predict_folder(folder / "4.png", model=str(model))


def test_an_empty_name_of_a_folder_is_seen_to_be_empty():
    with pytest.raises(UserError, match="no folder '': give"):
        predict_folder("")


def test_the_script_ends_with_the_promised_status(folder, model, tmp_path):
    nothing = script(tmp_path / "nowhere", cwd=tmp_path)
    assert nothing.returncode == 2 and nothing.stderr.startswith("error: no folder") and nothing.stderr.count("\n") == 1
    strict = script(folder, "--model", model, "--strict", "--output", "-", cwd=tmp_path)
    assert strict.returncode == 1
    assert [row["path"] for row in csv.DictReader(strict.stdout.splitlines())] == PATHS
    assert "images read" in strict.stderr and not (tmp_path / "predictions.csv").exists()


def forbid_deep(monkeypatch):
    """From now on no folder whose name ends in `deep` may be read, not even by root."""
    scan = os.scandir

    def forbidden(path):
        if os.fsencode(path).rstrip(b"/").endswith(b"deep"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidden)


def test_strict_counts_a_folder_that_cannot_be_read(folder, model, tmp_path, monkeypatch):
    (folder / "broken.png").unlink()
    assert predict_folder(folder, model=str(model), output=str(tmp_path / "out.csv")) == 0
    forbid_deep(monkeypatch)
    assert predict_folder(folder, model=str(model), output=str(tmp_path / "out.csv")) == 1


def test_a_reader_needs_no_priorities_as_windows_has_none():
    program = "import os; del os.nice\nfrom mnist_accel.image_files import serve; serve()"
    done = subprocess.run([sys.executable, "-c", program], input=b"", capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_does_not_import_torch(tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["predict_dir.py", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.endswith("False\n") and "--labels" in result.stdout


def test_pipes_loops_and_hidden_files_are_left_out(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "loop.png").symlink_to(folder, target_is_directory=True)
    (folder / "linked.png").symlink_to(folder / "4.png")
    (folder / "dangling.png").symlink_to(folder / "gone.png")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").touch()
    assert [readable(path) for path in find_images(folder)[0]] == sorted([*PATHS, "linked.png", "dangling.png"])
    rest = set(find_images(folder)[0]) - set(find_images(folder, leaving_out=folder / "4.png")[0])
    assert rest == {b"4.png", b"linked.png"}, "a file to leave out is left out under its other names, too"


def test_an_unreadable_folder_is_named_and_passed_over(folder, monkeypatch, capsys):
    forbid_deep(monkeypatch)
    found, skipped = find_images(folder)
    assert len(found) == len(PATHS) - 1 and skipped == 1
    assert "b/deep/: Permission denied" in capsys.readouterr().err
    with pytest.raises(UserError, match="deep cannot be read: Permission denied"):
        find_images(folder / "b" / "deep")


def test_strange_names_survive_every_format(model, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = [b'a,"b".png', b"a\nb.png", b"a\rb.png", "ä 数.png".encode(), b"\xff\xfe.png", b"=1+1.png"]
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            Image.fromarray(paint(draw(4, 60, 60))).save(file, format="PNG")
    expected = sorted(name.decode("utf-8", "backslashreplace") for name in names)
    rows = run(folder, model, tmp_path / "out.csv")
    assert [row["path"] for row in rows] == expected and all(row["prediction"] for row in rows)
    predict_folder(folder, model=str(model), output=str(tmp_path / "out.parquet"))
    assert parquet.read_table(tmp_path / "out.parquet")["path"].to_pylist() == expected


def test_a_folder_without_images_is_the_users_mistake(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="no images in"):
        find_images(tmp_path)


def test_the_sheet_knows_letters_with_accents_and_other_alphabets():
    font = sheet_font(9)
    drawn = {letter: bytes(font.getmask(letter)) for letter in "éüñßÅЖλ\uffff"}
    assert len(set(drawn.values())) == len(drawn), "a letter that the font lacks looks as any other that it lacks"


def test_long_class_names_stay_in_their_cell_of_the_sheet(tmp_path):
    def drawn(name):
        digit, picture = np.zeros((28, 28), np.uint8), np.full((56, 56, 3), 255, np.uint8)
        wrong = Seen("a.png", digit, picture, prediction=0, probabilities=(0.7, 0.2, 0.1))
        right = Seen("b.png", digit, picture, prediction=2, probabilities=(0.1, 0.2, 0.7))
        draw_sheet([(wrong, 1), (right, 2)], [name, "T-shirt/top", "Bag"], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            return np.asarray(sheet.convert("L"))

    short, long = drawn("Boot"), drawn("Ankle boot with laces")
    differs = np.flatnonzero((short != long).any(0))
    assert differs.size and differs.max() < 90, "neither the percentage nor the next cell is touched"


def test_the_sheet_frames_mistakes_and_nothing_else(tmp_path):
    def has(label, colour):
        blank = np.zeros((28, 28), np.uint8)
        seen = Seen("a.png", blank, cv2.merge([blank] * 3), prediction=1, probabilities=(0.1, 0.9))
        draw_sheet([(seen, label)], ["7", "1"], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            return bool((np.asarray(sheet.convert("RGB")) == ImageColor.getrgb(colour)).all(2).any())

    assert [has(label, WRONG) for label in (None, 0, 1)] == [False, True, False]
    assert [has(label, RIGHT) for label in (None, 0, 1)] == [False, False, True]


def test_labelled_files_that_cannot_be_read_are_counted(folder, model, tmp_path, capsys):
    (folder / "3_damaged.png").write_bytes(b"no image")
    run(folder, model, tmp_path / "out.csv", labels="name")
    assert "1 with a label could not be read" in capsys.readouterr().out


def test_ctrl_c_ends_a_script_quietly():
    program = "from mnist_accel.cli import run_script\ndef main():\n    raise KeyboardInterrupt\nrun_script(main)"
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_running_out_of_memory_is_one_line_on_any_rank():
    program = "import torch\nfrom mnist_accel.cli import run_script\nrun_script(lambda: torch.empty(10**15))"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env=os.environ | {"RANK": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2 and ended.stderr.startswith("error: out of memory for 4000000000000000 bytes more: ")
    assert ended.stderr.count("\n") == 1 and "--auto-batch-size" in ended.stderr


def test_a_name_that_is_too_long_is_one_line():
    program = "from pathlib import Path\nfrom mnist_accel.cli import run_script\nrun_script(Path(300 * 'x').stat)"
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.startswith("error: File name too long: xxx")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_a_quota_or_a_limit_that_is_used_up_is_one_line(number):
    program = (
        "import sys\nfrom mnist_accel.cli import run_script\ndef main():\n    raise OSError(int(sys.argv[1]), 'full')"
    )
    command = [sys.executable, "-c", program + "\nrun_script(main)", str(number)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "error: cannot write the output: full; make room\n")


def test_a_package_that_is_not_installed_is_one_line():
    program = "from mnist_accel.cli import run_script\nrun_script(lambda: __import__('not_installed'))"
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.startswith("error: No module named 'not_installed': install")
    assert ended.stderr.count("\n") == 1 and "uv sync" in ended.stderr
