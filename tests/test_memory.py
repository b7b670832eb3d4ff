"""What training asks of the C library's memory."""

import platform
import subprocess
import sys

import pytest

# Page faults of a step on tensors of several megabytes, as in training, after a few steps to settle.
COUNT_FAULTS = """
import resource, sys
import torch
from mnist_accel.distributed import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    tensors = [torch.ones(1 << 20) for _ in range(3)]
    return sum(tensor[0] for tensor in tensors)
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


def faults_a_step(how: str) -> float:
    output = subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, check=True, timeout=120)
    return float(output.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_of_one_step_is_there_for_the_next():
    assert faults_a_step("kept") < 100 < faults_a_step("as it comes")
