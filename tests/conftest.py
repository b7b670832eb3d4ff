"""What all tests share: no network, a cache of their own, and Accelerate's process-wide state reset around each."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from small_data import make_small_dataset

# Before torch is imported anywhere: tests run beside the processes that they start.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# Fixtures that outlive a test, and the processes that they start, must not touch the user's own cache either.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mnist_accel_tests_")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """A cache folder of the test's own, and no trace of earlier Accelerators or signal handlers."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield
    signal.signal(signal.SIGTERM, on_sigterm)
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def small_dataset(tmp_path: Path) -> Path:
    return make_small_dataset(tmp_path / "small")
