"""Every option of training: one flat typed dataclass, read from the command line and YAML, validated once.

Imports nothing heavy, so that `--help` and a mistyped option answer at once.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnist_accel.cli import COUNT, POSITIVE, CommandLine, UserError, number
from mnist_accel.recipes import RECIPES

MODEL_NAMES = ("mnist_net", "fast_net", "compact_net", "residual_net", "deep_net")
OPTIMIZER_NAMES = ("adam", "adamw", "sgd")
SCHEDULER_NAMES = ("constant", "linear", "cosine", "onecycle")
AUGMENTATION_NAMES = ("affine", "elastic", "handwriting")

SWITCH = argparse.BooleanOptionalAction
# What a run's config.yaml holds beside its options; ignored when the file is read back with --config.
PROVENANCE = "provenance"
# Options that may differ between a checkpoint and the run that resumes it: they do not change what is computed.
FREE_ON_RESUME = {
    *("output_dir", "resume", "max_steps", "checkpoint_every", "keep_checkpoints", "log_every", "report_to"),
    *("early_stopping_patience", "early_stopping_metric", "gradient_accumulation_steps", "auto_batch_size"),
    *("deterministic", "recipe", "push_to_hub"),
}
# Options of which the first process's count: the others may be given other ones.
FIRST_PROCESS_ONLY = {"output_dir", "resume", "report_to", "push_to_hub"}


def option(default: Any, help: str, **argument: Any) -> Any:
    """A dataclass field that is also a command-line option; `argument` goes to `add_argument`."""
    return dataclasses.field(default=default, metadata={"help": help, **argument})


def _text_or_off(text: str) -> str | None:
    return None if text.lower() in _OFF else text


def _repository_or_off(text: str) -> str | None:
    if text.lower() not in _OFF and not re.fullmatch(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]*\w)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form USER/NAME")
    return _text_or_off(text)


_RATE, _FRACTION = number(float, 0, words={"off": 0.0}), number(float, 0, 1, words={"off": 0.0})
_OFF = {"off": None, "none": None}
_COUNT_OR_OFF, _NUMBER_OR_OFF = number(int, 1, words=_OFF), number(float, 0, words=_OFF)


@dataclass(frozen=True)
class TrainConfig:
    """Every option as used. Precision, devices and process counts belong to the launcher, not here."""

    dataset: str = option(
        "ylecun/mnist", "a Hub id, a folder in the Hub's parquet layout or of IDX files, or 'digits', the embedded set"
    )
    output_dir: str = option("", "the run's folder (default: runs/<date-time>)")
    recipe: str = option("baseline", "named hyperparameters; single options override it", choices=tuple(RECIPES))
    model: str = option("mnist_net", "architecture", choices=MODEL_NAMES)
    epochs: int = option(10, "passes over the training images", type=POSITIVE)
    batch_size: int = option(64, "images per optimizer step over ALL processes and accumulation steps", type=POSITIVE)
    learning_rate: float = option(0.001, "peak learning rate", type=_RATE)
    optimizer: str = option("adam", "optimizer; sgd has Nesterov momentum 0.9", choices=OPTIMIZER_NAMES)
    scheduler: str = option("constant", "course of the learning rate over all epochs", choices=SCHEDULER_NAMES)
    warmup_fraction: float = option(0.0, "part of all steps in which the rate rises from zero", type=_FRACTION)
    weight_decay: float = option(0.0, "of weight matrices and kernels; biases are left alone", type=_RATE)
    dropout: float = option(0.5, "before the last layer", type=_FRACTION)
    label_smoothing: float = option(0.0, "probability mass spread over all classes", type=_FRACTION)
    ema_decay: float | None = option(None, "decay of an average of the weights", type=number(float, 0, 1, words=_OFF))
    max_grad_norm: float | None = option(None, "clip the gradient's norm to this, if over 0", type=_NUMBER_OR_OFF)
    gradient_accumulation_steps: int = option(1, "micro-batches that a process splits its share into", type=POSITIVE)
    augment: bool = option(False, "distort whole batches at random, as --augmentation says", action=SWITCH)
    augmentation: str = option("affine", "which distortions --augment draws", choices=AUGMENTATION_NAMES)
    non_digits: int = option(
        0, "pictures of no digit to train on, each class as likely for them", type=number(int, 0, 1e6)
    )
    validation_size: int = option(0, "training images held out to choose best/; 0: the test split does", type=COUNT)
    early_stopping_patience: int | None = option(None, "stop after N epochs without a new best", type=_COUNT_OR_OFF)
    early_stopping_metric: str = option("accuracy", "what early stopping watches", choices=("accuracy", "loss"))
    max_steps: int | None = option(None, "stop after N steps; schedules still span all epochs", type=_COUNT_OR_OFF)
    checkpoint_every: int | str = option("epoch", "or a number of steps", type=number(int, 1, words={"epoch": "epoch"}))
    keep_checkpoints: int = option(2, "complete checkpoints to keep", type=POSITIVE)
    resume: str | None = option(
        None, "'auto': from the newest checkpoint in --output-dir, if any; or a checkpoint's path", type=_text_or_off
    )
    seed: int = option(0, "of initial weights, order of images, augmentation and dropout", type=COUNT)
    deterministic: bool = option(False, "bit-reproducible kernels; slower on a GPU", action=SWITCH)
    log_every: int = option(100, "optimizer steps between progress lines; each epoch ends with one too", type=POSITIVE)
    report_to: str = option(
        "tensorboard", "'none', or any tracker that Accelerate knows", type=lambda text: _text_or_off(text) or "none"
    )
    push_to_hub: str | None = option(None, "USER/NAME: upload best/ as this model repository", type=_repository_or_off)
    auto_batch_size: bool = option(False, "out of memory: halve the micro-batch, double accumulation", action=SWITCH)

    def __post_init__(self) -> None:
        for name, value in self.options().items():
            if isinstance(value, Path):  # from Python; what is recorded of a run is text
                object.__setattr__(self, name, str(value))

    def options(self) -> dict[str, Any]:
        """Option names to values, in the order above."""
        return dataclasses.asdict(self)


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The options as used: defaults, then the recipe, then `--config FILE.yaml`, then the command line.

    Raises a `UserError` that names an unknown option, key or value.
    """
    launcher = "Precision, devices and process counts are the launcher's: see `accelerate launch --help`."
    parser = CommandLine(prog="train.py", description=f"Train on MNIST with Hugging Face Accelerate. {launcher}")
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a file; the command line wins")
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **field.metadata)

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if path := parser.parse_args(arguments).config:
        try:
            from_file = _file_arguments(Path(path), any(each.startswith("--recipe") for each in arguments))
            parser.parse_args(from_file)
        except OSError as error:
            raise UserError(f"--config {path}: {error.strerror}; give a file of lines 'option: value'") from error
        except (UnicodeDecodeError, yaml.YAMLError, UserError) as error:
            raise UserError(f"--config {path}: {error}") from error
        arguments = from_file + arguments
    parser.set_defaults(**RECIPES[parser.parse_args(arguments).recipe])
    options = vars(parser.parse_args(arguments))
    del options["config"]
    if not options["augment"] and options["augmentation"] != parser.get_default("augmentation"):
        raise UserError(f"--augmentation {options['augmentation']} draws nothing by itself: add --augment")
    for name, value in options.items():
        if isinstance(value, str) and value != value.encode(errors="ignore").decode():
            raise UserError(f"--{name.replace('_', '-')} {value!r} is not in UTF-8: give another name")
    return TrainConfig(**options)


