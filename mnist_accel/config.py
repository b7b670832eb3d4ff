"""Every option of training: one flat typed dataclass, read from the command line and YAML, validated once.

Imports nothing heavy, so that `--help` and a mistyped option answer at once.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnist_accel.cli import CommandLine, UserError
from mnist_accel.recipes import RECIPES

MODEL_NAMES = ("mnist_net", "fast_net", "compact_net", "residual_net")
OPTIMIZER_NAMES = ("adam", "adamw", "sgd")
SCHEDULER_NAMES = ("constant", "linear", "cosine", "onecycle")
AUGMENTATION_NAMES = ("affine", "elastic", "handwriting")
STOPPING_METRICS = ("accuracy", "loss")

# What a run's config.yaml holds beside its options; ignored when the file is read back with --config.
PROVENANCE = "provenance"
# Options that may differ between a checkpoint and the run that resumes it: they do not change what is computed.
FREE_ON_RESUME = {
    *("output_dir", "resume", "max_steps", "checkpoint_every", "keep_checkpoints", "log_every", "report_to"),
    *("early_stopping_patience", "early_stopping_metric", "gradient_accumulation_steps", "auto_batch_size"),
    *("deterministic", "recipe", "push_to_hub"),
}


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("must not be negative")
    return value


def _rate(text: str) -> float:
    value = 0.0 if text == "off" else float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("must be a finite number, not negative")
    return value


def _fraction(text: str) -> float:
    value = 0.0 if text == "off" else float(text)
    if not 0 <= value < 1:
        raise ValueError("must be at least 0 and below 1")
    return value


def _or_off(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() in ("off", "none") else parse(text)


def _checkpoint_interval(text: str) -> int | str:
    return text if text == "epoch" else _positive_int(text)


def _repository(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ValueError("must be of the form USER/NAME")
    return text


def option(default: Any, help: str, parse: Callable[[str], Any] = str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a command-line option; `parse` turns its text into its value."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Every option as used. Precision, devices and process counts belong to the launcher, not here."""

    dataset: str = option(
        "ylecun/mnist", "a Hub id, a folder in the Hub's parquet layout or of IDX files, or 'digits', the embedded set"
    )
    output_dir: str = option("", "the run's folder (default: runs/<date-time>)")
    recipe: str = option(
        "baseline", "a named set of hyperparameters; single options override it", choices=tuple(RECIPES)
    )
    model: str = option("mnist_net", "architecture", choices=MODEL_NAMES)
    epochs: int = option(10, "passes over the training images", _positive_int)
    batch_size: int = option(64, "images per optimizer step over ALL processes and accumulation steps", _positive_int)
    learning_rate: float = option(0.001, "peak learning rate", _rate)
    optimizer: str = option("adam", "optimizer; sgd has Nesterov momentum 0.9", choices=OPTIMIZER_NAMES)
    scheduler: str = option("constant", "course of the learning rate over all epochs", choices=SCHEDULER_NAMES)
    warmup_fraction: float = option(0.0, "part of all steps in which the rate rises from zero", _fraction)
    weight_decay: float = option(0.0, "of weight matrices and kernels; biases are left alone", _rate)
    dropout: float = option(0.5, "before the last layer", _fraction)
    label_smoothing: float = option(0.0, "probability mass spread over all classes", _fraction)
    ema_decay: float | None = option(None, "keep an exponential moving average of the weights", _or_off(_fraction))
    max_grad_norm: float | None = option(None, "clip the gradient's norm to this", _or_off(_rate))
    gradient_accumulation_steps: int = option(1, "micro-batches that a process splits its share into", _positive_int)
    augment: bool = option(False, "distort whole batches at random: rotation, translation, scale, shear")
    augmentation: str = option("affine", "which distortions --augment draws", choices=AUGMENTATION_NAMES)
    non_digits: int = option(
        0, "pictures of what is no digit to train on as well, each class as likely for them", _count
    )
    validation_size: int = option(
        0, "training images held out to choose best/; 0: each epoch evaluates on the test split", _count
    )
    early_stopping_patience: int | None = option(None, "stop after N epochs without a new best", _or_off(_positive_int))
    early_stopping_metric: str = option(
        "accuracy", "measure that early stopping watches; best/ is the most accurate epoch", choices=STOPPING_METRICS
    )
    max_steps: int | None = option(
        None, "stop after N optimizer steps; schedules still span all epochs", _or_off(_positive_int)
    )
    checkpoint_every: int | str = option("epoch", "'epoch' or a number of optimizer steps", _checkpoint_interval)
    keep_checkpoints: int = option(2, "complete checkpoints to keep", _positive_int)
    resume: str | None = option(
        None, "'auto': the newest complete checkpoint in --output-dir, else a fresh start; or a checkpoint's path",
        _or_off(str),
    )  # fmt: skip
    seed: int = option(0, "of initial weights, order of images, augmentation and dropout", _count)
    deterministic: bool = option(False, "bit-reproducible kernels; slower on a GPU")
    log_every: int = option(100, "optimizer steps between progress lines", _positive_int)
    report_to: str = option("tensorboard", "'none', or any tracker that Accelerate knows")
    push_to_hub: str | None = option(None, "USER/NAME: upload best/ as this model repository", _or_off(_repository))
    auto_batch_size: bool = option(
        False, "when memory runs out, halve the micro-batch and double accumulation; the global batch stays"
    )

    def options(self) -> dict[str, Any]:
        """Option names to values, in the order above."""
        return dataclasses.asdict(self)


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The options as used: defaults, then the recipe, then `--config FILE.yaml`, then the command line.

    Raises:
        UserError: an unknown option, key or value.
    """
    given = vars(_parser().parse_args(arguments))
    config_file = given.pop("config", None)
    from_file = _read_yaml(Path(config_file)) if config_file else {}
    recipe = given.get("recipe", from_file.get("recipe", "baseline"))
    return TrainConfig(**{**RECIPES[recipe], **from_file, **given})


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="train.py",
        description="Train on MNIST with Hugging Face Accelerate. Precision, devices and process counts "
        "are the launcher's: see `accelerate launch --help`.",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="options from a file; the command line wins"
    )
    for field in dataclasses.fields(TrainConfig):
        name = "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        if field.default != "":
            text += f" (default: {_as_text(field.default)})"
        if field.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            choices = field.metadata["choices"]
            parser.add_argument(
                name, default=argparse.SUPPRESS, help=text, type=_argument_type(field),
                metavar="{" + ",".join(choices) + "}" if choices else field.name.rsplit("_", 1)[-1].upper(),
            )  # fmt: skip
    return parser


def _argument_type(field: dataclasses.Field) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return _parse(field, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _parse(field: dataclasses.Field, text: str) -> Any:
    choices = field.metadata["choices"]
    if choices and text not in choices:
        raise ValueError(f"{text!r} is unknown: choose one of {', '.join(choices)}")
    try:
        return field.metadata["parse"](text)
    except ValueError as error:
        reason = str(error) if str(error).startswith("must") else "is not a number"
        raise ValueError(f"{text!r} {reason}") from error


def _as_text(value: Any) -> str:
    return "off" if value is None or value is False else "on" if value is True else str(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines of the form 'option: value'")
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name == PROVENANCE:
            continue
        if name not in fields:
            raise UserError(f"--config {path}: unknown option {key!r}; see train.py --help for the options")
        field = fields[name]
        try:
            if field.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(f"{value!r} is not true or false")
                options[name] = value
            elif isinstance(value, dict | list):
                raise ValueError("takes a single value")
            else:
                # YAML reads `off` as false and 1e-3 as text: the option's own parser decides what its text means.
                options[name] = _parse(field, "off" if value is None or value is False else str(value))
        except ValueError as error:
            raise UserError(f"--config {path}: option {key!r}: {error}") from error
    return options


def differing_options(then: dict[str, Any], now: TrainConfig) -> list[str]:
    """How the options of a checkpoint or an earlier run differ from today's where that changes what is computed."""
    free = FREE_ON_RESUME | ({"epochs"} if now.scheduler == "constant" and now.warmup_fraction == 0 else set())
    # Where the data lies does not matter, only what it is: its fingerprint is compared instead.
    free |= {"dataset"}
    return [
        f"--{name.replace('_', '-')} was {_as_text(then[name])}, is {_as_text(value)}"
        for name, value in now.options().items()
        if name not in free and name in then and then[name] != value
    ]
