"""A run's folder: what lies in it, and writing each file so that a reader never sees half of one."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator

from mnist_accel import figures
from mnist_accel.checkpoint import complete_checkpoints, flush_folder, read_checkpoint
from mnist_accel.cli import UserError
from mnist_accel.config import PROVENANCE, TrainConfig, differing_options
from mnist_accel.data import ImageData, Split
from mnist_accel.distributed import describe_device
from mnist_accel.evaluation import Evaluation
from mnist_accel.model_card import model_card
from mnist_accel.models import DigitClassifier, save_model

OWN_NAMES = ("config.yaml", "metrics.jsonl", "best", "final", "checkpoints")


def choose_folder(config: TrainConfig) -> Path:
    """`--output-dir`, else the folder of the run that `--resume PATH` names, else `runs/<date-time>`."""
    if config.output_dir:
        return Path(config.output_dir)
    if config.resume not in (None, "auto"):
        resumed = Path(config.resume)  # type: ignore[arg-type]
        return resumed.parent.parent if resumed.name.startswith("step_") else resumed
    return Path("runs") / time.strftime("%Y-%m-%d_%H-%M-%S")


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".unfinished-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; make room or choose another --output-dir"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """The files of one run. Only the main process may write, so only it should make one.

    Raises:
        UserError: the folder holds another run, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def open(self, config: TrainConfig, fingerprint: str) -> dict[str, Any] | None:
        """Make the folder, or find the checkpoint to resume from; returns that checkpoint's content, or None to start.

        Raises:
            UserError: the folder holds another run, nothing is there to resume, or it is of other options or data.
        """
        checkpoint = None
        if config.resume == "auto":
            checkpoint = self._newest_readable()
        elif config.resume is not None:
            resumed = Path(config.resume)
            candidates = complete_checkpoints(resumed / "checkpoints")
            checkpoint = read_checkpoint(candidates[-1] if candidates else resumed)
        if checkpoint is not None:
            _refuse_other_run(checkpoint["options"], checkpoint["fingerprint"], config, fingerprint, "the checkpoint")
        elif any((self.path / name).exists() for name in OWN_NAMES):
            if config.resume != "auto":
                raise UserError(
                    f"{self.path} already holds a run: choose another --output-dir, or continue with --resume auto"
                )
            self._refuse_other_config(config, fingerprint)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the output folder {self.path} cannot be made: {error.strerror or error}; choose another --output-dir"
            ) from error
        self._adopt_best(config, checkpoint)
        return checkpoint

    def _newest_readable(self) -> dict[str, Any] | None:
        """The newest checkpoint that is not damaged; a damaged disk costs a checkpoint, not the run."""
        failure: UserError | None = None
        for path in reversed(complete_checkpoints(self.checkpoints)):
            try:
                return read_checkpoint(path)
            except UserError as error:
                print(f"warning: {error}", flush=True)
                failure = error
        if failure is not None:
            raise failure
        return None

    def _refuse_other_config(self, config: TrainConfig, fingerprint: str) -> None:
        """A run that died before its first checkpoint may start again, but not as another run."""
        try:
            earlier = yaml.safe_load((self.path / "config.yaml").read_text())
            then = earlier.get(PROVENANCE, {}).get("dataset_fingerprint", fingerprint)
        except (OSError, yaml.YAMLError, AttributeError):
            return
        _refuse_other_run(earlier, then, config, fingerprint, f"the run in {self.path}")

    def _adopt_best(self, config: TrainConfig, checkpoint: dict[str, Any] | None) -> None:
        """Bring along the best weights so far when a run goes on in a new folder."""
        if checkpoint is None or config.resume in (None, "auto"):
            return
        resumed = Path(config.resume)  # type: ignore[arg-type]
        for run in (resumed, resumed.parent.parent):
            if (run / "best").is_dir() and not (self.path / "best").exists():
                shutil.copytree(run / "best", self.path / "best")

    def write_config(self, config: TrainConfig, data: ImageData, accelerator: Accelerator) -> None:
        """`config.yaml`: every option as used, and under `provenance` what else it takes to repeat the run."""
        content = config.options() | {"output_dir": str(self.path)}
        content[PROVENANCE] = {
            "command": " ".join(sys.argv),
            "dataset_source": data.source,
            "dataset_fingerprint": data.fingerprint,
            "world_size": accelerator.num_processes,
            "micro_batches": accelerator.gradient_accumulation_steps,
            "mixed_precision": accelerator.mixed_precision,
            "device": describe_device(accelerator),
            "versions": {"torch": str(torch.__version__)}
            | {name: version(name) for name in ("mnist-accel", "accelerate", "datasets")},
        }
        with _written_whole(self.path / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(content, sort_keys=False))

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """`metrics.jsonl`, whole: rows come from the training state, so a resumed run neither doubles nor loses any."""
        with _written_whole(self.path / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_weights(self, name: str, model: DigitClassifier, facts: dict[str, Any]) -> None:
        """`best/` or `final/`: safetensors, config.json and the model card, each replaced whole."""
        folder = self.path / name
        staging = self.path / f".unfinished-{name}"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            save_model(model, staging, **facts)
            (staging / "README.md").write_text(model_card(model, facts))
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written: {error.strerror or error}; make room or choose another --output-dir"
            ) from error
        for file in sorted(staging.iterdir(), reverse=True):
            with _written_whole(folder / file.name) as temporary:
                file.rename(temporary)
        staging.rmdir()

    def draw_figures(self, history: list[dict[str, Any]], split: Split, result: Evaluation) -> dict[str, np.ndarray]:
        """`figures/`; returns the pictures by name, uint8 (H, W, 3)."""
        folder, names = self.path / "figures", result.class_names
        folder.mkdir(exist_ok=True)
        draw = {
            "curves": partial(figures.draw_curves, history),
            "confusion_matrix": partial(figures.draw_confusion_matrix, result.confusion, names),
            "mistakes": partial(figures.draw_mistakes, split.images, split.labels, result.probabilities, names),
        }
        pictures = {}
        for name, draw_to in draw.items():
            with _written_whole(folder / f"{name}.png") as temporary:
                pictures[name] = draw_to(temporary)
        return pictures


def _refuse_other_run(
    then: dict[str, Any], fingerprint_then: str, now: TrainConfig, fingerprint_now: str, what: str
) -> None:
    known = {field.name for field in fields(TrainConfig)}
    differences = differing_options({name: value for name, value in then.items() if name in known}, now)
    if fingerprint_then != fingerprint_now:
        differences.append(f"--dataset was other data (fingerprint {fingerprint_then[:12]}, is {fingerprint_now[:12]})")
    if differences:
        raise UserError(
            f"{what} is of another run: {'; '.join(differences)}: give the same options, or another --output-dir"
        )
