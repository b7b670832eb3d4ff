"""A training killed at any moment goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from launching import Job, train
from small_data import make_small_dataset
from test_same_numbers import rows, weights

from mnist_accel.distributed import stop_signals

# Everything that has a state or draws numbers is on: dropout, augmentation, schedule, averaging, Adam's moments.
OPTIONS = [
    *("--batch-size", "16", "--epochs", "4", "--augment", "--scheduler", "onecycle", "--ema-decay", "0.95"),
    *("--checkpoint-every", "3", "--learning-rate", "0.003", "--log-every", "5"),
]
# More kills for a long test: KILLS=20 pytest tests/test_resume.py
KILLS = int(os.environ.get("KILLS", "4"))


def options(dataset: Path, output: Path) -> list[str]:
    return [*OPTIONS, "--dataset", str(dataset), "--output-dir", str(output)]


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("best", "final"):
        described = [json.loads((folder / name / "config.json").read_text()) for folder in (one, other)]
        for facts in described:
            facts["options"] = facts["dataset"] = None  # which name their folders
        assert described[0] == described[1]
        assert weights(one, name).keys() == weights(other, name).keys()
        for key, tensor in weights(one, name).items():
            assert torch.equal(tensor, weights(other, name)[key]), f"{name} {key}"
    timeless = [
        [{k: v for k, v in row.items() if k not in ("train_seconds", "images_per_second")} for row in rows(folder)]
        for folder in (one, other)
    ]
    assert timeless[0] == timeless[1]


def complete_checkpoints_load(run: Path) -> None:
    for checkpoint in (run / "checkpoints").glob("step_*"):
        torch.load(checkpoint / "training_state.pt", weights_only=True)


def scalars(run: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_no_point_in_tensorboard_is_doubled_or_missing_after_a_start_without_a_checkpoint_or_max_steps(
    small_dataset, tmp_path
):
    fewer = ["--epochs", "2", "--checkpoint-every", "epoch"]
    arguments = [*options(small_dataset, tmp_path / "run"), *fewer, "--resume", "auto"]
    job = Job(arguments, tmp_path / "logs")
    job.wait_for(lambda: "Step: 5 " in job.output())
    job.signal(signal.SIGKILL)
    job.wait()
    for more in (["--max-steps", "10"], ["--max-steps", "13"], ["--max-steps", "13"], []):
        train([*arguments, *more], tmp_path / "logs")
    epochs = [row["step"] for row in rows(tmp_path / "run") if "final" not in row]
    points = scalars(tmp_path / "run")
    assert points["epoch/eval_loss"] == epochs
    assert points["train/loss"] == [5, 10, 15, 20]


@pytest.mark.parametrize("processes", [1, 2])
def test_sigkill_at_random_moments_leaves_the_result_bit_identical(small_dataset, tmp_path, processes):
    calm = options(small_dataset, tmp_path / "calm")
    train(calm, tmp_path / "logs", processes=processes)
    chance = random.Random(processes)
    killed = [*options(small_dataset, tmp_path / "killed"), "--resume", "auto"]
    ended = False
    for _ in range(KILLS):
        job = Job(killed, tmp_path / "logs", processes=processes)
        # Counted from the moment the run folder is ready, so that kills fall into training, evaluation and writing.
        job.wait_for(lambda job=job: "Run: " in job.output())
        for process in job.processes:
            process.join(chance.uniform(0, 1.2) / len(job.processes))
        job.signal(signal.SIGKILL)
        ended = ended or job.wait() == [0] * processes
        complete_checkpoints_load(tmp_path / "killed")
    train(killed, tmp_path / "logs", processes=processes)
    assert_same_run(tmp_path / "calm", tmp_path / "killed")
    assert scalars(tmp_path / "calm") == scalars(tmp_path / "killed")


def _die_in_call(module: str, function: str, count: int) -> None:
    """Make the process kill itself in the given call of a function, half way through where that can be."""
    import importlib

    owner = importlib.import_module(module)
    original = getattr(owner, function)
    calls = [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            if function == "save":
                args[1].write(b"half a checkpoint")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, function, dying)


@pytest.mark.parametrize(
    "module, function, count",
    [
        ("torch", "save", 1),
        ("torch", "save", 3),
        ("os", "fsync", 5),
        ("os", "fsync", 11),
        ("os", "replace", 4),
        ("mnist_accel.checkpoint", "_remove", 1),
        ("mnist_accel.checkpoint", "flush_folder", 2),
        ("mnist_accel.run_folder", "model_files", 2),
    ],
)
def test_a_kill_in_the_middle_of_a_write_leaves_the_result_bit_identical(
    small_dataset, tmp_path, calm_run, module, function, count
):
    killed = [*options(small_dataset, tmp_path / "killed"), "--resume", "auto"]
    job = Job(killed, tmp_path / "logs", fault=partial(_die_in_call, module, function, count))
    assert job.wait() == [-signal.SIGKILL], job.output()
    complete_checkpoints_load(tmp_path / "killed")
    train(killed, tmp_path / "logs")
    assert_same_run(calm_run, tmp_path / "killed")


@pytest.fixture(scope="module")
def calm_run(tmp_path_factory) -> Path:
    """An uninterrupted run on the same small data set as `small_dataset` makes for every test."""
    base = tmp_path_factory.mktemp("calm")
    dataset = make_small_dataset(base / "small")
    train(options(dataset, base / "run"), base / "logs")
    return base / "run"


@pytest.mark.parametrize(
    "number, processes, ranks",
    [(signal.SIGTERM, 1, None), (signal.SIGINT, 1, None), (signal.SIGUSR1, 2, [1]), (signal.SIGTERM, 2, None)],
)
def test_a_stop_signal_saves_and_exits_with_128_plus_its_number(small_dataset, tmp_path, number, processes, ranks):
    run = tmp_path / "run"
    arguments = [*options(small_dataset, run), "--epochs", "400", "--checkpoint-every", "epoch"]
    job = Job(arguments, tmp_path / "logs", processes=processes)
    job.wait_for(lambda: "Step: " in job.output())
    job.signal(number, ranks)
    assert job.wait(30) == [128 + number] * processes, job.output()
    assert "Stopped by" in job.output() and "--resume auto" in job.output()
    stopped_at = int(job.output().split("after step ")[1].split(";")[0])
    assert (run / "checkpoints" / f"step_{stopped_at:08d}").is_dir()


def test_a_signal_sent_twice_is_one_and_a_second_ctrl_c_stops_at_once():
    """As where both a batch system and a launcher pass it on."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with stop_signals() as received:
            assert received() == 0
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert received() == number
    with pytest.raises(KeyboardInterrupt), stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "what signals did before, they do again"


