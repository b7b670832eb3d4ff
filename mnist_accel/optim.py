"""Optimizers, the learning rate as a pure function of the step, and an average of the weights."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mnist_accel.config import TrainConfig
from mnist_accel.models import DigitClassifier


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names, in its fused form; weight decay applies to matrices and kernels only."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if config.weight_decay:  # only then: each group costs a step one more kernel
        decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain}]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer]
    nesterov = {"momentum": 0.9, "nesterov": True} if config.optimizer == "sgd" else {}
    return _uncompiled(kind)(groups, lr=config.learning_rate, weight_decay=0.0, fused=True, **nesterov)


def _uncompiled(optimizer: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """A subclass of `optimizer` whose methods are not wrapped in what keeps torch.compile away from them.

    The wrappers import torch._dynamo, which takes as long as torch itself. Here only networks are compiled.
    """
    detours = "add_param_group", "zero_grad", "state_dict", "load_state_dict"
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in detours}
    methods["step"] = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), methods)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate for optimizer step `step` (0-based) of `total_steps`.

    A scheduler object counts its own calls, and a prepared one is called once a process; a function of the global step
    is right after a resume and on any number of processes. `onecycle` follows Smith & Topin 2018 in cosine form: it
    rises from 1/25 of the peak over the first 30% of the steps (or `warmup_fraction`) and falls to 1/10,000 of the
    start.
    """
    peak = config.learning_rate
    if config.scheduler == "onecycle":
        rise = max(1.0, (config.warmup_fraction or 0.3) * total_steps)
        if step < rise:
            return _cosine(peak / 25, peak, step / rise)
        return _cosine(peak, peak / 250_000, (step - rise) / max(1.0, total_steps - 1 - rise))
    warmup = config.warmup_fraction * total_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    if config.scheduler == "cosine":
        return _cosine(peak, 0.0, progress)
    if config.scheduler == "linear":
        return peak * (1 - progress)
    assert config.scheduler == "constant", config.scheduler
    return peak


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class WeightAverage:
    """An exponential moving average of the weights: `average = decay * average + (1 - decay) * weights` at each step.

    The decay rises as (1 + step) / (10 + step) until it reaches its value, so that the random first weights are soon
    forgotten (as in TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, model: DigitClassifier, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(tuple(self.model.parameters()), tuple(model.parameters()), 1 - decay)
