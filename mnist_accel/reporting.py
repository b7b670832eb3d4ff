"""What a person sees of a run: lines on the terminal, the progress bar, the trackers. Only the main process speaks."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from huggingface_hub import get_token
from tqdm import tqdm

from mnist_accel.config import TrainConfig
from mnist_accel.data import ImageData
from mnist_accel.distributed import describe_device
from mnist_accel.loader import ResidentLoader
from mnist_accel.models import DigitClassifier, count_parameters


class Reporter:
    """Speaks for the run; every rank has one, and its methods do nothing beyond the main process."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.bar = tqdm(disable=True)

    def say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)
            sys.stdout.flush()

    def announce(self, data: ImageData, network: DigitClassifier, loader: ResidentLoader, evaluated: int) -> None:
        """What is about to run, on what: device, images, network, and how the global batch is shared out."""
        config, processes, micro_batches = self.config, self.accelerator.num_processes, loader.micro_batches
        shares = {"processes": processes, "micro-batches": micro_batches}
        shares["images"] = config.batch_size // processes // micro_batches
        product = " x ".join(f"{count} {name}" for name, count in shares.items() if count > 1 or name == "images")
        held_out = f", {evaluated:,} held out for validation" if config.validation_size else ""
        self.say(f"Device: {describe_device(self.accelerator)}")
        self.say(
            f"Data: {data.source}: {loader.num_images:,} training images{held_out}, "
            f"{len(data.test.labels):,} test images, {len(data.class_names)} classes"
        )
        self.say(
            f"Model: {config.model}, {count_parameters(network):,} parameters; recipe {config.recipe}; "
            f"global batch {config.batch_size} = {product}"
        )
        if config.push_to_hub and get_token() is None:
            self.say("warning: --push-to-hub needs a login: run `hf auth login` before training ends")

    def start_trackers(self, folder: Path, resumed_step: int | None) -> None:
        """Start the tracker that `--report-to` names, TensorBoard in `folder`/tensorboard.

        What an interrupted run had logged beyond the checkpoint it resumes from is purged by TensorBoard itself.
        """
        if self.config.report_to == "none":
            return
        self.accelerator.project_configuration.logging_dir = str(folder)
        tensorboard = self.config.report_to == "tensorboard"
        self.accelerator.init_trackers(
            "tensorboard" if tensorboard else "mnist_accel",
            # As hyperparameters TensorBoard would write a run of its own beside this one.
            config=None if tensorboard else self.config.options(),
            init_kwargs={"tensorboard": {"purge_step": 0 if resumed_step is None else resumed_step + 1}},
        )

    def start_epoch(self, epoch: int, images_done: int, images: int) -> None:
        """Show a bar for an epoch (0-based) where the output is a terminal."""
        name = f"Epoch {epoch + 1}/{self.config.epochs}"
        hidden = None if self.accelerator.is_main_process else True  # None: only where there is no terminal
        self.bar = tqdm(desc=name, initial=images_done, total=images, unit=" images", leave=False, disable=hidden)

    def log_step(self, step: int, epoch: int, done: int, images: int, loss: float, rate: float, speed: float) -> None:
        """A progress line, and the same numbers to the trackers; `loss` is the epoch's mean so far."""
        self.say(
            f"Epoch {epoch + 1}/{self.config.epochs} [{done:>{len(str(images))}}/{images} ({done / images:.0%})]  "
            f"Step: {step}  Loss: {loss:.4f}  Learning rate: {rate:.3g}  {speed:,.0f} images/s"
        )
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.accelerator.log({"train/loss": loss, "train/learning_rate": rate}, step=step)

    def log_row(self, row: dict[str, Any], unfinished: bool = False) -> None:
        """Log a row of metrics.jsonl; `unfinished` if of part of an epoch, which a resumed run writes anew.

        That and the last one go one step on: a resumed run has TensorBoard purge what lies beyond its checkpoint, and
        so these, were they logged before.
        """
        kind = "final" if "final" in row else "epoch"
        values = {f"{kind}/{name}": value for name, value in row.items() if name not in ("epoch", "final", "step")}
        self.accelerator.log(values, step=row["step"] + (kind == "final" or unfinished))

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Send a uint8 (H, W, 3) picture to the trackers that take pictures."""
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: picture[None]}, step=step, **kwargs)
