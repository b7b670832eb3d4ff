"""Checkpoints are complete or absent, hold what `save` saw, and are read without executing anything."""

import gc
import os
import pickle
from pathlib import Path

import pytest
import torch

from mnist_accel import checkpoint
from mnist_accel.checkpoint import (
    CHECKSUM_NAME,
    STATE_NAME,
    TrainState,
    complete_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from mnist_accel.cli import UserError
from mnist_accel.config import TrainConfig


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, *steps: int, keep: int = 1) -> None:
    for step in steps:
        write_checkpoint(folder, step, {"step": step, "weights": torch.full((3,), float(step))}, keep)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_what_is_saved_is_read_back(folder):
    content = {
        "number": 3, "text": "a", "nothing": None, "rows": [{"loss": 0.5}], "pair": (1, 2.5),
        "tensors": {"half": torch.arange(4).half(), "long": torch.tensor([[1, 2]])},
    }  # fmt: skip
    write_checkpoint(folder, 7, content, keep=1)
    read = read_checkpoint(folder / "step_00000007")
    for name, tensor in content.pop("tensors").items():
        other = read["tensors"][name]
        assert other.dtype == tensor.dtype and torch.equal(other, tensor)
    del read["tensors"]
    assert read == content


def test_the_newest_are_kept(folder):
    save(folder, 3, 6, 9, 12, keep=2)
    assert names(folder) == ["step_00000009", "step_00000012"]


def test_an_older_checkpoint_goes_only_after_the_newer_is_complete(folder, monkeypatch):
    save(folder, 1)
    at_removal = []
    original = checkpoint._remove

    def remove(path):
        at_removal.append((path.name, [read_checkpoint(other)["step"] for other in complete_checkpoints(folder)]))
        original(path)

    monkeypatch.setattr(checkpoint, "_remove", remove)
    save(folder, 2)
    assert at_removal == [("step_00000001", [1, 2])]
    assert names(folder) == ["step_00000002"]


def test_until_it_is_complete_a_checkpoint_does_not_carry_its_name(folder, monkeypatch):
    seen = []
    original = torch.save

    def slow_save(content, file):
        original(content, file)
        seen.append(names(folder))

    monkeypatch.setattr(torch, "save", slow_save)
    save(folder, 5, keep=2)
    assert seen == [[".unfinished-step_00000005"]]
    assert names(folder) == ["step_00000005"]


def test_a_checkpoint_is_flushed_to_disk_before_it_gets_its_name(folder, monkeypatch):
    events, rename, replace = [], Path.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"rename {to}"), rename(self, to))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"{old} becomes {new}"), replace(old, new))[1])
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("which file is flushed is read from /proc, which is not here")
    save(folder, 5)
    unfinished = folder / ".unfinished-step_00000005"
    for name in (STATE_NAME, CHECKSUM_NAME):
        flushed, renamed = events.pop(0), events.pop(0)
        assert renamed == f"{flushed} becomes {unfinished / name}"
        assert events.pop(0) == str(unfinished)
    assert events == [f"rename {folder / 'step_00000005'}", str(folder)]


def test_a_failed_write_leaves_nothing_under_a_complete_name_and_the_earlier_ones_intact(folder, monkeypatch):
    save(folder, 1)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    told = r"cannot write checkpoint .*step_00000002: No space left.*earlier checkpoints are intact"
    with pytest.raises(UserError, match=told):
        save(folder, 2)
    assert names(folder) == ["step_00000001"]
    assert read_checkpoint(folder / "step_00000001")["step"] == 1
    monkeypatch.undo()
    save(folder, 3)  # there is room again
    assert names(folder) == ["step_00000003"]


def test_what_a_failed_write_leaves_in_memory_is_collected_without_a_crash(folder, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    try:
        save(folder, 1)
    except UserError as error:
        error.itself = error  # what it refers to, the frames of the write, is left to the collector
    gc.collect()  # a crash here is that of Python 3.12.1


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "_remove", refuse)
    save(folder, 1, 2)
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_the_folder_of_a_run_that_is_gone_is_not_made_again(folder):
    with pytest.raises(UserError, match="No such file"):
        save(folder / "of a run that is gone", 1)
    assert not folder.exists()


