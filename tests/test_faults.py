"""What goes wrong on a machine ends in one line, with what was on disk intact."""

import errno
import os
import re
import signal
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launching import Job, free_port, train
from test_same_numbers import rows, weights

from mnist_accel.cli import SharedError
from mnist_accel.distributed import together

OPTIONS = ["--batch-size", "16", "--epochs", "2", "--dropout", "0", "--log-every", "1"]


def run(dataset: Path, tmp_path: Path, *options: str, seconds: float = 60, **kwargs) -> tuple[list[int], str]:
    job = Job(
        [*OPTIONS, "--dataset", str(dataset), "--output-dir", str(tmp_path / "run"), *options],
        tmp_path / "logs",
        **kwargs,
    )
    return job.wait(seconds), job.output()


def assert_one_error_line(output: str, *parts: str) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in output, output
    for part in parts:
        assert part in errors[0], errors[0]


def _no_room_after(count: int) -> None:
    """Let the file system run full: from the given checkpoint on, files may not grow beyond 10 kB."""
    import resource

    from mnist_accel import trainer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original, calls = trainer.write_checkpoint, [0]

    def write(*args):
        calls[0] += 1
        if calls[0] == count:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return original(*args)

    trainer.write_checkpoint = write


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_an_error_that_leaves_earlier_checkpoints_intact(small_dataset, tmp_path, processes):
    statuses, output = run(
        small_dataset, tmp_path, "--checkpoint-every", "4", fault=partial(_no_room_after, 3), processes=processes
    )
    assert statuses == [2] * processes, output
    assert_one_error_line(output, "cannot write checkpoint", "File too large", "--resume")
    complete = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert complete == ["step_00000004", "step_00000008"]
    for name in complete:
        torch.load(tmp_path / "run" / "checkpoints" / name / "training_state.pt", weights_only=True)


def test_a_vanished_output_folder_is_an_error(small_dataset, tmp_path):
    options = [*OPTIONS, "--epochs", "400", "--dataset", str(small_dataset), "--output-dir", str(tmp_path / "run")]
    job = Job([*options, "--report-to", "none"], tmp_path / "logs")
    job.wait_for((tmp_path / "run" / "best").is_dir)
    (tmp_path / "run").rename(tmp_path / "gone")
    assert job.wait(60) == [2]
    assert_one_error_line(job.output(), str(tmp_path / "run"))


def test_an_output_folder_that_cannot_be_made_is_an_error(small_dataset, tmp_path):
    (tmp_path / "run").write_text("a file")
    statuses, output = run(small_dataset, tmp_path)
    assert statuses == [2]
    assert_one_error_line(output, "cannot write", "--output-dir")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_holds_another_run_is_left_alone(small_dataset, tmp_path, processes):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    statuses, output = run(small_dataset, tmp_path, processes=processes)
    assert statuses == [2] * processes
    assert_one_error_line(output, "already holds a run", "--resume auto")
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(small_dataset, tmp_path, processes):
    diverging = ["--optimizer", "sgd", "--learning-rate", "1e30", "--checkpoint-every", "1"]
    statuses, output = run(small_dataset, tmp_path, *diverging, processes=processes)
    assert statuses == [2] * processes, output
    assert_one_error_line(output, "not finite", "learning rate 1e+30", "step_0000")
    step = int(re.search(r"at step (\d+)", output)[1])
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    state = torch.load(saved / "training_state.pt", weights_only=True)
    assert state["state"]["step"] == step - 1
    assert str(saved) in output


def test_weights_that_are_not_finite_are_no_checkpoint(small_dataset, tmp_path):
    diverging = ["--optimizer", "sgd", "--learning-rate", "1e300", "--checkpoint-every", "1"]
    statuses, output = run(small_dataset, tmp_path, *diverging)
    assert statuses == [2]
    assert_one_error_line(output, "not finite at step 1,", "checkpoint: none")
    assert not list(tmp_path.glob("run/checkpoints/step_*"))