def _file_arguments(path: Path, names_recipe: bool) -> list[str]:
    """The options in a YAML file as they would stand on the command line, which may itself name a recipe."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise UserError("it must hold lines of the form 'option: value'")
    if PROVENANCE in content and names_recipe:
        raise UserError("a run's record holds every option, so that --recipe would change none: leave out one of them")
    defaults = TrainConfig().options()
    arguments = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        # A run's own record repeats what the run computed, not where that began or was sent.
        elsewhere = name == "push_to_hub" or (name == "resume" and value != "auto")
        if name == PROVENANCE or (PROVENANCE in content and elsewhere):
            continue
        if name not in defaults:
            raise UserError(f"unknown option {key!r}; see train.py --help for the options")
        if value is None and defaults[name] is not None:
            continue  # `option:` with nothing behind it
        if value is True or (value is False and defaults[name] is False):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:  # YAML reads `off` as false
            arguments.append(f"--{name}={'off' if value is None or value is False else value}")
    return arguments


def differing_options(then: dict[str, Any], now: TrainConfig) -> list[str]:
    """How the options of a checkpoint or an earlier run differ from today's where that changes what is computed."""
    # Where the data lies does not matter, only what it is: its fingerprint is compared instead.
    free = FREE_ON_RESUME | {"dataset"}
    if now.scheduler == "constant" and now.warmup_fraction == 0:
        free |= {"epochs"}
    return [
        f"--{name.replace('_', '-')} was {then[name]}, is {value}"
        for name, value in now.options().items()
        if name not in free and name in then and then[name] != value
    ]
