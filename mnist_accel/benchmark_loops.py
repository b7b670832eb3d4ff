"""The loops that users would write instead of this project's: each runs in a process of its own for the benchmark.

`python -m mnist_accel.benchmark_loops NAME ARGUMENTS` (or `accelerate launch -m …`) calls a function with arguments in
JSON and prints what it returns as one line of JSON. `examples` is the loop of Accelerate's `examples/cv_example.py`,
`pytorch` that of PyTorch's `examples/mnist/main.py`.
"""

import json
import os
import platform
import re
import sys
import time
import timeit
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator, PartialState
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from mnist_accel.data import Split, load_data
from mnist_accel.distributed import keep_freed_memory
from mnist_accel.models import MNIST_MEAN, MNIST_STD, build_model, load_model, save_model


class PictureDataset(Dataset):
    """Images transformed one by one, as `torchvision.datasets.MNIST` with its usual transforms does."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split.images, split.labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MNIST_MEAN,), (MNIST_STD,))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index].numpy())), int(self.labels[index])


def mnist_net_as_described() -> nn.Sequential:
    """`mnist_net` with its layers in the order of its description: each ReLU before the max-pool."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


def pytorch_example_net() -> nn.Sequential:
    """The network of PyTorch's MNIST example: 1,199,882 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(dim=1)),
    )


def examples(dataset: str, steps: int, workers: int) -> dict[str, Any]:
    """The loop of Accelerate's examples, at batch 64; precision and device are the launcher's."""
    accelerator = Accelerator()
    split = load_data(dataset).train
    model = mnist_net_as_described()
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(PictureDataset(split), batch_size=64, shuffle=True, num_workers=workers)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    began, done = time.perf_counter(), 0
    for images, labels in islice(chain.from_iterable(repeat(loader)), steps):
        loss = F.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        done += len(labels)
    loss.item()  # waits for a GPU
    return {"images/s": done / (time.perf_counter() - began)}


def raw(dataset: str, steps: int, bf16: bool) -> dict[str, Any]:
    """The least that PyTorch can do: this project's network on resident tensors, with no framework around it."""
    torch.set_flush_denormal(True)
    keep_freed_memory()
    device = PartialState().device
    split = load_data(dataset).train
    images, labels = split.images.to(device), split.labels.to(device)
    model = build_model("mnist_net").to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    shuffled = (torch.randperm(len(labels)).to(device).split(64) for _ in count())  # anew for each pass
    began, done = time.perf_counter(), 0
    for indices in islice(chain.from_iterable(shuffled), steps):
        batch = images[indices].unsqueeze(1).float().div_(255)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(batch)
        F.cross_entropy(logits.float(), labels[indices]).backward()
        optimizer.step()
        optimizer.zero_grad()
        done += len(indices)
    next(model.parameters()).sum().item()  # waits for a GPU
    return {"images/s": done / (time.perf_counter() - began)}


def pytorch(dataset: str, seed: int, target: float, most_epochs: int = 14) -> dict[str, Any]:
    """PyTorch's MNIST example, stopped after the first epoch whose test accuracy is `target` or more."""
    device = PartialState().device
    torch.manual_seed(seed)
    data = load_data(dataset)
    train = DataLoader(PictureDataset(data.train), batch_size=64, shuffle=True)
    test = DataLoader(PictureDataset(data.test), batch_size=1000)
    model = pytorch_example_net().to(device)
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    accuracy, epoch = 0.0, 0
    while accuracy < target and epoch < most_epochs:
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            F.nll_loss(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
        scheduler.step()
        epoch += 1
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in test)
        accuracy = right / len(data.test.labels)
    return {"test accuracy": accuracy, "epochs": epoch}


def make_images(dataset: str, number: int, folder: str, model: str) -> dict[str, Any]:
    """Write `number` test images as PNG files into a new `folder`, and an untrained network into the folder `model`."""
    images = load_data(dataset).test.images
    Path(folder).mkdir()
    for index in range(number):
        Image.fromarray(images[index % len(images)].numpy()).save(Path(folder) / f"{index:06}.png")
    save_model(build_model("mnist_net"), Path(model))
    return {}


def predict(folder: str, model: str) -> dict[str, Any]:
    """Open and classify the images of a folder one by one."""
    device = PartialState().device
    network = load_model(model).to(device)
    transform = transforms.Compose([transforms.Grayscale(), transforms.Resize((28, 28)), transforms.ToTensor()])
    answers = []
    with torch.no_grad():
        for path in sorted(Path(folder).rglob("*.png")):
            answers.append(int(network(transform(Image.open(path)).unsqueeze(0).to(device)).argmax()))
    return {"images": len(answers)}


def machine() -> dict[str, Any]:
    """What the numbers were measured on, the arithmetic of a training image, and the rate of large matrix products."""
    device = PartialState().device
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(build_model("mnist_net").eval()(torch.zeros(1, 1, 28, 28)), torch.tensor([0])).backward()
    size = 2048 if device.type == "cpu" else 8192
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "devices": torch.cuda.device_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "operations_per_image": counter.get_total_flops(),
        "FLOP/s, fp32": _product_rate(size, torch.float32, device),
        "FLOP/s, bf16": _product_rate(size, torch.bfloat16, device),
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: *(.*\S)", described.read_text(), re.MULTILINE) if described.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def _product_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of the best of several square matrix products."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = "(left @ right)[0, 0].item()"  # reading a number waits for a GPU
    return 2 * size**3 / min(timeit.repeat(product, globals={"left": left, "right": right}, number=1, repeat=6))


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
