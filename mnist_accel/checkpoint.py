"""Complete training states on disk: written aside, flushed, renamed when complete, never half of one."""

import hashlib
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from mnist_accel.cli import UserError
from mnist_accel.config import TrainConfig
from mnist_accel.output import flush_folder, replacing, writing

STATE_NAME = "training_state.pt"
CHECKSUM_NAME = "training_state.sha256"  # as `sha256sum --check` reads it


@dataclass
class TrainState:
    """Where training stands; with weights and optimizer's state all that a resumed run needs (see `seeding.py`)."""

    step: int = 0  # optimizer steps done; at the end of an epoch saved only after its evaluation is in `history`
    history: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl so far
    loss_sum: float = 0.0  # cross-entropy summed over this epoch's images so far
    seconds: float = 0.0  # that this epoch has trained so far

    @property
    def best(self) -> dict[str, Any]:
        """The row of the most accurate epoch so far, the first of equals: the one whose weights `best/` holds."""
        return max(self.history, key=lambda row: row["eval_accuracy"])

    def out_of_patience(self, config: TrainConfig) -> bool:
        """Whether as many epochs in a row as early stopping waits for have brought nothing better."""
        if config.early_stopping_patience is None or not self.history:
            return False
        by_loss = config.early_stopping_metric == "loss"
        scores = [-row["eval_loss"] if by_loss else row["eval_accuracy"] for row in self.history]
        return len(scores) - 1 - scores.index(max(scores)) >= config.early_stopping_patience


def write_checkpoint(folder: Path, step: int, content: dict[str, Any], keep: int) -> None:
    """Write `content` (tensors, numbers, text, lists and dicts) as the checkpoint of `step`; the newest `keep` stay.

    Only the main process may do so. Raises a `UserError` where the disk refuses; earlier checkpoints are then intact.
    """
    target = folder / f"step_{step:08d}"
    unfinished = folder / f".unfinished-{target.name}"
    ways_on = "choose another --output-dir, then --resume: earlier checkpoints are intact"
    with writing(f"checkpoint {target}", ways_on):
        folder.mkdir(exist_ok=True)  # without its parents: a run's folder that has gone is not made again
        for leftover in folder.glob(".*"):  # of a write or a removal that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir()
        # Into memory first: of a full disk torch.save says only "unexpected pos" in a C++ file.
        serialized = BytesIO()
        torch.save(content, serialized)
        state = serialized.getvalue()  # not `getbuffer`: where its collector meets one, Python 3.12.1 crashes
        try:
            for name, data in ((STATE_NAME, state), (CHECKSUM_NAME, _checksum(state))):
                with replacing(unfinished / name) as file:
                    file.write_bytes(data)
            if target.exists():
                _remove(target)  # a run resumed from an older checkpoint comes by this step again
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        flush_folder(folder)
    # Steps beyond this one belong to a course that was given up by resuming from before them; they are left alone.
    older = [path for path in complete_checkpoints(folder) if path.name <= target.name]
    for path in older[:-keep]:
        with suppress(OSError):  # an old checkpoint that stays does no harm
            _remove(path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_" + 8 * "[0-9]") if path.is_dir())


def _remove(checkpoint: Path) -> None:
    # Renamed first: a half-deleted folder must not carry a complete checkpoint's name.
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".removed-{checkpoint.name}")), ignore_errors=True)


def _checksum(state: bytes) -> bytes:
    return f"{hashlib.sha256(state).hexdigest()}  {STATE_NAME}\n".encode()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of one checkpoint, tensors on the CPU, executing nothing; `UserError` if none is there, or half."""
    file = path / STATE_NAME
    if not file.is_file():
        raise UserError(f"no checkpoint at {path}: give a folder checkpoints/step_XXXXXXXX of a run, or --resume auto")
    try:
        state = file.read_bytes()
        if _checksum(state) != (path / CHECKSUM_NAME).read_bytes():  # torch.load compares none
            raise ValueError(f"its checksum is not that in {CHECKSUM_NAME}")
        return torch.load(BytesIO(state), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parts do: pickle, zip, runtime and key errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"checkpoint {path} is damaged ({reason}): remove it and resume from an earlier one, or begin anew"
        ) from error
