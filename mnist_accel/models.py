"""The networks, and how weights are written and read back.

Every network takes float images (N, 1, 28, 28) in 0..1, white ink on black, and returns logits (N, classes):
normalisation is inside it, so that an exported file needs none. The training loop also gives it `Dropout`'s mask.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_accel import SHIPPED
from mnist_accel.cli import UserError
from mnist_accel.hub import download_files, reason
from mnist_accel.metrics import confidences, fit_no_digit_level, fit_temperature
from mnist_accel.onednn import Convolution, to_onednn, to_plain

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
DIGITS = [str(digit) for digit in range(10)]
# Mean and standard deviation of MNIST's training pixels in 0..1.
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


class DigitClassifier(nn.Module):
    """What all networks share: a name, the classes, and how confidences follow from logits (`metrics.confidences`).

    `dataset` is what it was trained on, as `--dataset` names it, if that is known, and `inverted` whether the files of
    that are dark on light, so that it saw their negatives.
    """

    name: str
    class_names: list[str]
    dataset: str | None = None
    inverted = False
    dropout: "Dropout"
    temperature = 1.0
    no_digit_level = -math.inf

    def probabilities(self, logits: Tensor) -> Tensor:
        """The confidences that users see, float64 (N, C), for this network's logits (N, C)."""
        return confidences(logits, self.temperature, self.no_digit_level)

    def calibrate(self, logits: Tensor, labels: Tensor) -> None:
        """Fit both numbers to this network's logits (N, C) for images that it was not trained on; labels int64 (N,)."""
        self.temperature = fit_temperature(logits, labels)
        self.no_digit_level = fit_no_digit_level(logits, self.temperature)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - MNIST_MEAN) / MNIST_STD


class Dropout(nn.Dropout):
    """Dropout that can be given its mask, float (N, features): 0, or for what is kept 1 / (1 - dropout).

    Training draws it for the global batch: masks that each process draws for itself depend on their number.
    """

    def __init__(self, dropout: float, features: int) -> None:
        super().__init__(dropout)
        self.features = features

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) if mask is None else x * mask


class MnistNet(DigitClassifier):
    """The original network, 421,642 parameters at 10 classes.

    conv 3x3 1->32, ReLU, max-pool 2; conv 3x3 32->64, ReLU, max-pool 2; linear 3136->128, ReLU, dropout; linear.
    ReLU is monotonic, so it stands after each max-pool: the same function at a quarter of the work. bf16 training on a
    CPU convolves and pools in oneDNN's layout: 15% more images a second.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = Convolution(1, 32, 3, padding=1)
        self.conv2 = Convolution(32, 64, 3, padding=1)
        self.linear1 = nn.Linear(64 * 7 * 7, 128)
        self.dropout = Dropout(dropout, 128)
        self.linear2 = nn.Linear(128, num_classes)

    def forward(self, images: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        x = self.normalise(images)
        x = to_onednn(x) if self.training else x
        x = F.relu(F.max_pool2d(self.conv1(x), 2, stride=2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2, stride=2))
        x = F.relu(self.linear1(to_plain(x).flatten(1)))
        return self.linear2(self.dropout(x, dropout_mask))


class ResidualNet(DigitClassifier):
    """Five 3x3 convolutions, two of them residual, then the mean over all places: high accuracy in few parameters.

    There is no batch normalisation, whose statistics would depend on how a batch is split over processes. Instead the
    residual branches start at zero, so that training starts as a shallower network (Zhang et al. 2019, Fixup).
    """

    def __init__(self, num_classes: int, dropout: float, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.residual2 = nn.Conv2d(second, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.residual3 = nn.Conv2d(third, third, 3, padding=1)
        self.dropout = Dropout(dropout, third)
        self.linear = nn.Linear(third, num_classes)
        for convolution in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        for convolution in (self.residual2, self.residual3):
            nn.init.zeros_(convolution.weight)

    def forward(self, images: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        x = F.relu(F.max_pool2d(self.conv1(self.normalise(images)), 2))
        x = F.relu(self.conv2(x))
        x = F.relu(F.max_pool2d(x + self.residual2(x), 2))
        x = F.relu(self.conv3(x))
        x = F.avg_pool2d(F.relu(x + self.residual3(x)), 7)
        return self.linear(self.dropout(x.flatten(1), dropout_mask))


class StandardizedConvolution(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 / fan-in in each output channel, times a learned gain.

    With ReLUs scaled by `RELU_GAIN` the signal keeps its variance from layer to layer, as with batch normalisation
    (Brock et al. 2021, "Characterizing signal propagation to close the performance gap in unnormalized ResNets").
    """

    RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))

    def __init__(self, channels: int, filters: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(channels, filters, size, stride, padding)
        self.gain = nn.Parameter(torch.ones(filters, 1, 1, 1))
        self.fan_in = channels * size**2

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance + 1e-4) * (self.gain / math.sqrt(self.fan_in))
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class DeepNet(DigitClassifier):
    """Seven convolutions and no pooling, the highest accuracy: 325,994 parameters at 10 classes.

    Twice 3x3, 3x3, 5x5 with stride 2, of 32 and of 64 filters, then 4x4 to 128 features: the shape of Chris Deotte's
    network ("25 Million Images! [0.99757] MNIST", Kaggle 2018), with standardised weights in place of batch
    normalisation and dropout only at the end.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [
                StandardizedConvolution(1, 32, 3),
                StandardizedConvolution(32, 32, 3),
                StandardizedConvolution(32, 32, 5, stride=2, padding=2),
                StandardizedConvolution(32, 64, 3),
                StandardizedConvolution(64, 64, 3),
                StandardizedConvolution(64, 64, 5, stride=2, padding=2),
                StandardizedConvolution(64, 128, 4),
            ]
        )
        self.dropout = Dropout(dropout, 128)
        self.linear = nn.Linear(128, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)

    def forward(self, images: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        x = self.normalise(images)
        for convolution in self.convolutions:
            x = F.relu(convolution(x)) * StandardizedConvolution.RELU_GAIN
        return self.linear(self.dropout(x.flatten(1), dropout_mask))


class FastNet(DigitClassifier):
    """Little arithmetic for its accuracy: 32,506 parameters at 10 classes, less than half of the work of `MnistNet`.

    The first convolution has stride 2, so that nothing is ever computed on all 28x28 places: that is where a CPU spends
    its time on memory rather than on arithmetic.
    """

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(24, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.dropout = Dropout(dropout, 32 * 7 * 7)
        self.linear = nn.Linear(32 * 7 * 7, num_classes)

    def forward(self, images: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        x = F.relu(self.conv1(self.normalise(images)))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.conv3(x))
        return self.linear(self.dropout(x.flatten(1), dropout_mask))


# Name to a network of (classes, dropout). The names are repeated in config.py, which does without torch.
MODELS: dict[str, Callable[[int, float], DigitClassifier]] = {
    "mnist_net": MnistNet,
    "fast_net": FastNet,
    "compact_net": partial(ResidualNet, widths=(24, 48, 64)),  # 96,730 parameters at 10 classes
    "residual_net": partial(ResidualNet, widths=(32, 64, 128)),  # 278,474
    "deep_net": DeepNet,
}


def build_model(name: str, class_names: list[str] = DIGITS, dropout: float = 0.5) -> DigitClassifier:
    """A freshly initialised network in train mode, of a name in `MODELS`; it draws from torch's global generator."""
    model = MODELS[name](len(class_names), dropout)
    model.name, model.class_names = name, list(class_names)
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def model_files(model: DigitClassifier, /, **facts: Any) -> dict[str, bytes]:
    """What `load_model` reads of the unwrapped network: `model.safetensors` and `config.json`, name to content.

    `facts` are JSON values to record beside its name and classes, such as the data set and the accuracy.
    """
    # The plain contiguous layout: the file should not tell on which device or in what memory format it was trained.
    plain = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = {
        "model": model.name,
        "class_names": model.class_names,
        "input": {"shape": ["N", 1, 28, 28], "range": [0.0, 1.0], "ink": "white on black"},
        "inverted": model.inverted,
        "parameters": count_parameters(model),
        "temperature": model.temperature,
        "no_digit_level": model.no_digit_level if math.isfinite(model.no_digit_level) else None,
        **facts,
    }
    text = json.dumps(config, indent=2) + "\n"
    return {WEIGHTS_NAME: save(plain, metadata={"format": "pt"}), CONFIG_NAME: text.encode()}


