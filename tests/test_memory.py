"""What training asks of the C library's memory."""

import platform
import subprocess
import sys

import pytest

# Page faults of a usual step (the median: now and then one faults anyway) on tensors larger than 32 MB, which glibc never keeps of itself.
COUNT_FAULTS = """
import resource, statistics, sys
import torch
from mnist_accel.distributed import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    tensors = [torch.ones(10 << 20) for _ in range(2)]
    return sum(tensor[0] for tensor in tensors)
faults = []
for _ in range(15):
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
