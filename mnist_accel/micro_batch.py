"""Micro-batches: finding, together with all ranks, a size that fits into memory; room for their gradients."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_accel.cli import SharedError


def halvings_to_fit(
    accelerator: Accelerator, model: nn.Module, images: Tensor, labels: Tensor, mask: Tensor | None
) -> int:
    """How often a micro-batch must be halved until every rank has room for it.

    Each try runs forward and backward without exchanging gradients, so that a rank that runs out of memory leaves no
    other waiting inside a collective operation; then all ranks hear how it went, and all halve together. Shapes are
    the same in every step, so what fits once fits always. (Accelerate's `find_executable_batch_size` shrinks on one
    rank without telling the others.)

    Images, labels and mask are the whole micro-batch of a step, as in `StepBatch`. Raises a `SharedError` where it does
    not fit and cannot be halved further.
    """
    halvings = 0
    while True:
        size = len(labels) >> halvings
        failed = not _fits(accelerator, model, images[:size], labels[:size], None if mask is None else mask[:size])
        if not any(gather_object([failed])):
            return halvings
        if size % 2:
            raise SharedError(
                f"out of memory with micro-batches of {size}, which cannot be halved: choose a smaller --batch-size"
            )
        halvings += 1


def _fits(accelerator: Accelerator, model: nn.Module, images: Tensor, labels: Tensor, mask: Tensor | None) -> bool:
    model.train()
    try:
        with accelerator.no_sync(model):
            F.cross_entropy(model(images, mask), labels.clamp(min=0)).backward()  # negative: no digit, or no image
        return True
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU says so in the message only
        if not should_reduce_batch_size(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)


def allocate_gradients(model: nn.Module) -> None:
    """Give every parameter a gradient tensor, of zeros, that the gradients of all micro-batches are added to.

    Otherwise autograd keeps the tensor in which the first one arrives. From a CUDA graph (torch.compile's
    reduce-overhead) that is the graph's own memory, and the next micro-batch writes over it (PyTorch issue 169545).
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
