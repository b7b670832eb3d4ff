"""Starts the scripts in real processes quickly: forked from a server that has imported torch and computed nothing."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CONTEXT = multiprocessing.get_context("forkserver")
Fault = Callable[[], None] | None
_CONTEXT.set_forkserver_preload(
    ["torch", "accelerate", "mnist_accel.trainer", "torch._dynamo", "matplotlib.figure", "tensorboard.compat"]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(
    script: str, options: list[str], place: Path | None, environment: dict[str, str], log: str, fault: Fault
) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(place or Path.cwd())
    sys.argv = [script, *options]
    if fault is not None:
        fault()
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


class Job:
    """A script in one or more processes on this machine, with a hard time limit; `fault` is called before it.

    The processes start in `place`, by default where this one is; `folder` takes what they print.
    """

    def __init__(
        self,
        options: list[str],
        folder: Path,
        processes: int = 1,
        fault: Fault = None,
        environment: dict[str, str] | None = None,
        faulty_rank: int = 0,
        script: str = "train.py",
        place: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(processes)]
        shared = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared if processes > 1 else {"OMP_NUM_THREADS": "1"}
            own |= environment or {}
            arguments = (script, options, place, own, str(log), fault if rank == faulty_rank else None)
            self.processes.append(_CONTEXT.Process(target=_run, args=arguments, daemon=True))
            self.processes[-1].start()

    def wait(self, seconds: float = 60) -> list[int]:
        """The exit statuses of all ranks, negative for a signal's number; raises after `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if hanging:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"ranks {hanging} still ran after {seconds} s:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if process.is_alive() and (ranks is None or rank in ranks):
                with suppress(ProcessLookupError):  # it ended this very moment
                    os.kill(process.pid, number)

    def output(self) -> str:
        return "".join(log.read_text() if log.exists() else "" for log in self.logs)

    def wait_for(self, what: Callable[[], bool], seconds: float = 60) -> None:
        """Return once `what()` is true; raises when the job ends first or `seconds` pass."""
        deadline = time.monotonic() + seconds
        while not what():
            alive = any(process.is_alive() for process in self.processes)
            if not alive or time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"what was waited for did not come:\n{self.output()}")
            time.sleep(0.01)


def train(options: list[str], folder: Path, seconds: float = 90, **kwargs) -> Job:
    """Run a training to its end and require that all ranks succeed."""
    job = Job(options, folder, **kwargs)
    statuses = job.wait(seconds)
    assert statuses == [0] * len(statuses), f"{statuses}\n{job.output()}"
    return job
