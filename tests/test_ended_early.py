"""A script that is ended from outside ends soon, and leaves neither processes nor half of a file."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from launching import ROOT, free_port

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


def python(program: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program], env=ENVIRONMENT | environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells a process that its parent died")
def test_what_a_launcher_started_ends_when_the_launcher_is_killed():
    worker = "import time; from mnist_accel.cli import run_script; run_script(lambda: print(1, flush=True) or time.sleep(60))"
    program = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {worker!r}]); print(p.pid, flush=True); p.wait()"
    launcher = python(program, TORCHELASTIC_RUN_ID="none")
    started = psutil.Process(int(launcher.stdout.readline()))
    assert launcher.stdout.readline() == "1\n"
    launcher.kill()
    gone, _ = psutil.wait_procs([started], timeout=20)
    assert gone


def test_sigterm_ends_a_process_that_waits_for_the_others(tmp_path):
    (tmp_path / "1.png").touch()
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, ROOT / "scripts" / "predict_dir.py", tmp_path]
    waiting = subprocess.Popen(command, env=ENVIRONMENT | place)
    try:
        deadline = time.monotonic() + 60
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert time.monotonic() < deadline, "it never came to wait"
                time.sleep(0.05)
            waiting.terminate()
            assert waiting.wait(timeout=10) == -signal.SIGTERM
    finally:
        waiting.kill()


def test_sigterm_in_the_middle_of_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "p.csv").write_text("old")
    program = f"""
import signal, time
from pathlib import Path
from mnist_accel.cli import run_script
from mnist_accel.output import replacing

def main():
    with replacing(Path({str(tmp_path / "other.csv")!r})) as file:
        file.touch()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with replacing(Path({str(tmp_path / "p.csv")!r})) as file:
        file.write_text("half")
        print(1, flush=True)
        time.sleep(60)

run_script(main)
"""
    writing = python(program)
    assert writing.stdout.readline() == "1\n"
    writing.terminate()
    assert writing.wait(timeout=20) == 128 + signal.SIGTERM
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"p.csv": "old", "other.csv": ""}