def _other_options(*options: str) -> None:
    sys.argv += options


@pytest.mark.parametrize("options", [["--seed", "5"], ["--model", "compact_net"], ["--auto-batch-size"]])
def test_processes_that_were_started_with_different_options_are_refused(small_dataset, tmp_path, options):
    fault = partial(_other_options, *options)
    statuses, output = run(small_dataset, tmp_path, processes=2, fault=fault, faulty_rank=1)
    assert statuses == [2, 2]
    assert_one_error_line(output, f"different {options[0]}:", "on every machine")


def _other_launch(name: str, value: str) -> None:
    os.environ[name] = value


def _no_room_for_data() -> None:
    from mnist_accel import trainer

    def load(_name):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer.load_data = load


def test_what_fails_on_one_rank_alone_ends_all_with_its_error(small_dataset, tmp_path):
    statuses, output = run(small_dataset, tmp_path, processes=2, fault=_no_room_for_data, faulty_rank=1)
    assert statuses == [2, 2]
    assert_one_error_line(output, "No space left on device; make room")


def _count_the_groups_threads() -> None:
    from mnist_accel import cli

    end_process = cli._end_process

    def count_and_end(status: int) -> None:
        names = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
        print(f"{sum('gloo_runloop' in name for name in names)} threads of the group", flush=True)
        end_process(status)

    cli._end_process = count_and_end


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in Linux' own files")
def test_nothing_waits_for_the_process_groups_threads_at_the_end(small_dataset, tmp_path):
    job = Job(
        ["--dataset", str(small_dataset), "--max-steps", "1", "--batch-size", "16", "--output-dir", str(tmp_path / "run")],
        tmp_path / "logs",
        processes=2,
        fault=_count_the_groups_threads,
    )  # fmt: skip
    assert job.wait() == [0, 0]
    assert int(re.search(r"(\d+) threads of the group", job.output())[1]) > 0


@pytest.mark.parametrize("script", ["evaluate.py", "show_samples.py"])
def test_what_one_process_does_waits_for_no_other(tmp_path, script):
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = ["--model", "shipped", "--dataset", "digits"]
    assert Job(options, tmp_path / "logs", environment=launch, script=script, place=tmp_path).wait() == [0]


def test_an_error_without_a_message_is_an_error_all_the_same():
    with pytest.raises(SharedError, match="TimeoutError"), together():
        raise TimeoutError


@pytest.mark.parametrize(("name", "value"), [("MIXED_PRECISION", "bf16"), ("GRADIENT_ACCUMULATION_STEPS", "2")])
def test_processes_that_were_launched_differently_are_refused(small_dataset, tmp_path, name, value):
    fault = partial(_other_launch, f"ACCELERATE_{name}", value)
    statuses, output = run(small_dataset, tmp_path, processes=2, fault=fault, faulty_rank=1)
    assert statuses == [2, 2]
    assert_one_error_line(output, f"different --{name.lower().replace('_', '-')}:")


def _no_memory_for(images: int) -> None:
    """Let the memory hold no more than this many images at once, and half as many where dropout keeps a mask of each."""
    from mnist_accel.models import MnistNet

    original = MnistNet.forward

    def forward(self, batch, mask=None):
        if self.training and len(batch) * (1 if mask is None else 2) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(self, batch, mask)

    MnistNet.forward = forward


def test_out_of_memory_on_one_rank_halves_the_micro_batch_on_all_with_the_same_result(small_dataset, tmp_path):
    statuses, output = run(
        small_dataset, tmp_path, "--auto-batch-size", processes=2, fault=partial(_no_memory_for, 2), faulty_rank=1
    )
    assert statuses == [0, 0], output
    assert "16 = 2 processes x 4 micro-batches x 2 images" in output
    train([*OPTIONS, "--dataset", str(small_dataset), "--output-dir", str(tmp_path / "roomy")], tmp_path / "logs")
    for key, tensor in weights(tmp_path / "roomy").items():
        assert (tensor - weights(tmp_path / "run")[key]).abs().max() < 1e-4, key
    assert rows(tmp_path / "run")[-1]["test_accuracy"] == rows(tmp_path / "roomy")[-1]["test_accuracy"]


