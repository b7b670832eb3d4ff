"""oneDNN's layout changes the speed of training, and nothing else."""

import platform

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_accel import onednn
from mnist_accel.models import build_model
from mnist_accel.onednn import Convolution, to_onednn, to_plain

on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64")
    or not torch.backends.mkldnn.is_available()
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN's layout is for x86 with bf16 kernels",
)


def images() -> Tensor:
    """Half of each is black, so that many windows of a max-pool hold four equal values."""
    batch = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    batch[..., :14] = 0
    return batch


def trained_once() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = build_model("mnist_net", dropout=0.0).to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
    F.cross_entropy(logits.float(), torch.arange(6)).backward()
    return logits, [parameter.grad for parameter in model.parameters()]


def layouts_of_convolutions(model: nn.Module, batch: Tensor, precision: torch.dtype) -> list[bool]:
    """Of each convolution in turn: whether its output is in oneDNN's layout; autocast is off for fp32 and fp64."""
    seen: list[bool] = []
    for module in model.modules():
        if isinstance(module, Convolution):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.is_mkldnn))
    with torch.autocast("cpu", precision, enabled=precision.itemsize == 2):
        model(batch)
    return seen


@on_x86
def test_logits_and_gradients_are_those_of_the_plain_layout(monkeypatch):
    logits, gradients = trained_once()
    monkeypatch.setattr("mnist_accel.models.to_onednn", lambda images: images)
    plain_logits, plain_gradients = trained_once()
    tolerance = 2e-2  # bf16 has 8 bits
    assert logits.dtype == plain_logits.dtype == torch.bfloat16
    assert torch.allclose(logits, plain_logits, atol=tolerance)
    for one, other in zip(gradients, plain_gradients, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@on_x86
def test_only_training_in_bf16_uses_it():
    def layouts(training: bool, precision: torch.dtype) -> list[bool]:
        return layouts_of_convolutions(build_model("mnist_net").train(training), images(), precision)

    assert layouts(True, torch.bfloat16) == [True, True]
    assert layouts(False, torch.bfloat16) == layouts(True, torch.float32) == [False, False]


@on_x86
def test_there_and_back_is_the_same_tensor():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_plain(to_onednn(images())), images().bfloat16())


@pytest.mark.parametrize("lacking", ["another processor", "no oneDNN", "no bf16 kernels", "float64", "float16"])
def test_where_onednn_cannot_train_the_plain_layout_does(lacking, monkeypatch):
    batch, precision = images(), torch.bfloat16
    if lacking == "another processor":
        monkeypatch.setattr(onednn.platform, "machine", lambda: "aarch64")
    elif lacking == "no oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif lacking == "no bf16 kernels":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    elif lacking == "float64":
        batch, precision = batch.double(), torch.float64
    else:
        precision = torch.float16
    model = build_model("mnist_net").to(batch.dtype).train()
    assert layouts_of_convolutions(model, batch, precision) == [False, False]


def test_a_compiled_network_trains_as_one_graph():
    torch.manual_seed(0)
    model = build_model("mnist_net", dropout=0.0).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = compiled(images()), model(images())
    logits.float().sum().backward()
    assert torch.allclose(logits, expected, atol=2e-2)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_kernels_that_repeat_their_bits_are_at_hand():
    torch.use_deterministic_algorithms(True)
    try:
        (_, gradients), (_, again) = trained_once(), trained_once()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
