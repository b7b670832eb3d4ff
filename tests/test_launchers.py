"""The ways to start a training, with the launchers that users start it with."""

import contextlib
import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from launching import free_port
from safetensors.torch import load_file

from mnist_accel.distributed import use_all_cores

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun"))]
# Dropout draws on each process for its own images; without it every way of starting computes the same.
OPTIONS = ["--batch-size", "16", "--max-steps", "6", "--dropout", "0", "--optimizer", "sgd", "--learning-rate", "0.05"]
LIMIT = 150  # seconds; a launch takes less than ten on a machine that does nothing else
CORES = min(
    psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
)

# Compiling all that torch imports takes longer than everything else here: where Python is told not to keep bytecode, it
# is kept for the launches of this file alone.
BYTECODE = tempfile.TemporaryDirectory(prefix="mnist-accel-bytecode-") if sys.dont_write_bytecode else None

pytestmark = pytest.mark.timeout(600)  # for four launches in one fixture on a machine with other work; each has LIMIT
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Accelerate sees every process")


def surroundings(home: Path, **changes: str) -> dict[str, str]:
    """The environment of a user's shell: nothing that a test or a launcher around it has set."""
    launchers_own = ("ACCELERATE_", "OMP_", "MKL_", "TORCHELASTIC_", "GLOO_", "FSDP_", "MASTER_", "COV_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(launchers_own)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "HF_ENDPOINT"):
        clean.pop(name, None)
    clean.pop("PYTHONDONTWRITEBYTECODE", None)
    if BYTECODE is not None:
        clean["PYTHONPYCACHEPREFIX"] = BYTECODE.name
    return clean | {"HF_HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"} | changes


class Launch:
    """A launcher, which is killed at the end with all that it started."""

    def __init__(self, command: list[str], environment: dict[str, str], output: int | None = None) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if output is None else output, stderr=subprocess.STDOUT if output is None else output,
        )  # fmt: skip
        self.lines: list[str] = []
        self.known: set[psutil.Process] = set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self.process.stdout is not None:
            self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def family(self) -> list[psutil.Process]:
        """All processes that the launcher has started and that run; those seen earlier are remembered for `kill`."""
        with contextlib.suppress(psutil.Error):
            self.known.update(psutil.Process(self.process.pid).children(recursive=True))
        return [process for process in self.known if process.is_running()]

    def wait_for(self, text: str, seconds: float = LIMIT) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def wait(self, seconds: float = LIMIT) -> int:
        deadline = time.monotonic() + seconds
        try:
            while (status := self.process.poll()) is None:
                self.family()
                assert time.monotonic() < deadline, f"still running after {seconds} s:\n{self.output}"
                time.sleep(0.1)
        finally:
            self.kill()
        self._reader.join(10)
        return status

    def kill(self) -> None:
        # One by one: the workers of torchrun and `accelerate launch` have sessions of their own.
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.kill()


def launch(command: list[str], home: Path, **changes: str) -> tuple[int, str]:
    job = Launch(command, surroundings(home, **changes))
    return job.wait(), job.output


