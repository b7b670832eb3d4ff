"""A run's folder: what lies in it, and writing each file so that a reader never sees half of one."""

import json
import os
import re
import shlex
import sys
import time
from contextlib import ExitStack, suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from filelock import BaseFileLock, FileLock, Timeout

from mnist_accel import __version__, figures
from mnist_accel.checkpoint import STATE_NAME, complete_checkpoints, read_checkpoint
from mnist_accel.cli import UserError
from mnist_accel.config import PROVENANCE, TrainConfig, differing_options
from mnist_accel.data import ImageData, Split, hub_dataset
from mnist_accel.distributed import describe_device
from mnist_accel.evaluation import Evaluation
from mnist_accel.model_card import model_card
from mnist_accel.models import DigitClassifier, model_files
from mnist_accel.output import replacing, write_picture, writing

# What a checkpoint holds; by the options and the data's fingerprint it is known of which run it is.
CONTENT = {"options", "fingerprint", "mixed_precision", "state", "model", "average"}
CONTENT |= {"best_files", "optimizer", "scaler"}
OWN_NAMES = ("config.yaml", "metrics.jsonl", "best", "final", "checkpoints")
ANOTHER_FOLDER = "choose another --output-dir"
LOCK_NAME = ".lock"
LOCK_SECONDS = 20.0  # how long to wait for another training in the same folder, such as one that is being stopped


def choose_folder(config: TrainConfig) -> Path:
    """`--output-dir`, else the folder of the run that `--resume PATH` names, else a new `runs/<date-time>`."""
    return _given_folder(config) or Path("runs", time.strftime("%Y-%m-%d_%H-%M-%S"))


def _claimed(path: Path) -> Path:
    """A new folder of this name; where another run that started in the same second has it, with a number behind it."""
    folder, numbers = path, count(2)
    while True:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        folder = path.with_name(f"{path.name}-{next(numbers)}")


def _given_folder(config: TrainConfig) -> Path | None:
    """`--output-dir`, else the run that `--resume PATH` names itself or by one of its checkpoints; None for neither."""
    if config.output_dir:
        return Path(os.path.expanduser(config.output_dir))
    if config.resume is None or config.resume == "auto":
        return None
    resumed = Path(os.path.expanduser(config.resume))
    if not (resumed / STATE_NAME).exists() and not re.fullmatch(r"step_\d{8,}", resumed.name):
        return resumed
    checkpoints = resumed.resolve().parent
    if checkpoints.name != "checkpoints":
        raise UserError(f"{resumed} is not in a run's checkpoints/: give an --output-dir for the run that goes on")
    return checkpoints.parent


