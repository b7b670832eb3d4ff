"""A run's folder is opened for its own run only, and what cannot be read or written there is told."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from huggingface_hub import ModelCard

from mnist_accel import run_folder
from mnist_accel.checkpoint import CHECKSUM_NAME, STATE_NAME, write_checkpoint
from mnist_accel.cli import UserError
from mnist_accel.config import PROVENANCE, TrainConfig, parse_config
from mnist_accel.model_card import model_card
from mnist_accel.models import build_model
from mnist_accel.run_folder import CONTENT, RunFolder, choose_folder

CONFIG = TrainConfig(resume="auto", learning_rate=0.01, output_dir="run")


@pytest.fixture
def died_early(tmp_path: Path) -> RunFolder:
    """A run that was killed before its first checkpoint."""
    content = replace(CONFIG, resume=None).options() | {PROVENANCE: {"dataset_fingerprint": "the same"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(content))
    return RunFolder(tmp_path / "run")


def test_a_run_that_died_before_its_first_checkpoint_starts_again(died_early):
    for damage in (None, b"{ half of", b"model: \xff\xfe\x80"):
        if damage:
            (died_early.path / "config.yaml").write_bytes(damage)
        assert died_early.open(CONFIG, "the same", 100) is None
        died_early.close()


def test_a_run_that_died_before_its_first_checkpoint_is_not_taken_over_by_another(died_early):
    with pytest.raises(UserError, match=r"--learning-rate was 0\.01, is 0\.02"):
        died_early.open(replace(CONFIG, learning_rate=0.02), "the same", 100)
    with pytest.raises(UserError, match="--dataset was other data"):
        died_early.open(CONFIG, "another", 100)


def test_a_run_all_of_whose_checkpoints_are_damaged_is_not_started_over(died_early, capsys):
    for step in (3, 6):
        checkpoint = died_early.checkpoints / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / STATE_NAME).write_bytes(b"half")
        (checkpoint / CHECKSUM_NAME).write_bytes(b"")
    with pytest.raises(UserError, match="step_00000003 is damaged"):
        died_early.open(CONFIG, "the same", 100)
    assert capsys.readouterr().out.startswith(
        f"warning: checkpoint {died_early.checkpoints / 'step_00000006'} is damaged"
    )


def test_a_link_to_a_checkpoint_stands_for_its_run_and_a_copy_needs_a_folder(tmp_path):
    write_checkpoint(tmp_path, 10, {}, keep=1)
    checkpoint = tmp_path / "runs" / "mine" / "checkpoints" / "step_00000010"
    checkpoint.parent.mkdir(parents=True)
    shutil.move(tmp_path / checkpoint.name, checkpoint)
    (tmp_path / "newest").symlink_to(checkpoint)
    assert choose_folder(TrainConfig(resume=str(tmp_path / "newest"))) == tmp_path / "runs" / "mine"
    shutil.copytree(checkpoint, tmp_path / "copy")
    with pytest.raises(UserError, match="copy is not in a run's checkpoints/: give an --output-dir"):
        choose_folder(TrainConfig(resume=str(tmp_path / "copy")))
    assert choose_folder(TrainConfig(resume=str(tmp_path / "copy"), output_dir="other")) == Path("other")


def test_resume_auto_goes_on_where_the_checkpoints_lie_on_another_disk(tmp_path):
    folder = RunFolder(tmp_path / "run")
    (folder.path / "final").mkdir(parents=True)  # an ended run, which more epochs prolong
    (tmp_path / "disk").mkdir()
    folder.checkpoints.symlink_to(tmp_path / "disk")
    content = {name: {} for name in CONTENT} | {"fingerprint": "the same", "state": {"step": 10}}
    write_checkpoint(folder.checkpoints, 10, content, keep=1)
    config = TrainConfig(resume="auto", output_dir=str(folder.path))
    assert folder.open(config, "the same", 100)["state"] == {"step": 10}
    folder.close()


def test_resume_path_given_again_goes_on_with_the_run_that_it_began(tmp_path):
    old, new = RunFolder(tmp_path / "old"), RunFolder(tmp_path / "new")
    content = {name: {} for name in CONTENT} | {"fingerprint": "the same", "state": {"step": 5}}
    old.path.mkdir()
    write_checkpoint(old.checkpoints, 5, content, keep=1)
    config = TrainConfig(resume=str(old.checkpoints / "step_00000005"), output_dir=str(new.path))

    def resumed_step() -> int:
        with closing(new):
            return new.open(config, "the same", 100)["state"]["step"]

    assert resumed_step() == 5
    (new.path / "config.yaml").write_text(
        yaml.safe_dump(config.options() | {PROVENANCE: {"dataset_fingerprint": "the same"}})
    )
    assert resumed_step() == 5
    write_checkpoint(new.checkpoints, 8, content | {"state": {"step": 8}}, keep=1)
    assert resumed_step() == 8
    with pytest.raises(UserError, match="already holds a run"):
        new.open(replace(config, resume=str(old.path)), "the same", 100)


def test_a_checkpoint_of_another_version_is_told(tmp_path):
    folder = RunFolder(tmp_path)
    write_checkpoint(folder.checkpoints, 5, dict.fromkeys(CONTENT - {"average"}), keep=1)
    with pytest.raises(UserError, match="step_00000005 is no checkpoint of this version"):
        folder.open(CONFIG, "the same", 100)


LOCKS = """
import sys
from pathlib import Path
from mnist_accel.config import TrainConfig
from mnist_accel.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.open(TrainConfig(resume="auto", output_dir=sys.argv[1]), "the same", 100)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.3)
    folder = RunFolder(tmp_path / "run")
    config = TrainConfig(resume="auto", output_dir=str(folder.path))
    command, pipe = [sys.executable, "-c", LOCKS, str(folder.path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"another process is training in {folder.path}: wait"):
            folder.open(config, "the same", 100)
        other.kill()
        other.wait()
    assert folder.open(config, "the same", 100) is None
    folder.close()
    assert not list(folder.path.iterdir())


def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    folder = RunFolder(tmp_path / "run")
    assert folder.open(TrainConfig(output_dir=str(folder.path)), "the same", 100) is None
    folder.close()
    assert not list(folder.path.iterdir())


def test_who_waited_for_a_folder_keeps_the_next_one_out(tmp_path):
    folder = RunFolder(tmp_path / "run")
    config = TrainConfig(resume="auto", output_dir=str(folder.path))
    releases = LOCKS.replace("sys.stdin.read()", "sys.stdin.readline(); folder.close(); sys.stdin.read()")
    command, pipe = [sys.executable, "-c", releases, str(folder.path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        timer = threading.Timer(0.5, lambda: (other.stdin.write("\n"), other.stdin.flush()))
        timer.start()
        assert folder.open(config, "the same", 100) is None
        timer.join()
        assert (folder.path / ".lock").exists(), "else a third training locks a file of its own"
        other.communicate()


def test_a_training_that_fails_leaves_its_folder_to_the_next_one(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="diverged"), closing(folder):
        folder.open(TrainConfig(output_dir=str(folder.path)), "the same", 100)
        assert (folder.path / ".lock").exists()
        raise UserError("diverged")
    assert not (folder.path / ".lock").exists()


@pytest.mark.parametrize("resume", ["runs/mine", "runs/mine/checkpoints/step_00000010"])
def test_a_run_goes_on_in_the_folder_that_it_is_resumed_from_unless_another_is_given(resume):
    assert choose_folder(TrainConfig(resume=resume)).resolve() == Path("runs/mine").resolve()
    assert choose_folder(TrainConfig(resume=resume, output_dir="other")) == Path("other")
    assert choose_folder(TrainConfig()).parent == Path("runs")


def test_a_run_may_be_called_as_checkpoints_are():
    assert choose_folder(TrainConfig(resume="runs/step_lr")) == Path("runs/step_lr")


def test_a_tilde_stands_for_a_home_and_where_there_is_none_for_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for option in ("output_dir", "resume"):
        assert choose_folder(TrainConfig(**{option: "~nobody-here/run"})) == Path("~nobody-here/run")
        assert choose_folder(TrainConfig(**{option: "~/run"})) == tmp_path / "run"


def test_resume_auto_without_a_folder_says_that_it_starts_afresh(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(resume="auto")
    assert RunFolder(choose_folder(config)).open(config, "data", 100) is None
    assert "finds nothing without --output-dir" in capsys.readouterr().out


def test_a_refused_start_leaves_no_folder(tmp_path):
    config = TrainConfig(resume=str(tmp_path / "typing" / "mistake"))
    with pytest.raises(UserError, match="no checkpoint at"):
        RunFolder(choose_folder(config)).open(config, "data", 100)
    assert not list(tmp_path.iterdir())
    config = TrainConfig(output_dir=str(tmp_path / "new" / ("a" * 300) / "run"))
    with pytest.raises(UserError, match="too long"):
        RunFolder(choose_folder(config)).open(config, "data", 100)
    assert not list(tmp_path.iterdir())


def test_weights_without_the_rest_of_their_run_are_not_written_over(tmp_path):
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(tmp_path).open(CONFIG, "data", 100)


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
    content = dict.fromkeys(CONTENT) | {"options": {}, "fingerprint": "data", "state": {"step": 100}}
    folder = RunFolder(tmp_path)
    write_checkpoint(folder.checkpoints, 100, content, keep=1)
    assert folder.open(CONFIG, "data", 100) == content
    folder.close()
    with pytest.raises(UserError, match="of step 100, and 99 steps are asked for: give more --epochs"):
        folder.open(CONFIG, "data", 99)


def test_the_options_on_a_model_card_are_a_configuration_file(tmp_path):
    config = TrainConfig(dataset="digits", learning_rate=0.01, resume="auto", output_dir="mine", augment=True)
    facts = {"dataset": "digits", "epoch": 1, "step": 9, "split": "test", "accuracy": 0.9, "loss": 0.3}
    card = model_card(build_model("fast_net"), facts | {"options": config.options()})
    (tmp_path / "options.yaml").write_text(dedent(card.rpartition("--config`:\n\n")[2]))
    read = parse_config(["--config", str(tmp_path / "options.yaml")])
    assert read == replace(config, resume=None, output_dir="")


def test_weights_of_a_run_whose_folder_is_gone_do_not_make_it_again(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        RunFolder(tmp_path / "gone").write_files("best", {"config.json": b"{}"})
    assert not (tmp_path / "gone").exists()


def test_weights_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "best").write_text("a file where the folder should be")
    facts = {"dataset": "digits", "split": "test", "accuracy": 0.5, "loss": 1.0, "epoch": 1, "step": 1, "options": {}}
    with pytest.raises(UserError, match=r"cannot write .*best: .*--output-dir") as error:
        RunFolder(tmp_path).write_weights("best", build_model("fast_net"), facts)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_files_that_belong_together_are_replaced_all_or_none(tmp_path, monkeypatch):
    folder, names = RunFolder(tmp_path), ("model.safetensors", "config.json", "README.md")
    folder.write_files("best", dict.fromkeys(names, b"old"))
    original = Path.write_bytes

    def write(path, content):
        if "README" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(UserError, match=r"cannot write .*best: No space left"):
        folder.write_files("best", dict.fromkeys(names, b"new"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "best").iterdir()} == dict.fromkeys(names, b"old")


def test_files_are_flushed_as_windows_wants_them_open_for_writing(tmp_path, monkeypatch):
    def flush(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.write(descriptor, b"")

    monkeypatch.setattr(os, "fsync", flush)
    RunFolder(tmp_path).write_files("best", {"config.json": b"{}"})


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mnist_accel.run_folder.time.strftime", lambda _: "2000-01-01_00-00-00")
    together = [RunFolder(choose_folder(TrainConfig())) for _ in range(3)]
    for folder, number in zip(together, ("", "-2", "-3"), strict=True):
        assert folder.open(TrainConfig(), "data", 100) is None
        assert folder.path == Path("runs", f"2000-01-01_00-00-00{number}") and folder.path.is_dir()
        assert folder.checkpoints.parent == folder.path


@pytest.mark.parametrize(
    "dataset, listed", [("data/mnist", None), ("digits", None), ("ylecun/mnist:mnist", ["ylecun/mnist"])]
)
def test_the_model_card_names_only_data_sets_of_the_hub(dataset, listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/mnist").mkdir(parents=True)
    facts = {"dataset": dataset, "epoch": 1, "step": 9, "split": "test", "accuracy": 0.9, "loss": 0.3, "options": {}}
    assert ModelCard(model_card(build_model("fast_net"), facts)).data.datasets == listed
