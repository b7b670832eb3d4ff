"""Loading from the Hub, real client and all, against a stand-in on loopback that can fail as a Hub fails."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, free_port
from stand_in_hub import StandInHub

datasets = pytest.importorskip("datasets")

# Loads every name that it reads from its input; huggingface_hub takes its addresses and folders at import, hence a
# process of its own. The Hub is given less time than users give it, to keep the tests short.
WORKER = """
import json, sys
from mnist_accel import data, hub
from mnist_accel.cli import UserError
hub.HUB_SECONDS = 1.0
print("ready", flush=True)
for line in sys.stdin:
    try:
        loaded = data.load_data(line.strip())
        answer = {"fingerprint": loaded.fingerprint, "classes": loaded.class_names, "images": len(loaded.train.images)}
    except UserError as error:
        answer = {"error": str(error)}
    libraries = [name for name in ("datasets", "huggingface_hub", "PIL") if name in sys.modules]
    print(json.dumps({**answer, "libraries": libraries}), flush=True)
"""


class Worker:
    def __init__(self, home: Path, endpoint: str, **environment: str) -> None:
        environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **environment}
        for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "http_proxy", "HTTP_PROXY"):
            environment.pop(variable, None)
        command = [sys.executable, "-c", WORKER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self.process.stdout and self.process.stdin
        self.output, self.input = self.process.stdout, self.process.stdin
        assert self.output.readline() == "ready\n", self.process.communicate()[1]

    def ask(self, name: str) -> None:
        self.input.write(name + "\n")
        self.input.flush()

    def answer(self) -> dict[str, Any]:
        return json.loads(self.output.readline())

    def load(self, name: str) -> dict[str, Any]:
        self.ask(name)
        return self.answer()

    def close(self) -> str:
        """Ends the process; returns what it wrote to stderr."""
        return self.process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    folder = tmp_path_factory.mktemp("repository")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["round", "straight"]))
    for split, count in (("train", 6), ("test", 4)):
        rows = {"image": [_picture(i) for i in range(count)], "label": [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    server = StandInHub(folder)
    yield server
    server.close()


def _picture(seed: int) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 100, (28, 28), dtype=np.uint8))


@pytest.fixture(autouse=True)
def healthy(hub: StandInHub) -> None:
    hub.fault, hub.paths[:] = lambda path: "", []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def worker(hub: StandInHub, home: Path) -> Iterator[Worker]:
    process = Worker(home, hub.endpoint)
    yield process
    process.close()


def downloads(hub: StandInHub) -> list[str]:
    return [path for path in hub.paths if path.startswith("GET") and path.endswith(".parquet")]


def test_a_second_start_imports_neither_datasets_nor_pillow_and_asks_the_hub_nothing(
    hub: StandInHub, worker: Worker, home: Path
) -> None:
    first = worker.load("test/cached")
    assert (first["images"], first["classes"]) == (6, ["round", "straight"])
    assert len(downloads(hub)) == 2
    del hub.paths[:]
    later = Worker(home, hub.endpoint)
    second = later.load("test/cached")
    later.close()
    assert second["fingerprint"] == first["fingerprint"]
    assert second["libraries"] == []
    assert hub.paths == []


def test_of_two_ranks_one_asks_the_hub_and_both_take_its_answer(hub: StandInHub, home: Path, tmp_path: Path) -> None:
    assert _two_ranks("test/shared", hub, home, tmp_path) == ([0, 0], ["", ""])
    assert len(downloads(hub)) == 2  # the files of one rank

    hub.fault = lambda path: "503"
    statuses, errors = _two_ranks("test/out-of-reach-for-two", hub, home, tmp_path)
    assert statuses == [2, 2] and errors[0].count("\n") == 1 and "cannot be fetched" in errors[0] and errors[1] == ""
    assert sum(path.endswith("test/out-of-reach-for-two") for path in hub.paths) == 1


def _two_ranks(name: str, hub: StandInHub, home: Path, folder: Path) -> tuple[list[int], list[str]]:
    """The exit statuses of a training step on two ranks, and what they wrote to stderr."""
    command = [sys.executable, ROOT / "scripts" / "train.py", "--dataset", name, "--output-dir", folder / "run"]
    command += ["--batch-size", "2", "--max-steps", "1", "--report-to", "none"]
    shared = {
        **os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in "01"
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], errors


@pytest.mark.parametrize("fault", ["hang", "503"])
def test_an_unreachable_hub_is_one_line_that_names_the_ways_on(hub: StandInHub, worker: Worker, fault: str) -> None:
    hub.fault = lambda path: fault
    began = time.monotonic()
    error = worker.load(f"test/unreachable-{fault}")["error"]
    assert time.monotonic() - began < 10
    assert "\n" not in error
    for way in ("--dataset FOLDER", "--dataset digits", "hf download ylecun/mnist --repo-type dataset"):
        assert way in error


def test_a_slow_hub_is_waited_for(hub: StandInHub, worker: Worker) -> None:
    def slow(path: str) -> str:
        time.sleep(0.3)
        return ""

    hub.fault = slow
    assert worker.load("test/slow")["images"] == 6


def test_what_the_hub_client_has_in_its_cache_is_used_while_the_hub_is_out_of_reach(
    hub: StandInHub, worker: Worker, home: Path
) -> None:
    fingerprint = worker.load("test/prepared")["fingerprint"]
    for file in (home / "mnist_accel").glob("*.safetensors"):
        file.unlink()
    hub.fault = lambda path: "503"
    assert worker.load("test/prepared")["fingerprint"] == fingerprint


def test_an_unknown_data_set_is_called_unknown(worker: Worker) -> None:
    error = worker.load("nobody/nothing")["error"]
    assert error.startswith("unknown data set nobody/nothing")
    assert "hf download" not in error


def test_an_unknown_configuration_is_answered_with_those_that_exist(worker: Worker) -> None:
    error = worker.load("test/configured:letters")["error"]
    assert "letters" in error
    assert "default" in error


def test_offline_mode_is_respected(hub: StandInHub, tmp_path: Path) -> None:
    offline = Worker(tmp_path, hub.endpoint, HF_HUB_OFFLINE="1")
    error = offline.load("test/offline")["error"]
    offline.close()
    assert "offline" in error
    assert "--dataset digits" in error
    assert hub.paths == []


def test_a_start_that_is_killed_in_the_download_leaves_nothing_behind_that_a_later_one_trips_over(
    hub: StandInHub, worker: Worker, home: Path
) -> None:
    hub.fault = lambda path: "cut" if path.startswith("GET") and path.endswith(".parquet") else ""
    before = set((home / "mnist_accel").glob("*.safetensors"))
    killed = Worker(home, hub.endpoint)
    killed.ask("test/killed")
    while not downloads(hub):
        time.sleep(0.02)
    killed.process.terminate()
    killed.close()
    assert set((home / "mnist_accel").glob("*.safetensors")) == before
    assert not list((home / "mnist_accel").glob("*.tmp"))
    hub.fault = lambda path: ""
    assert worker.load("test/killed")["images"] == 6