def test_the_same_step_is_written_again_after_a_resume_from_before_it(folder):
    save(folder, 1, 2, keep=2)
    write_checkpoint(folder, 2, {"step": "again"}, keep=2)
    assert names(folder) == ["step_00000001", "step_00000002"]
    assert read_checkpoint(folder / "step_00000002")["step"] == "again"


def test_checkpoints_beyond_the_one_resumed_from_are_not_counted_among_the_kept(folder):
    save(folder, 8, 9, keep=2)
    save(folder, 1, 2, 3, keep=2)
    assert names(folder) == ["step_00000002", "step_00000003", "step_00000008", "step_00000009"]


def test_leftovers_of_a_killed_write_neither_count_nor_disturb(folder):
    for leftover in (".unfinished-step_00000004", ".removed-step_00000004", ".removed-step_00000001", "step_4"):
        (folder / leftover).mkdir(parents=True)
        (folder / leftover / STATE_NAME).write_bytes(b"half")
    (folder / "step_00000003").write_text("a file, not a folder")
    assert complete_checkpoints(folder) == []
    save(folder, 4)
    assert complete_checkpoints(folder) == [folder / "step_00000004"]
    assert read_checkpoint(folder / "step_00000004")["step"] == 4
    assert not any(name.startswith(".") for name in names(folder))


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_execute_code_is_refused_and_not_executed(tmp_path, folder, form):
    marker = tmp_path / "executed"
    file = folder / "step_00000001" / STATE_NAME
    file.parent.mkdir(parents=True)
    if form == "torch":
        torch.save({"step": _Payload(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"step": _Payload(marker)}))
    (file.parent / CHECKSUM_NAME).write_bytes(checkpoint._checksum(file.read_bytes()))
    with pytest.raises(UserError, match="step_00000001"):
        read_checkpoint(file.parent)
    assert not marker.exists()
    # The file is no dud: where it is trusted, it does execute its code.
    torch.load(file, weights_only=False) if form == "torch" else pickle.loads(file.read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "text"])
def test_a_damaged_checkpoint_is_one_line_that_names_it(folder, damage):
    save(folder, 1)
    file = folder / "step_00000001" / STATE_NAME
    whole = file.read_bytes()
    file.write_bytes(
        {"cut": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "empty": b"", "text": b"not a checkpoint"}[damage]
    )
    with pytest.raises(UserError, match="step_00000001 is damaged") as error:
        read_checkpoint(folder / "step_00000001")
    assert "\n" not in str(error.value)


def test_no_flipped_bit_is_loaded_wherever_it_is(folder):
    save(folder, 1)
    file = folder / "step_00000001" / STATE_NAME
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="checksum"):
            read_checkpoint(folder / "step_00000001")
    file.write_bytes(whole)
    assert read_checkpoint(folder / "step_00000001")["step"] == 1


def test_a_path_without_a_checkpoint_is_told_with_the_way_on(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*--resume auto"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("metric, ends_after", [("accuracy", [3, 4, 5]), ("loss", [2, None, None])])
def test_early_stopping_counts_from_the_first_best_epoch_of_its_measure(metric, ends_after):
    epochs = [(0.5, 1.0), (0.8, 1.2), (0.8, 0.9), (0.7, 0.9), (0.75, 0.8)]
    rows = [{"epoch": n, "eval_accuracy": one, "eval_loss": other} for n, (one, other) in enumerate(epochs, 1)]
    states = [TrainState(history=rows[:count]) for count in range(len(rows) + 1)]
    for patience, expected in enumerate(ends_after, 1):
        config = TrainConfig(early_stopping_metric=metric, early_stopping_patience=patience)
        assert next((len(state.history) for state in states if state.out_of_patience(config)), None) == expected
    assert [state.best["epoch"] for state in states[1:]] == [1, 2, 2, 2, 2]
