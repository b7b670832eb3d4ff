"""Convolution and max-pool in the memory layout of oneDNN, which PyTorch computes with on x86 CPUs, for bf16 training.

PyTorch's own max-pool writes an int64 index beside every value, and its backward fills a full-size gradient with zeros
before it scatters into it: where values have two bytes that memory traffic is a third of a training step of
`mnist_net`. oneDNN's pool writes one byte an index and each gradient once, but takes tensors of its own layout only.
Additions and mean-pools are slower there, and in fp32 little is gained: it pays for convolutions and max-pools in bf16.
"""

import platform

import torch
from torch import Tensor, nn


def to_onednn(images: Tensor) -> Tensor:
    """The images (N, C, H, W) as bf16 in oneDNN's layout where bf16 autocast is on and it can train; else unchanged."""
    if torch.compiler.is_compiling() or images.device.type != "cpu":  # a compiler chooses layouts itself
        return images
    trains = (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return images.to_mkldnn(torch.bfloat16) if trains else images


def to_plain(x: Tensor) -> Tensor:
    """The tensor in PyTorch's own layout."""
    return x.to_dense() if x.is_mkldnn else x


class Convolution(nn.Conv2d):
    """`nn.Conv2d` that takes images in either layout; autocast does not know the operation on oneDNN's."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_mkldnn:
            return super().forward(x)
        assert self.bias is not None and not isinstance(self.padding, str)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)