def test_a_run_goes_on_with_another_number_of_processes(small_dataset, tmp_path, calm_run):
    moved = options(small_dataset, tmp_path / "moved")
    train([*moved, "--dropout", "0", "--max-steps", "17"], tmp_path / "logs", processes=2)
    train([*moved, "--dropout", "0", "--resume", "auto"], tmp_path / "logs", processes=1)
    train([*options(small_dataset, tmp_path / "whole"), "--dropout", "0"], tmp_path / "logs")
    for key, tensor in weights(tmp_path / "whole").items():
        assert (tensor - weights(tmp_path / "moved")[key]).abs().max() < 1e-3, key
    assert [row.get("epoch") for row in rows(tmp_path / "moved")] == [1, 2, 3, 4, None]


def test_a_dead_rank_does_not_leave_the_other_hanging(small_dataset, tmp_path):
    job = Job([*options(small_dataset, tmp_path / "run"), "--epochs", "400"], tmp_path / "logs", processes=2)
    job.wait_for(lambda: "Step: " in job.output())
    job.signal(signal.SIGKILL, ranks=[1])
    statuses = job.wait(60)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None)
    complete_checkpoints_load(tmp_path / "run")


@pytest.mark.parametrize(
    "change, named",
    [(["--learning-rate", "0.1"], "--learning-rate"), (["--seed", "7"], "--seed"), (["--epochs", "9"], "--epochs")],
)
def test_a_checkpoint_of_other_options_is_refused_by_name(small_dataset, tmp_path, calm_run, change, named):
    shutil.copytree(calm_run, tmp_path / "run")
    job = Job([*options(small_dataset, tmp_path / "run"), "--resume", "auto", *change], tmp_path / "logs")
    assert job.wait() == [2]
    lines = job.output().strip().splitlines()
    assert len(lines) == 1 and f"{named} was" in lines[0]
    assert_same_run(calm_run, tmp_path / "run")


