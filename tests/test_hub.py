"""Models of the Hub: `load_model` reads them and `--push-to-hub` makes them, in bounded time whatever the Hub does."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import Job, train
from PIL import Image
from small_data import make_small_dataset
from stand_in_hub import StandInHub, read_files, use_hub

from mnist_accel import hub as client
from mnist_accel.cli import UserError
from mnist_accel.models import SHIPPED, build_model, load_model, save_model

BEST = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture
def model():
    torch.manual_seed(1)
    return build_model("compact_net").eval()


@pytest.fixture
def hub(model, tmp_path, monkeypatch) -> Iterator[StandInHub]:
    """A Hub with the model `test/digits`, given less time than users give it, to keep the tests short."""
    from huggingface_hub import constants

    server = StandInHub()
    save_model(model, tmp_path / "weights")
    server.models["test/digits"] = read_files(tmp_path / "weights")
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET"):
        monkeypatch.setattr(constants, name, getattr(constants, name))  # put back at the end
    use_hub(server.endpoint, str(tmp_path / "hub_cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(client, "HUB_SECONDS", 1.0)
    yield server
    server.close()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The waits between repeated requests, in seconds; they are noted and not waited for."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    return waited


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def refused(hub_id: str, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        load_model(hub_id)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value), str(error.value)


def bring_down(hub: StandInHub, how: str) -> None:
    if how == "closed":
        hub.close()
    hub.fault = lambda path: how


# Reading


def test_a_model_of_the_hub_is_downloaded_once_and_loaded(hub, model):
    assert same_weights(load_model("test/digits"), model)
    downloads = [path for path in hub.paths if path.startswith("GET") and "/resolve/" in path]
    assert {Path(path).name for path in downloads} == {"config.json", "model.safetensors"} and len(downloads) == 2
    assert same_weights(load_model("test/digits"), model)
    assert len([path for path in hub.paths if path.startswith("GET") and "/resolve/" in path]) == 2


def test_where_nobody_looks_no_progress_is_drawn(hub, monkeypatch, tmp_path, capfd):
    load_model("test/digits")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    client.upload_folder(SHIPPED, "somebody/digits")
    assert capfd.readouterr().err == ""


def test_newer_weights_on_the_hub_are_fetched(hub, model, tmp_path):
    load_model("test/digits")
    newer = build_model("compact_net")
    save_model(newer, tmp_path / "newer")
    hub.models["test/digits"] = read_files(tmp_path / "newer")
    assert same_weights(load_model("test/digits"), newer)


def test_a_model_that_the_hub_does_not_have_is_told(hub):
    refused("test/nothing", "unknown model test/nothing", "Hub")
    refused("test/no..thing", "no folder test/no..thing", "repo_id")


def test_a_repository_without_weights_is_told(hub):
    del hub.models["test/digits"]["model.safetensors"]
    refused("test/digits", "models--test--digits", "No such file", "model.safetensors", "another model")


def test_a_gated_model_is_told_with_the_way_in(hub):
    hub.fault = lambda path: "gated"
    refused("test/digits", "test/digits", "gated", "accept its terms", "hf auth login")


def test_the_hub_s_own_words_are_told_rather_than_a_link_to_general_help(hub):
    hub.fault = lambda path: "401"
    refused("test/digits", "401 Unauthorized", "fault")


@pytest.mark.parametrize("how", ["closed", "503", "hang"])
def test_a_hub_out_of_reach_is_told_soon_and_quietly(hub, pauses, capfd, how):
    bring_down(hub, how)
    began = time.monotonic()
    refused("test/digits", "no folder test/digits", "Hub", "weights folder")
    assert time.monotonic() - began + sum(pauses) < 4
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("how", ["closed", "503", "hang"])
def test_a_model_in_the_cache_is_loaded_while_the_hub_is_out_of_reach(hub, model, pauses, monkeypatch, how):
    load_model("test/digits")
    bring_down(hub, how)
    monkeypatch.setattr(client, "HUB_SECONDS", 60.0)  # what is here already is not waited for so long
    began = time.monotonic()
    assert same_weights(load_model("test/digits"), model)
    assert time.monotonic() - began + sum(pauses) < 5


# Uploading


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_small_dataset(tmp_path_factory.mktemp("data") / "small")


def options(dataset: Path, run: Path) -> list[str]:
    short = ["--max-steps", "2", "--report-to", "none", "--model", "compact_net", "--push-to-hub", "somebody/digits"]
    return ["--dataset", str(dataset), "--output-dir", str(run), *short]


def test_what_a_run_uploads_is_best_and_is_read_back_by_its_id(hub, dataset, tmp_path, monkeypatch):
    run, here = tmp_path / "run", partial(use_hub, hub.endpoint, str(tmp_path / "hub_cache"))
    job = train(options(dataset, run), tmp_path / "logs", fault=here, environment={"HF_TOKEN": "hf_test"})
    assert f"Uploaded: {hub.endpoint}/somebody/digits\n" in job.output() and "needs a login" not in job.output()
    assert set(hub.models["somebody/digits"]) == BEST
    assert hub.models["somebody/digits"] == read_files(run / "best")
    assert same_weights(load_model("somebody/digits"), load_model(run / "best"))

    (tmp_path / "images").mkdir()
    Image.new("L", (40, 30), 255).save(tmp_path / "images" / "blank.png")
    told = train(
        ["images", "--model", "somebody/digits"], tmp_path / "logs", script="predict_dir.py", place=tmp_path, fault=here
    )
    assert "model: somebody/digits (compact_net)" in told.output()
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 2


def test_a_second_upload_replaces_the_first(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    save_model(build_model("fast_net"), tmp_path / "first")
    assert client.upload_folder(tmp_path / "first", "somebody/digits") == f"{hub.endpoint}/somebody/digits"
    client.upload_folder(SHIPPED, "somebody/digits")
    assert same_weights(load_model("somebody/digits"), load_model())


def test_without_a_login_the_run_is_complete_and_the_way_on_is_told(hub, dataset, tmp_path):
    here = partial(use_hub, hub.endpoint, str(tmp_path / "hub_cache"))
    job = Job(options(dataset, tmp_path / "run"), tmp_path / "logs", fault=here, environment={"HF_TOKEN": ""})
    assert job.wait() == [2]
    told = job.output()
    assert told.index("warning: --push-to-hub needs a login") < told.index("Test set: ")
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    for part in ("401", "hf auth login", "hf upload somebody/digits", str(tmp_path / "run" / "best")):
        assert part in line
    assert set(read_files(tmp_path / "run" / "best")) == set(read_files(tmp_path / "run" / "final")) == BEST
    assert "somebody/digits" not in hub.models


@pytest.mark.parametrize("how", ["closed", "503", "hang"])
def test_an_upload_to_a_hub_out_of_reach_ends_soon_in_one_line(hub, monkeypatch, pauses, capfd, how):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    bring_down(hub, how)
    began = time.monotonic()
    with pytest.raises(UserError, match="could not be uploaded to somebody/digits") as error:
        client.upload_folder(SHIPPED, "somebody/digits")
    assert "\n" not in str(error.value)
    assert time.monotonic() - began + sum(pauses) < 4
    assert capfd.readouterr().err == ""


def test_an_upload_that_fails_ends_all_processes_with_one_line(dataset, tmp_path):
    command = [*options(dataset, tmp_path / "run"), "--push-to-hub", "somebody/digits"]
    environment = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_TOKEN": "hf_stand_in"}
    job = Job(command, tmp_path / "logs", processes=2, environment=environment)
    assert job.wait() == [2, 2] and "Traceback" not in job.output()
    assert len([line for line in job.output().splitlines() if line.startswith("error: ")]) == 1
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
