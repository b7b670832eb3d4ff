"""One process, two processes and gradient accumulation give the same numbers."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from launching import train
from safetensors.torch import load_file
from small_data import make_small_dataset

from mnist_accel.config import parse_config
from mnist_accel.data import load_data
from mnist_accel.evaluation import predict_logits
from mnist_accel.models import build_model, load_model
from mnist_accel.optim import learning_rate
from mnist_accel.run_folder import CONTENT
from mnist_accel.seeding import derive_seed, generator

SGD = ["--optimizer", "sgd", "--learning-rate", "0.05", "--dropout", "0.3", "--augment"]
SGD += ["--batch-size", "16", "--epochs", "3"]


def weights(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same training on one process, on two, and in micro-batches; 150 images make a short last batch of 6."""
    base = tmp_path_factory.mktemp("same_numbers")
    data = make_small_dataset(base / "data")
    common = ["--dataset", str(data), *SGD, "--scheduler", "onecycle", "--max-grad-norm", "1", "--ema-decay", "0.9"]
    folders = {}
    for name, processes, options in (
        ("one", 1, []),
        ("two", 2, []),
        ("accumulated", 1, ["--gradient-accumulation-steps", "2"]),
        ("two accumulated", 2, ["--gradient-accumulation-steps", "4"]),
    ):
        folders[name] = base / name
        train([*common, *options, "--output-dir", str(base / name)], base / f"{name} logs", processes=processes)
    return data, folders


@pytest.mark.parametrize("name", ["two", "accumulated", "two accumulated"])
def test_weights_do_not_depend_on_processes_or_accumulation(runs, name):
    _, folders = runs
    for one, other in zip(weights(folders["one"]).values(), weights(folders[name]).values(), strict=True):
        assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["two", "accumulated", "two accumulated"])
def test_metrics_do_not_depend_on_processes_or_accumulation(runs, name):
    _, folders = runs
    for one, other in zip(rows(folders["one"]), rows(folders[name]), strict=True):
        for key in one.keys() - {"train_seconds", "images_per_second"}:
            assert other[key] == pytest.approx(one[key], abs=2e-5), key


@pytest.mark.parametrize("name", ["one", "two"])
def test_evaluation_counts_each_image_once(runs, name):
    data, folders = runs
    test = load_data(str(data)).test
    logits = predict_logits(load_model(folders[name] / "final"), test.images, torch.device("cpu"))
    accuracy = (logits.argmax(dim=1) == test.labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits.double(), test.labels).item()
    assert rows(folders[name])[-1]["test_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert rows(folders[name])[-1]["test_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("name, processes", [("one", 1), ("two", 2)])
def test_the_record_of_a_run_names_its_number_of_processes(runs, name, processes):
    _, folders = runs
    assert yaml.safe_load((folders[name] / "config.yaml").read_text())["provenance"]["world_size"] == processes


def test_training_changed_the_weights_and_the_average_differs_from_them(runs):
    _, folders = runs
    state = torch.load(sorted((folders["one"] / "checkpoints").iterdir())[-1] / "training_state.pt", weights_only=True)
    assert state.keys() == CONTENT
    averaged = weights(folders["one"])
    assert all(torch.equal(state["average"][name], averaged[name]) for name in averaged)
    assert any((state["model"][name] - averaged[name]).abs().max() > 1e-4 for name in averaged)


def test_a_training_is_what_a_plain_loop_over_whole_batches_computes(small_dataset, tmp_path):
    """Twenty steps, of which each tenth is of 6 images, with all that changes a step but draws no numbers."""
    options = shlex.split(
        "--batch-size 16 --epochs 2 --dropout 0 --optimizer sgd --learning-rate 0.02 --weight-decay 0.5 --ema-decay 0.8"
        " --scheduler cosine --label-smoothing 0.2 --max-grad-norm 1 --gradient-accumulation-steps 4"
    )
    options += ["--dataset", str(small_dataset)]
    train([*options, "--output-dir", str(tmp_path / "run")], tmp_path / "logs", processes=2)
    config, data = parse_config(options), load_data(str(small_dataset)).train
    torch.manual_seed(derive_seed(config.seed, "weights"))
    network = build_model(config.model, dropout=0.0)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    kernels, biases = ([p for p in network.parameters() if (p.ndim > 1) == large] for large in (True, False))
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    orders = [torch.randperm(150, generator=generator(config.seed, "order", epoch)) for epoch in range(2)]
    losses = [0.0, 0.0]
    for step, indices in enumerate(batch for order in orders for batch in order.split(16)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 20, config)
        logits = network(data.images[indices].unsqueeze(1) / 255)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits, data.labels[indices], label_smoothing=0.2)
        loss.backward()
        losses[step // 10] += loss.item() * len(indices) / 150
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.8, (2 + step) / (11 + step))
        for kept, now in zip(average, network.parameters(), strict=True):
            kept.mul_(decay).add_(now.detach(), alpha=1 - decay)
    trained = weights(tmp_path / "run")
    for (name, _), expected in zip(network.named_parameters(), average, strict=True):
        assert (trained[name] - expected).abs().max() < 1e-5, name
    for epoch, row in enumerate(rows(tmp_path / "run")[:2]):
        assert row["train_loss"] == pytest.approx(losses[epoch], abs=1e-5)
        assert row["learning_rate"] == learning_rate(10 * epoch + 9, 20, config)


def test_two_processes_in_bf16_say_nothing_that_nobody_can_mend(small_dataset, tmp_path):
    options = ["--dataset", str(small_dataset), "--max-steps", "1", "--batch-size", "16", "--report-to", "none"]
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    job = train([*options, "--output-dir", str(tmp_path / "run")], tmp_path / "logs", processes=2, environment=bf16)
    assert "Warning" not in job.output()