class RunFolder:
    """The files of one run; the methods that write raise `UserError` where they cannot.

    Only the main process may write, so only it should call them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BaseFileLock | None = None  # of the process that trains here

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def open(self, config: TrainConfig, fingerprint: str, last_step: int) -> dict[str, Any] | None:
        """Make the folder, or find the checkpoint to resume from; returns that checkpoint's content, or None to start.

        Until `close`, or the process's end, other trainings are kept out. Raises a `UserError` where the folder holds
        another run, another process trains in it, nothing is there to resume, or what is there is of other options or
        data or beyond the run's last step.
        """
        new_folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            with writing(self.path, ANOTHER_FOLDER):
                if _given_folder(config) is None:
                    self.path = _claimed(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
            self._keep_others_out()  # before looking: a run that is being stopped still writes
            return self._begin(config, fingerprint, last_step)
        except UserError:  # what is refused is left as it was
            self.close()
            for folder in new_folders:
                with suppress(OSError):
                    folder.rmdir()
            raise

    def close(self) -> None:
        """The run is over: nothing but what it leaves stays in the folder, and another training may begin there."""
        if self._lock is not None:
            with suppress(OSError):  # before it is unlocked: who waits for this file then locks the next one
                (self.path / LOCK_NAME).unlink()
            self._lock.release()
            self._lock = None

    def _begin(self, config: TrainConfig, fingerprint: str, last_step: int) -> dict[str, Any] | None:
        candidates, elsewhere = [], False
        if config.resume == "auto":
            if not config.output_dir:
                print("warning: --resume auto finds nothing without --output-dir: a run of its own begins", flush=True)
            candidates = complete_checkpoints(self.checkpoints)
        elif config.resume is not None:
            resumed = Path(os.path.expanduser(config.resume))
            candidates = complete_checkpoints(resumed / "checkpoints") or [resumed]
            elsewhere = not candidates[0].resolve().is_relative_to(self.path.resolve())
        begun = self._started_with()
        # `--resume PATH` given again goes on with what it began, as `--resume auto` does.
        given_again = elsewhere and begun.get("options", {}).get("resume") == config.resume
        if given_again and (own := complete_checkpoints(self.checkpoints)):
            candidates, elsewhere = own, False
        checkpoint = _newest_readable(candidates)
        earlier, what = checkpoint or {}, "the checkpoint"
        if (checkpoint is None or elsewhere) and any((self.path / name).exists() for name in OWN_NAMES):
            may_continue = config.resume == "auto" or given_again
            unknown = not begun and (self.path / "best").exists()  # somebody's weights, without the rest of the run
            if not may_continue or unknown or (self.path / "final").exists():
                raise UserError(
                    f"{self.path} already holds a run: choose another --output-dir, or continue with --resume auto"
                )
            if checkpoint is None:  # it died before its first: it may start again, but not as another run
                earlier, what = begun, f"the run in {self.path}"
        differences = differing_options(earlier.get("options", {}), config)
        data = earlier.get("fingerprint", fingerprint)
        if data != fingerprint:
            differences.append(f"--dataset was other data (fingerprint {data[:12]}, is {fingerprint[:12]})")
        if differences:
            raise UserError(
                f"{what} is of another run: {'; '.join(differences)}: give the same options, or another --output-dir"
            )
        if checkpoint and checkpoint["state"]["step"] > last_step:
            raise UserError(
                f"the checkpoint is of step {checkpoint['state']['step']}, and {last_step} steps are asked for: give "
                "more --epochs or --max-steps, or another --output-dir"
            )
        return checkpoint

    def _keep_others_out(self) -> None:
        """Keep other trainings out of the folder while this process lives, where the file system can."""
        # Without real locks nothing is locked: a mere file would outlive a process that is killed.
        lock = FileLock(self.path / LOCK_NAME, timeout=LOCK_SECONDS, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is training in {self.path}: wait for its end, or choose another --output-dir"
            ) from error
        except OSError:  # no locks here; or the folder cannot be written, which is told when it is written
            pass
        self._lock = lock

    def _started_with(self) -> dict[str, Any]:
        """Options and data as `config.yaml` has them, under a checkpoint's names; nothing where it is unreadable."""
        try:
            options = yaml.safe_load((self.path / "config.yaml").read_text())
            return {"options": options, "fingerprint": options[PROVENANCE]["dataset_fingerprint"]}
        except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
            return {}

    def write_config(self, config: TrainConfig, data: ImageData, accelerator: Accelerator) -> None:
        """`config.yaml`: every option as used, and under `provenance` what else it takes to repeat the run."""
        content = config.options() | {"output_dir": str(self.path)}
        content["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps  # the launcher's count first
        if config.dataset != "digits" and hub_dataset(config.dataset) is None:  # the run may be repeated from elsewhere
            content["dataset"] = os.path.abspath(os.path.expanduser(config.dataset))
        content[PROVENANCE] = {
            "command": shlex.join(sys.argv),
            "dataset_source": data.source,
            "dataset_fingerprint": data.fingerprint,
            "world_size": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
            "device": describe_device(accelerator),
            "versions": {"torch": str(torch.__version__), "mnist-accel": __version__}
            | {name: version(name) for name in ("accelerate", "datasets")},
        }
        self.write_files("", {"config.yaml": yaml.safe_dump(content, sort_keys=False).encode()})

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """`metrics.jsonl`, whole: rows come from the training state, so a resumed run neither doubles nor loses any."""
        self.write_files("", {"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})

    def write_weights(self, name: str, model: DigitClassifier, facts: dict[str, Any]) -> dict[str, bytes]:
        """`best/` or `final/`: safetensors, config.json and the model card; returns each file's content by its name."""
        files = model_files(model, **facts) | {"README.md": model_card(model, facts).encode()}
        self.write_files(name, files)
        return files

    def write_files(self, name: str, files: dict[str, bytes]) -> None:
        """Files of the run's folder, or of the folder `name` in it, name to content, each replaced whole."""
        folder = self.path / name
        # Each takes its place only once all are written.
        with writing(folder, ANOTHER_FOLDER), ExitStack() as all_or_none:
            if name:  # a run's own folder that has gone is not made again
                folder.mkdir(exist_ok=True)
            for file, content in files.items():
                all_or_none.enter_context(replacing(folder / file)).write_bytes(content)

    def draw_figures(self, history: list[dict[str, Any]], split: Split, result: Evaluation) -> dict[str, np.ndarray]:
        """`figures/`; returns the pictures by name, uint8 (H, W, 3)."""
        names = result.class_names
        pictures = {
            "curves": figures.draw_curves(history),
            "confusion_matrix": figures.draw_confusion_matrix(result.confusion, names),
            "mistakes": figures.draw_mistakes(split.images, split.labels, result.probabilities, names),
        }
        for name, picture in pictures.items():
            write_picture(picture, self.path / "figures" / f"{name}.png")
        return pictures


def _newest_readable(candidates: list[Path]) -> dict[str, Any] | None:
    """The newest checkpoint that is not damaged; a damaged disk costs a checkpoint, not the run."""
    for path in reversed(candidates):
        try:
            checkpoint = read_checkpoint(path)
            if not (isinstance(checkpoint, dict) and checkpoint.keys() >= CONTENT):
                raise UserError(f"{path} is no checkpoint of this version: train anew, in another --output-dir")
            return checkpoint
        except UserError as error:
            if path == candidates[0]:
                raise
            print(f"warning: {error}", flush=True)
    return None
