"""Two machines, each a network namespace of its own, joined by a cable: they share neither a disk cache nor an address."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launching import train
from safetensors.torch import load_file
from small_data import make_small_dataset
from test_launchers import ACCELERATE, OPTIONS, ROOT, Launch, surroundings

ADDRESSES = ("10.231.77.1", "10.231.77.2")
PORT = 29517  # free for certain: nothing else runs in these networks

pytestmark = pytest.mark.timeout(400)  # on a machine with other work; each wait below has its own limit


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces with a veth pair between them, removed at the end in any case."""
    if shutil.which("ip") is None:
        pytest.skip("the program `ip` is missing: install iproute2 to run two hosts in network namespaces")
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces, in which two hosts run")
    names = [f"mnist-{os.getpid()}-{rank}" for rank in range(2)]
    cables = [f"mn{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name, "name", "cable0")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        _remove(names, cables)
        pytest.skip(f"network namespaces cannot be made here: {reason}")
    yield names
    _remove(names, cables)


def _remove(names: list[str], cables: list[str]) -> None:
    for arguments in (*(["link", "delete", cable] for cable in cables), *(["netns", "delete", name] for name in names)):
        with contextlib.suppress(subprocess.CalledProcessError, subprocess.TimeoutExpired):
            ip(*arguments)


def start(hosts: list[str], base: Path, *options: str) -> list[Launch]:
    """One launcher on each host, with a data set, a cache and an output folder of the host's own."""
    jobs = []
    for rank, name in enumerate(hosts):
        disk = base / f"host{rank}"
        disk.mkdir()
        make_small_dataset(disk / "small")
        machines = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
        meeting = ["--main_process_ip", ADDRESSES[0], "--main_process_port", str(PORT)]
        script = [str(ROOT / "scripts" / "train.py"), *OPTIONS, "--dataset", str(disk / "small")]
        own = surroundings(
            disk / "hf_home", ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="cable0", OMP_NUM_THREADS="1"
        )
        command = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml"), *machines, *meeting, *script]
        command += ["--output-dir", str(disk / "run"), *options]
        jobs.append(Launch(["ip", "netns", "exec", name, *command], own))
    return jobs


def test_two_hosts_train_what_one_host_with_two_processes_trains(hosts, tmp_path):
    jobs = start(hosts, tmp_path)
    try:
        statuses = [job.wait() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert statuses == [0, 0], jobs[0].output + jobs[1].output
    main, other = (tmp_path / f"host{rank}" / "run" for rank in range(2))
    assert "2 processes" in jobs[0].output and (main / "metrics.jsonl").is_file()
    assert not other.exists() or not [path for path in other.rglob("*") if path.is_file()], "only the main host writes"
    assert "Test set: " in jobs[0].output and "Test set: " not in jobs[1].output
    assert all((tmp_path / f"host{rank}" / "hf_home").is_dir() for rank in range(2)), "each host has a cache"

    dataset = make_small_dataset(tmp_path / "small")
    together = ["--dataset", str(dataset), "--output-dir", str(tmp_path / "one host"), *OPTIONS]
    train(together, tmp_path / "logs", processes=2)
    expected = load_file(tmp_path / "one host" / "final" / "model.safetensors")
    for name, tensor in load_file(main / "final" / "model.safetensors").items():
        assert (tensor - expected[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("dead", [0], ids=["the main host dies"])
def test_a_host_that_dies_does_not_leave_the_other_hanging(hosts, tmp_path, dead):
    jobs = start(hosts, tmp_path, "--max-steps", "1000000", "--epochs", "100000", "--log-every", "5")
    try:
        jobs[0].wait_for("Step: 5")
        survivors = [psutil.Process(jobs[1 - dead].process.pid), *jobs[1 - dead].family()]
        assert len(survivors) >= 2
        for process in (*jobs[dead].family(), psutil.Process(jobs[dead].process.pid)):
            process.send_signal(signal.SIGKILL)
        died = time.monotonic()
        assert jobs[1 - dead].wait(60) != 0, jobs[1 - dead].output
        assert jobs[1 - dead].output.count("error: another process failed or died") == 1, jobs[1 - dead].output
        assert not psutil.wait_procs(survivors[1:], timeout=max(0, died + 60 - time.monotonic()))[1]
    finally:
        for job in jobs:
            job.kill()