def launch_on_a_terminal(command: list[str], home: Path, **changes: str) -> tuple[int, str]:
    """As `launch`, with both outputs on a terminal of 40 lines of 120 characters."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    job = Launch(command, surroundings(home, **changes), theirs)
    os.close(theirs)
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux tells so that the other side has closed the terminal
            while chunk := os.read(ours, 4096):
                seen.extend(chunk)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status = job.wait()
    reader.join(10)
    os.close(ours)
    return status, seen.decode(errors="replace")


def train_command(*options: str) -> list[str]:
    return [str(ROOT / "scripts" / "train.py"), *OPTIONS, *options]


def kinds_of_files(run: Path) -> set[str]:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {re.sub(r"events\.out\.tfevents.*", "events", name) for name in names}


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> Iterator[dict[str, tuple[Path, str]]]:
    """The same six steps on `digits`, started in each way that users start it: the run's folder and its output.

    Plain python writes to a terminal, the launchers to a pipe.
    """
    base = tmp_path_factory.mktemp("launches")
    two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    on_cpu = {"ACCELERATE_USE_CPU": "true"}
    ways: dict[str, tuple[list[str], dict[str, str]]] = {
        "python": ([sys.executable], {"OMP_NUM_THREADS": "1"}),
        "accelerate": ([*ACCELERATE, "--config_file", "accelerate_config.yaml"], {}),
        "accelerate, two processes": ([*ACCELERATE, "--config_file", "accelerate_config.yaml", *two], on_cpu),
        "torchrun, two processes": (
            [*TORCHRUN, "--nproc_per_node", "2", "--master_port", str(free_port())],
            {**on_cpu, "OMP_NUM_THREADS": "1"},
        ),
    }
    done = {}
    for way, (launcher, changes) in ways.items():
        folder = base / way
        command = [*launcher, *train_command("--dataset", "digits", "--output-dir", str(folder))]
        run = launch_on_a_terminal if way == "python" else launch
        status, output = run(command, base / "hf_home", **changes)
        assert status == 0, f"{way}\n{output}"
        done[way] = (folder, output)
    yield done


def test_every_way_to_start_leaves_the_same_kinds_of_files(starts):
    expected = kinds_of_files(starts["python"][0])
    assert {
        "config.yaml",
        "metrics.jsonl",
        "best/model.safetensors",
        "final/model.safetensors",
        "figures/curves.png",
    } <= expected
    for way, (folder, _) in starts.items():
        assert kinds_of_files(folder) == expected, way


def test_every_way_to_start_trains_the_same_weights(starts):
    weights = {way: load_file(folder / "final" / "model.safetensors") for way, (folder, _) in starts.items()}
    for way, others in weights.items():
        for name, tensor in weights["python"].items():
            assert (tensor - others[name]).abs().max() < 1e-4, f"{way}: {name}"


def test_every_way_to_start_reports_each_row_and_line_once(starts):
    for way, (folder, output) in starts.items():
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in metrics] == [6, 6], way
        assert output.count("Test set: Average loss: ") == output.count("Device: ") == 1, f"{way}\n{output}"
        processes = "2 processes" if "two" in way else "1 process,"
        assert processes in output, f"{way}\n{output}"


def test_what_a_run_says_last_is_where_its_weights_are(starts):
    for way, (folder, output) in starts.items():
        last = output.strip().splitlines()[-1]
        assert last == f"Weights: {folder / 'best'} and {folder / 'final'}", f"{way}\n{output}"


def test_no_bar_is_drawn_where_the_output_is_no_terminal(starts):
    for way in starts.keys() - {"python"}:
        output = starts[way][1]
        assert "\r" not in output and "it/s" not in output and "images/s]" not in output, way


def threads(output: str) -> int:
    found = re.search(r"Device: cpu \((\d+) threads?\)", output)
    assert found, output
    return int(found[1])


def test_all_cores_are_used_under_a_launcher_and_the_user_s_number_is_kept(starts):
    assert threads(starts["accelerate"][1]) == CORES
    assert threads(starts["accelerate, two processes"][1]) == max(1, CORES // 2)
    assert threads(starts["torchrun, two processes"][1]) == 1
    assert threads(starts["python"][1]) == 1


# Prints what the training would print, without its seconds of setting up.
THREADS = "from mnist_accel.distributed import build_accelerator, describe_device; print('Device:', describe_device(build_accelerator()))"


@pytest.mark.parametrize(
    "options, changes, expected",
    # 1 is also what the launcher sets by itself; a 3 would be more than this test's machines have.
    [
        (["--num_cpu_threads_per_process", "1"], {}, 1),
        ([], {"OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_a_number_of_threads_that_the_user_chose_is_kept(tmp_path, options, changes, expected):
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    config = ["--config_file", str(ROOT / "accelerate_config.yaml")]
    status, output = launch([*ACCELERATE, *config, *options, str(script)], tmp_path, PYTHONPATH=str(ROOT), **changes)
    assert status == 0 and threads(output) == expected, output


def test_of_more_processes_than_cores_each_has_a_thread(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9999")
    before = torch.get_num_threads()
    use_all_cores()
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 1


@needs_no_gpu
def test_two_processes_that_do_not_see_each_other_are_refused(tmp_path):
    command = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    status, output = launch(
        [*command, *train_command("--dataset", "digits", "--output-dir", str(tmp_path / "run"))], tmp_path
    )
    assert status != 0
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "2 processes" in errors[0] and "ACCELERATE_USE_CPU=true" in errors[0], output
    assert not (tmp_path / "run").exists()


@needs_no_gpu
def test_processes_that_the_launcher_left_out_are_missed(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    configured = tmp_path / "two.yaml"  # what `accelerate config` writes for two processes on a CPU
    configured.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: 'no'\nuse_cpu: true\n"
        "debug: false\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\n"
    )
    for options, warned in (
        (["--num_processes", "2"], True),
        (["--config_file", str(configured)], True),
        (["--num_processes", "1"], False),
    ):
        _, output = launch([*ACCELERATE, *options, str(script)], tmp_path, PYTHONPATH=str(ROOT))
        assert ("asked for several processes and started one" in output) == warned, output
        assert "1 process," in output


def test_sigterm_to_the_launcher_of_two_processes_saves_and_ends_all(tmp_path):
    run = tmp_path / "run"
    two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    endless = train_command(
        "--dataset", "digits", "--output-dir", str(run), "--max-steps", "100000", "--epochs", "1000"
    )
    job = Launch([*ACCELERATE, *two, *endless, "--log-every", "5"], surroundings(tmp_path, ACCELERATE_USE_CPU="true"))
    try:
        job.wait_for("Step: 5")
        family = job.family()
        assert len(family) >= 2
        job.process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=40)
        assert not alive, job.output
        assert job.wait(5) != 0
    finally:
        job.kill()
    stopped = re.search(r"Stopped by SIGTERM after step (\d+)", job.output)
    assert stopped, job.output
    assert (run / "checkpoints" / f"step_{int(stopped[1]):08d}" / "training_state.pt").is_file()


def test_torchrun_restarts_what_fails(tmp_path):
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--max_restarts", "1"]
    options = ["--dataset", "digits", "--output-dir", str(tmp_path / "run"), "--resume", "auto", "--report-to", "none"]
    script = train_command(*options, "--checkpoint-every", "5", "--log-every", "5", "--max-steps", "200")
    variables = {"ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says
    job = Launch([*TORCHRUN, *meeting, "--nproc_per_node", "2", *script], surroundings(tmp_path, **variables))
    try:
        job.wait_for("Step: 10")
        next(each for each in job.family() if each.environ().get("RANK") == "1").kill()
        assert job.wait() == 0, job.output
    finally:
        job.kill()
    assert "resumed after step" in job.output and "200 steps" in job.output, job.output


def test_a_bar_with_speed_is_drawn_on_a_terminal(starts):
    output = starts["python"][1]
    assert re.search(r"\rEpoch 1/10: +\d+%\|.*\| \d+/1442 \[.* images/s", output), output


# What is answered before torch is imported

# Started before the script: any import of torch ends the process with a status of its own.
NO_TORCH = """
import runpy, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "accelerate", "datasets", "matplotlib"):
            print("imported " + name); sys.stdout.flush(); import os; os._exit(77)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_torch(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(script), *arguments],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT, env=surroundings(ROOT, PYTHONPATH=str(ROOT)),
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_answers_without_torch(script):
    result = run_without_torch(script, "--help")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("usage: ") and "--help" in result.stdout
    assert "None" not in result.stdout and "False" not in result.stdout, "a default is said in words"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_unknown_option_is_one_line_and_status_2_without_torch(script):
    # `--no_such_option=7` is a whole option in itself, so that no script can take the 7 for an argument.
    needed = {"predict_dir.py": [str(ROOT)], "export.py": ["--format=onnx"]}.get(script.name, [])
    result = run_without_torch(script, *needed, "--no_such_option=7")
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "--no-such-option" in line