def test_the_micro_batch_that_is_tried_takes_the_memory_of_one_that_is_trained_on(small_dataset, tmp_path):
    options = ["--auto-batch-size", "--dropout", "0.5", "--max-steps", "1"]
    statuses, output = run(small_dataset, tmp_path, *options, fault=partial(_no_memory_for, 8))
    assert statuses == [0] and "16 = 4 micro-batches x 4 images" in output, output


def test_out_of_memory_with_a_single_image_is_an_error(small_dataset, tmp_path):
    statuses, output = run(small_dataset, tmp_path, "--auto-batch-size", fault=partial(_no_memory_for, 0))
    assert statuses == [2]
    assert_one_error_line(output, "out of memory", "--batch-size")


@pytest.mark.parametrize(
    "options, environment, parts",
    [
        (["--batch-size", "15", "--gradient-accumulation-steps", "2"], {}, ["--batch-size", "multiple of 2"]),
        (["--validation-size", "150"], {}, ["--validation-size"]),
        (["--resume", "nowhere/step_00000001"], {}, ["no checkpoint at", "--resume auto"]),
        (["--report-to", "carrier-pigeon"], {}, ["carrier-pigeon"]),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["fp16", "bf16"]),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp61"}, ["fp61", "bf16"]),
        ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, ["gradient accumulation", "1 or more"]),
        ([], {"ACCELERATE_USE_FSDP": "true"}, ["FSDP is not supported", "--multi_gpu"]),
        ([], {"WORLD_SIZE": "two"}, ["cannot start so", "two"]),
        ([], {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_CPU": "false"}, ["2 processes", "ACCELERATE_USE_CPU"]),
    ],
)  # fmt: skip
def test_a_launch_that_cannot_be_right_is_refused(small_dataset, tmp_path, options, environment, parts):
    if torch.cuda.is_available() and "WORLD_SIZE" in environment:
        pytest.skip("with a GPU Accelerate sees both processes")
    statuses, output = run(small_dataset, tmp_path, *options, environment=environment)
    assert statuses == [2], output
    assert_one_error_line(output, *parts)
    assert not (tmp_path / "run").exists() or not os.listdir(tmp_path / "run")


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_that_the_last_step_made_useless_are_an_error(small_dataset, tmp_path, processes):
    statuses, output = run(
        small_dataset,
        tmp_path,
        *("--max-steps", "1", "--optimizer", "sgd", "--learning-rate", "1e30"),
        processes=processes,
    )
    assert statuses == [2] * processes, output
    assert_one_error_line(output, "not finite", "--learning-rate")


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", "15"],
        ["--validation-size", "150"],
        ["--batch-size", "2", "--auto-batch-size"],
        ["--max-steps", "1", "--optimizer", "sgd", "--learning-rate", "1e30"],
    ],
)
def test_what_fails_on_two_machines_alike_is_told_by_the_first(small_dataset, tmp_path, options):
    fault = partial(_no_memory_for, 0) if "--auto-batch-size" in options else None
    machines = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    statuses, output = run(small_dataset, tmp_path, *options, processes=2, fault=fault, environment=machines)
    assert statuses == [2, 2]
    assert_one_error_line(output)


def test_a_tracker_that_is_not_installed_is_an_error(small_dataset, tmp_path):
    missing = next(name for name in ("wandb", "comet_ml", "aim") if find_spec(name) is None)
    statuses, output = run(small_dataset, tmp_path, "--report-to", missing)
    assert statuses == [2]
    assert_one_error_line(output, missing, "not installed")
    assert "Warning" not in output
    assert not (tmp_path / "run").exists()
