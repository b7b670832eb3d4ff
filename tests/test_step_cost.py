"""What training asks of the operating system at each step, neither memory nor files, and of Python at start and end."""

import gc
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT

from mnist_accel.cli import importing
from mnist_accel.distributed import build_accelerator

# Page faults of a usual step (the median: now and then one faults anyway) on tensors larger than 32 MB, which glibc never keeps of itself.
COUNT_FAULTS = """
import resource, statistics, sys
import torch
from mnist_accel.distributed import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    return torch.ones(10 << 20)[0]
faults = []
for _ in range(7):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults))
"""


def faults_a_step(how: str) -> float:
    output = subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, check=True, timeout=120)
    return float(output.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_of_one_step_is_there_for_the_next():
    assert 10 * faults_a_step("kept") < faults_a_step("as it comes")


def test_a_step_searches_for_no_package(monkeypatch: pytest.MonkeyPatch):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = build_accelerator().prepare(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.ones(1)
    optimizer.step()
    searches = []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: searches.append(name) or find_spec(name, *rest)
    )
    optimizer.step()
    assert weight.item() == -2 and not searches


TRAIN = """
import atexit, runpy, sys
atexit.register(lambda: print("imported", *sys.modules))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_training_that_compiles_nothing_imports_no_compiler(tmp_path: Path):
    options = ["--dataset", "digits", "--max-steps", "2", "--checkpoint-every", "1", "--output-dir", tmp_path / "run"]
    command = [sys.executable, "-c", TRAIN, ROOT / "scripts" / "train.py", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    imported = ended.stdout.rpartition("imported ")[2].split()
    assert "torch.optim" in imported and "accelerate" in imported
    assert not {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy"} & set(imported)


def test_the_collector_rests_while_importing_and_works_again_after_an_error():
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


ENDS = """
import atexit, threading, time
from mnist_accel.cli import run_script
class Left:
    def __del__(self):
        print("taken down")
left = Left()
def write():
    time.sleep(0.3)
    print("written")
def main():
    atexit.register(print, "at exit")
    threading.Thread(target=write).start()
    return 3
run_script(main)
"""


def test_a_script_ends_once_its_threads_are_done_and_takes_nothing_down():
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "written\nat exit\n", "")