def test_a_checkpoint_of_other_data_is_refused(tmp_path, calm_run):
    shutil.copytree(calm_run, tmp_path / "run")
    job = Job([*OPTIONS, "--dataset", "digits", "--output-dir", str(tmp_path / "run"), "--resume", "auto"], tmp_path)
    assert job.wait() == [2] and "--dataset was other data" in job.output()


@pytest.mark.parametrize("damage", ["cut short", "a changed bit"])
def test_a_damaged_checkpoint_costs_one_checkpoint_not_the_run(small_dataset, tmp_path, calm_run, damage):
    shutil.copytree(calm_run, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "training_state.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 64
    newest.write_bytes(content if damage == "a changed bit" else content[:5000])
    job = train([*options(small_dataset, tmp_path / "run"), "--resume", "auto"], tmp_path / "logs")
    assert "is damaged" in job.output()
    assert_same_run(calm_run, tmp_path / "run")


def test_a_finished_run_is_resumed_without_change(small_dataset, tmp_path, calm_run):
    shutil.copytree(calm_run, tmp_path / "run")
    train([*options(small_dataset, tmp_path / "run"), "--resume", "auto"], tmp_path / "logs")
    assert_same_run(calm_run, tmp_path / "run")


def test_a_run_goes_on_in_a_new_folder_with_its_best_weights(small_dataset, tmp_path, calm_run):
    checkpoint = sorted((calm_run / "checkpoints").glob("step_*"))[0]
    train([*options(small_dataset, tmp_path / "new"), "--resume", str(checkpoint)], tmp_path / "logs")
    assert_same_run(calm_run, tmp_path / "new")


def test_an_ended_run_with_held_out_images_is_resumed_without_change(small_dataset, tmp_path):
    run = [*options(small_dataset, tmp_path / "run"), "--validation-size", "40"]
    train(run, tmp_path / "logs")
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    train([*run, "--resume", "auto"], tmp_path / "logs")
    assert_same_run(tmp_path / "before", tmp_path / "run")
    picture = Path("figures", "mistakes.png")
    assert (tmp_path / "before" / picture).read_bytes() == (tmp_path / "run" / picture).read_bytes()


def test_a_run_that_max_steps_ended_within_an_epoch_is_resumed_and_goes_on_as_if_uninterrupted(
    small_dataset, tmp_path, calm_run
):
    run = options(small_dataset, tmp_path / "run")
    for steps in ([], ["--resume", "auto"]):
        train([*run, "--max-steps", "17", *steps], tmp_path / "logs")
        assert rows(tmp_path / "run")[-1]["step"] == 17
    # As if the weights of the epoch that was cut short had been the best.
    weights_then = sorted((tmp_path / "run" / "final").iterdir())
    for file in weights_then:
        shutil.copy(file, tmp_path / "run" / "best" / file.name)
    train([*run, "--resume", "auto"], tmp_path / "logs")
    assert_same_run(calm_run, tmp_path / "run")


def test_a_run_is_not_overwritten_by_another_that_begins_from_a_checkpoint(small_dataset, tmp_path, calm_run):
    shutil.copytree(calm_run, tmp_path / "other")
    checkpoint = sorted((calm_run / "checkpoints").glob("step_*"))[0]
    job = Job([*options(small_dataset, tmp_path / "other"), "--resume", str(checkpoint)], tmp_path / "logs")
    assert job.wait() == [2] and "already holds a run" in job.output()
    assert_same_run(calm_run, tmp_path / "other")


def test_an_ended_run_without_its_checkpoints_is_not_overwritten(small_dataset, tmp_path, calm_run):
    shutil.copytree(calm_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    job = Job([*options(small_dataset, tmp_path / "run"), "--resume", "auto"], tmp_path / "logs")
    assert job.wait() == [2] and "already holds a run" in job.output()
    assert_same_run(calm_run, tmp_path / "run")


def test_going_on_in_another_precision_is_said(small_dataset, tmp_path):
    run = options(small_dataset, tmp_path / "run")
    train([*run, "--max-steps", "5"], tmp_path / "logs")
    resumed = [*run, "--resume", "auto", "--max-steps", "7"]
    job = train(resumed, tmp_path / "logs", environment={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "warning: the checkpoint is of mixed precision no: in bf16 numbers differ" in job.output()
    assert (
        "warning" not in train(resumed, tmp_path / "logs", environment={"ACCELERATE_MIXED_PRECISION": "bf16"}).output()
    )