def save_model(model: DigitClassifier, folder: Path, /, **facts: Any) -> None:
    """Write `model_files` into `folder`, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(model, **facts).items():
        (folder / name).write_bytes(content)


def load_model(path_or_hub_id: str | Path | None = None) -> DigitClassifier:
    """The network of a weights folder in eval mode on the CPU; reads safetensors and JSON only, never a pickle.

    The argument is a folder with `model.safetensors` and `config.json`, a run's folder (its `best/`, else `final/`), a
    Hub id `USER/NAME`, or None or "shipped" for the weights shipped in the package. Raises a `UserError` where nothing
    is there, or what is there is damaged or of another network.
    """
    folder = find_weights(path_or_hub_id)
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        if config["model"] not in MODELS:
            raise ValueError(f"{config['model']!r} is none of {', '.join(MODELS)}")
        model = build_model(config["model"], config["class_names"])
        model.temperature, level = float(config.get("temperature", 1.0)), config.get("no_digit_level")
        model.no_digit_level = -math.inf if level is None else float(level)
        model.dataset, model.inverted = config.get("dataset"), bool(config.get("inverted"))
        model.load_state_dict(load_file(folder / WEIGHTS_NAME))
        names = [*model.class_names, *filter(None, [model.dataset])]
        if not (0 < model.temperature < math.inf and all(isinstance(name, str) for name in names)):
            raise ValueError("a temperature is a number above 0, the classes and the data set have names")
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError("weights that are no finite numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{CONFIG_NAME} and {WEIGHTS_NAME} in {folder} are no network of this project ({reason(error)}): give "
            "another model, such as `shipped`"
        ) from error
    return model.eval()


def find_weights(path_or_hub_id: str | Path | None) -> Path:
    """The local folder that `load_model` reads for this argument, downloaded from the Hub if need be.

    Raises a `UserError` where there is no such folder and no such Hub repository.
    """
    if path_or_hub_id in (None, "shipped"):
        return SHIPPED
    path = Path(os.path.expanduser(path_or_hub_id))
    if path.is_dir():
        for folder in (path, path / "best", path / "final"):
            if (folder / WEIGHTS_NAME).is_file():
                return folder
        raise UserError(f"no {WEIGHTS_NAME} in {path}, nor in its best/ or final/: give a run's or a weights folder")
    if str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id).startswith((".", "/", "~")) or path.parent.is_dir():
        raise UserError(
            f"no model folder {path_or_hub_id}: give a run's folder, a weights folder or a Hub id USER/NAME"
        )
    return download_files(str(path_or_hub_id), (CONFIG_NAME, WEIGHTS_NAME))
