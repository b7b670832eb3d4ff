"""An exponential moving average of the weights."""

import copy

import torch
from torch import nn

from mnist_accel.models import DigitClassifier


class WeightAverage:
    """Keeps `average = decay * average + (1 - decay) * weights`, updated once an optimizer step.

    The decay rises as (1 + step) / (10 + step) until it reaches its value, so that the random first weights are soon
    forgotten (as in TensorFlow's ExponentialMovingAverage with `num_updates`).
    """

    def __init__(self, model: DigitClassifier, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self._average: list[torch.Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(self._average, weights, 1 - decay)
