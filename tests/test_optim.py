"""The learning rate is a function of the step; weight decay leaves biases alone."""

import itertools
import math
from copy import deepcopy

import pytest
import torch

from mnist_accel.config import OPTIMIZER_NAMES, SCHEDULER_NAMES, TrainConfig
from mnist_accel.models import build_model
from mnist_accel.optim import build_optimizer, learning_rate

TOTAL = 1000


def rates(scheduler: str, warmup_fraction: float = 0.0, peak: float = 0.5, total: int = TOTAL) -> list[float]:
    config = TrainConfig(scheduler=scheduler, warmup_fraction=warmup_fraction, learning_rate=peak)
    return [learning_rate(step, total, config) for step in range(total)]


def falls(values: list[float]) -> bool:
    return all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_constant_is_the_given_rate_at_every_step():
    assert set(rates("constant")) == {0.5}


def test_cosine_follows_half_a_cosine_from_the_peak_to_zero():
    expected = [0.5 * (1 + math.cos(math.pi * step / TOTAL)) / 2 for step in range(TOTAL)]
    assert rates("cosine") == pytest.approx(expected)
    assert rates("cosine")[0] == 0.5 and 0 < rates("cosine")[-1] < 1e-5


def test_linear_falls_evenly_to_zero():
    assert rates("linear") == pytest.approx([0.5 * (1 - step / TOTAL) for step in range(TOTAL)])


def test_onecycle_rises_over_three_tenths_and_falls_to_almost_nothing():
    values = rates("onecycle")
    assert values[0] == pytest.approx(0.5 / 25)
    assert max(values) == values[300] == pytest.approx(0.5)
    assert falls(values[300:]) and falls(values[300::-1])
    assert values[-1] == pytest.approx(0.5 / 250_000)


def test_onecycle_is_two_half_cosines():
    values = rates("onecycle")
    for step, start, end, progress in ((75, 0.02, 0.5, 1 / 4), (150, 0.02, 0.5, 1 / 2), (300 + 233, 0.5, 2e-6, 1 / 3)):
        expected = start + (end - start) * (1 - math.cos(math.pi * progress)) / 2
        assert values[step] == pytest.approx(expected, rel=1e-6)


def test_onecycle_takes_its_rise_from_the_warmup_fraction():
    values = rates("onecycle", warmup_fraction=0.1)
    assert values.index(max(values)) == 100


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "linear"])
def test_warmup_rises_evenly_from_above_zero_to_the_peak(scheduler):
    values = rates(scheduler, warmup_fraction=0.1)
    assert values[:100] == pytest.approx([0.5 * (step + 1) / 101 for step in range(100)])
    assert values[100] == pytest.approx(0.5) and max(values) <= 0.5
    assert falls(values[100:])


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_short_runs_get_finite_rates_that_never_exceed_the_peak(scheduler, warmup_fraction, total):
    values = rates(scheduler, warmup_fraction, total=total)
    assert all(0 <= value <= 0.5 and math.isfinite(value) for value in values)
    assert values[0] > 0


@pytest.mark.parametrize("scheduler", SCHEDULER_NAMES)
def test_the_rate_scales_with_the_peak(scheduler):
    assert rates(scheduler, 0.2, peak=2.0) == pytest.approx([4 * value for value in rates(scheduler, 0.2, peak=0.5)])


@pytest.mark.parametrize(
    "name, kind", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_weight_decay_applies_to_matrices_and_kernels_only(name, kind):
    model = build_model("mnist_net")
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.1, learning_rate=0.2))
    assert type(optimizer).__bases__ == (kind,) and name in OPTIMIZER_NAMES
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, ending in ((decayed, ".weight"), (plain, ".bias")):
        assert {names[parameter] for parameter in group["params"]} == {n for n in names.values() if n.endswith(ending)}
    assert all(group["lr"] == 0.2 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_without_weight_decay_nothing_decays_and_one_kernel_does_it_all(name):
    model = build_model("mnist_net")
    (group,) = build_optimizer(model, TrainConfig(optimizer=name)).param_groups
    assert group["weight_decay"] == 0.0 and group["fused"]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_weights_move_bit_for_bit_as_by_the_optimizer_of_torch(name):
    ours = build_optimizer(build_model("mnist_net"), TrainConfig(optimizer=name, weight_decay=0.1))
    groups = [{**group, "params": [p.detach().clone() for p in group["params"]]} for group in ours.param_groups]
    theirs = type(ours).__bases__[0](groups)
    for step in range(3):
        for optimizer in (ours, theirs):
            torch.manual_seed(step)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:  # and their states are of one form
            ours.load_state_dict(deepcopy(theirs.state_dict()))
    for own, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own["params"], other["params"], strict=True))


def test_sgd_has_nesterov_momentum():
    optimizer = build_optimizer(build_model("mnist_net"), TrainConfig(optimizer="sgd"))
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in optimizer.param_groups)