def test_there_are_scripts_to_ask():
    assert {"train.py", "predict_dir.py", "evaluate.py", "export.py", "show_samples.py"} <= {
        path.name for path in SCRIPTS
    }


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_a_mistake_on_the_second_machine_is_told_there_once(tmp_path, local_rank, lines):
    place = surroundings(tmp_path, RANK="2", LOCAL_RANK=local_rank, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "nowhere.yaml"]
    ended = subprocess.run(command, check=False, cwd=tmp_path, env=place, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.count("\n") == ended.stderr.count("error: --config") == lines


@pytest.mark.parametrize("mistaken", [0, 1])
def test_a_machine_is_told_of_a_mistake_on_another_that_it_waits_for(tmp_path, mistaken):
    jobs = []
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "true"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(2):
        options = ["--config", "nowhere.yaml"] if rank == mistaken else ["--dataset", "digits"]
        command = [sys.executable, *train_command("--output-dir", str(tmp_path / "run"), *options)]
        jobs.append(Launch(command, surroundings(tmp_path, RANK=str(rank), **place)))
    try:
        assert [job.wait(60) for job in jobs] == [2, 2]
    finally:
        for job in jobs:
            job.kill()
    assert jobs[0].output.count("error: --config nowhere.yaml: No such file") == 1, jobs[0].output
    assert jobs[1].output.count("error: ") == mistaken, jobs[1].output
    assert not (tmp_path / "run").exists()


@needs_no_gpu
def test_mpirun_without_the_word_cpu_is_refused(tmp_path):
    arguments = train_command("--dataset", "digits", "--output-dir", str(tmp_path / "run"))
    mpirun = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    status, output = launch([sys.executable, *arguments], tmp_path, **mpirun)
    assert status == 2 and "error: the launcher started 2 processes but Accelerate sees 1" in output, output
    assert not (tmp_path / "run").exists()


def test_what_a_terminal_cannot_show_is_no_error(tmp_path):
    program = SPEAKS.replace("said", "\u6570\u5b57")
    place = surroundings(tmp_path, PYTHONIOENCODING="ascii", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, check=False, cwd=tmp_path, env=place, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "\\u6570\\u5b57\n")


# A disk that is full, as TensorBoard meets it: its thread first, then, at the next call, who called it.
FAILING_THREAD = """
    import threading

    def write():
        raise {kind}(28, "No space left on device")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    raise OSError(28, "No space left on device")
"""

SPEAKS = """
import sys
from mnist_accel.cli import run_script
def main():
    print("said")
    print("remarked", file=sys.stderr)
run_script(main)
"""


DRAWS = """
from mnist_accel.cli import run_script
def main():
    import matplotlib
    print(matplotlib.get_backend())
run_script(main)
"""


def test_a_notebook_s_drawing_backend_is_not_asked_for(tmp_path):
    environment = surroundings(tmp_path, MPLBACKEND="module://not_installed_here")
    command = [sys.executable, "-c", DRAWS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "agg\n", "")


@pytest.mark.parametrize("together", [False, True])
def test_a_reader_that_leaves_ends_training_quietly(small_dataset, tmp_path, together):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--dataset", str(small_dataset), "--log-every", "1"]
    command += ["--output-dir", str(tmp_path / "run"), "--report-to", "none"]
    errors = subprocess.STDOUT if together else subprocess.PIPE
    environment = surroundings(tmp_path, OMP_NUM_THREADS="1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as training:
        training.stdout.readline()
        training.stdout.close()
        assert training.wait(60) == 141
        assert together or training.stderr.read() == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_script_runs_where_its_outputs_are_closed(closed):
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, SPEAKS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    expected = ("" if closed[0] == ">" else "said\n", "" if "2" in closed else "remarked\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, *expected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is there on Linux only")
def test_an_output_on_a_full_disk_is_one_line_and_status_2():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", SPEAKS]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    (line,) = result.stderr.replace("remarked\n", "").splitlines()
    assert result.returncode == 2 and line.startswith("error: cannot write the output: No space left on device")


@pytest.mark.parametrize(
    "number, line",
    [
        (errno.EACCES, "error: Permission denied: runs/theirs; give another"),
        (errno.EDQUOT, "error: cannot write the output: Disk quota exceeded; make room"),
    ],
)
def test_what_the_disk_refuses_is_one_line_and_status_2(number, line):
    raises = f'raise OSError({number}, __import__("os").strerror({number}), "runs/theirs")'
    command = [sys.executable, "-c", SPEAKS.replace('print("said")', raises)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2 and result.stderr.startswith(line) and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("kind, told", [("OSError", False), ("KeyError", True)])
def test_what_befalls_a_writers_thread_is_told_once(kind, told):
    program = SPEAKS.replace('print("said")', FAILING_THREAD.format(kind=kind))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    *trace, line = result.stderr.splitlines()
    assert result.returncode == 2 and line == "error: cannot write the output: No space left on device; make room"
    assert ("Exception in thread" in result.stderr) == bool(trace) == told, result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is there on Linux only")
def test_a_mistake_ends_with_status_2_where_it_cannot_be_told():
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--no-such-option"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, timeout=60, check=False).returncode == 2
