"""The networks are what they are said to be; weights come back as they were saved, and nothing else is taken for weights."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mnist_accel
from mnist_accel.cli import UserError
from mnist_accel.config import MODEL_NAMES
from mnist_accel.models import MODELS, SHIPPED, build_model, count_parameters, find_weights, load_model, save_model


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return build_model("mnist_net").eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_model(model, tmp_path / "weights", dataset="digits")
    return tmp_path / "weights"


# The networks


def test_mnist_net_has_the_parameters_of_the_original(model):
    assert count_parameters(model) == 421_642
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "weight" in name}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv2.weight": (64, 32, 3, 3),
        "linear1.weight": (128, 3136),
        "linear2.weight": (10, 128),
    }


def test_mnist_net_is_the_textbook_sequence_of_layers(model):
    textbook = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    ).eval()  # fmt: skip
    textbook.load_state_dict(dict(zip(textbook.state_dict(), model.state_dict().values(), strict=True)))
    normalised = (images() - 0.1307) / 0.3081
    assert torch.allclose(model(images()), textbook(normalised), atol=1e-5)


def test_dropout_is_where_the_option_says_and_only_in_training():
    model = build_model("mnist_net", dropout=0.9)
    batch = images(1).expand(2, -1, -1, -1)
    assert not torch.allclose(*model.train()(batch)) and torch.allclose(*model.eval()(batch))
    assert torch.allclose(*build_model("mnist_net", dropout=0.0).train()(batch))


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("classes", [10, 47])
def test_every_network_takes_any_batch_and_gives_a_logit_for_each_class(name, classes):
    model = build_model(name, [f"class {i}" for i in range(classes)]).eval()
    assert (model.name, len(model.class_names), model.temperature) == (name, classes, 1.0)
    for count in (0, 1, 7):
        assert model(images(count)).shape == (count, classes)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_an_image_is_judged_alone(name):
    model = build_model(name).eval()
    one_by_one = torch.cat([model(image.unsqueeze(0)) for image in images()])
    assert torch.allclose(model(images()), one_by_one, atol=1e-5)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_channels_last_computes_what_the_plain_layout_computes(name):
    torch.manual_seed(0)
    model = build_model(name, dropout=0.0)
    for parameter in model.parameters():  # residual branches start at zero, which would hide them
        nn.init.normal_(parameter, std=0.1)
    labels = torch.arange(5)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        model.zero_grad()
        logits = model(images().to(memory_format=layout))
        nn.functional.cross_entropy(logits, labels).backward()
        results.append((logits, [parameter.grad.clone() for parameter in model.parameters()]))
    (logits, gradients), (other_logits, other_gradients) = results
    assert torch.allclose(logits, other_logits, atol=1e-4)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_the_names_on_the_command_line_are_those_that_exist():
    assert tuple(MODELS) == MODEL_NAMES


def test_compact_net_is_compact():
    assert count_parameters(build_model("compact_net")) < 100_000


# Saving and loading


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_what_is_saved_is_loaded(name, tmp_path):
    names = ["T-shirt/top", "Trouser", "Größe"]
    model = build_model(name, names).to(memory_format=torch.channels_last)
    model.temperature = 1.25
    save_model(model, tmp_path / "weights", accuracy=0.5)
    loaded = load_model(tmp_path / "weights")
    assert (loaded.name, loaded.class_names, loaded.temperature) == (name, names, 1.25)
    assert not loaded.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert json.loads((tmp_path / "weights" / "config.json").read_text())["accuracy"] == 0.5


def test_the_package_itself_offers_load_model(folder, model):
    assert torch.equal(mnist_accel.load_model(str(folder))(images()), model(images()))
    with pytest.raises(AttributeError, match="no_such_name"):
        mnist_accel.no_such_name  # noqa: B018


def test_the_weights_are_plain_safetensors(folder, model):
    weights = load_file(folder / "model.safetensors")
    assert list(weights) and all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in weights.values())


def test_the_memory_layout_of_training_does_not_show_in_the_file(folder, model, tmp_path):
    save_model(model.to(memory_format=torch.channels_last), tmp_path / "other", dataset="digits")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "other" / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_s_folder_gives_its_best_weights_and_else_its_final_ones(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "final")
    assert find_weights(run) == run / "final"
    shutil.copytree(folder, run / "best")
    assert find_weights(run) == run / "best"
    assert find_weights(str(run / "final")) == run / "final"
    assert find_weights("shipped") == find_weights(None) == SHIPPED


# What is not a model


def refused(path, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        load_model(path)
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "text"])
def test_a_damaged_file_is_refused(folder, damage):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"cut": whole[: len(whole) // 2], "zeros": bytes(len(whole)), "empty": b"", "text": b"not weights"}[damage]
    )
    refused(folder, "model.safetensors", "safetensors")


@pytest.mark.parametrize("change", ["foreign", "missing", "additional", "shape"])
def test_weights_of_another_network_are_refused(folder, change):
    weights = load_file(folder / "model.safetensors")
    if change == "foreign":
        weights = build_model("compact_net").state_dict()
    elif change == "missing":
        del weights["linear2.bias"]
    elif change == "additional":
        weights["linear3.bias"] = torch.zeros(3)
    else:
        weights["linear2.bias"] = torch.zeros(11)
    save_file(weights, folder / "model.safetensors")
    refused(folder, "model.safetensors", "MnistNet")


def test_a_refused_model_is_told_with_the_way_to_the_shipped_one(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"give another model, such as `shipped`$"):
        load_model(folder)


def test_a_missing_description_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", "null", '{"model": "mnist_net"}', '{"model": 3, "class_names": ["0"]}', "\udcff",
     '{"model": "mnist_net", "class_names": ["0"], "temperature": "warm"}'],
)  # fmt: skip
def test_a_description_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "facts", [{"temperature": 0}, {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")},
              {"class_names": list(range(10))}, {"dataset": 5}],
)  # fmt: skip
def test_a_description_with_values_that_no_training_writes_is_refused(folder, facts):
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | facts))
    refused(folder, "config.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_finite_numbers_are_refused(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["linear2.bias"][3] = value
    save_file(weights, folder / "model.safetensors")
    refused(folder, "model.safetensors", "finite")


def test_a_description_of_an_unknown_network_is_refused(folder):
    (folder / "config.json").write_text('{"model": "resnet152", "class_names": ["0", "1"]}')
    refused(folder, "resnet152", "mnist_net", "deep_net")


def test_a_pickle_is_neither_read_nor_taken_for_weights(folder, model):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(model.state_dict()))
    refused(folder, "model.safetensors")


@pytest.mark.parametrize(
    "path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "~nobody-here/x", "nowhere", "a/b/c", ""]
)
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(path, "no m" if path == "" else "no model folder")


def test_a_mistyped_run_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    Path("runs").mkdir()
    refused("runs/nowhere", "no model folder runs/nowhere")


def test_a_file_and_an_empty_folder_are_refused(folder, tmp_path):
    refused(folder / "model.safetensors", "no model folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no model.safetensors")
