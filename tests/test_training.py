"""A training in this process: what it says, what it leaves on disk, and when it ends."""

import json
import os
import re
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_data import make_small_dataset

from mnist_accel import evaluation, figures, load_model, models, trainer
from mnist_accel.checkpoint import complete_checkpoints, read_checkpoint
from mnist_accel.config import TrainConfig, parse_config
from mnist_accel.data import load_data
from mnist_accel.distributed import build_accelerator
from mnist_accel.trainer import Trainer

# 150 images in batches of 16: ten steps an epoch, the last one of 6 images.
COMMON = ["--batch-size", "16", "--report-to", "none", "--dropout", "0.2", "--learning-rate", "0.002"]
STEPS = 10
CLOCK = {"train_seconds", "images_per_second"}
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@contextmanager
def own_process() -> Iterator[None]:
    """As if what runs inside had a process of its own: nothing process-wide is left behind."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        try:
            yield
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)
            torch.set_flush_denormal(False)
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def run(dataset: Path | str, output: Path, *options: str) -> Path:
    """Train with these options; returns the run's folder."""
    with own_process():
        assert (
            Trainer(parse_config(["--dataset", str(dataset), "--output-dir", str(output), *COMMON, *options])).run()
            == 0
        )
    return output


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows(folder)]


def weights(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "model.safetensors")


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def description(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "config.json").read_text())


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Three epochs with TensorBoard: the data set, the run's folder, and the lines that the run printed."""
    base = tmp_path_factory.mktemp("plain")
    dataset = make_small_dataset(base / "small")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(base / "hf_home"))
        patch.setattr("mnist_accel.reporting.Reporter.say", lambda self, line: lines.append(line))
        run(dataset, base / "run", "--epochs", "3", "--report-to", "tensorboard", "--log-every", "4")
    yield {"dataset": dataset, "run": base / "run", "lines": lines}


# What a run leaves


def test_the_run_folder_holds_what_a_reader_expects(plain):
    files = below(plain["run"])
    events = {name for name in files if name.startswith("tensorboard/")}
    assert events and all("events.out.tfevents" in name for name in events)
    weight_files = {
        f"{name}/{file}" for name in ("best", "final") for file in ("model.safetensors", "config.json", "README.md")
    }
    assert files - events == weight_files | {
        "config.yaml", "metrics.jsonl",
        "checkpoints/step_00000020/training_state.pt", "checkpoints/step_00000020/training_state.sha256",
        "checkpoints/step_00000030/training_state.pt", "checkpoints/step_00000030/training_state.sha256",
        "figures/curves.png", "figures/confusion_matrix.png", "figures/mistakes.png",
    }  # fmt: skip


def test_each_epoch_has_a_row_and_the_last_row_is_the_end(plain):
    *epochs, final = rows(plain["run"])
    keys = {
        "epoch",
        "step",
        "train_loss",
        "eval_loss",
        "eval_accuracy",
        "learning_rate",
        "train_seconds",
        "images_per_second",
    }
    assert all(set(row) == keys for row in epochs)
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, STEPS), (2, 2 * STEPS), (3, 3 * STEPS)]
    assert all(
        row["learning_rate"] == 0.002 and row["train_seconds"] > 0 and row["images_per_second"] > 0 for row in epochs
    )
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"] < 2.5
    assert all(0 <= row["eval_accuracy"] <= 1 for row in epochs)
    assert final["final"] is True and final["step"] == 3 * STEPS
    assert (final["test_accuracy"], final["test_loss"]) == (epochs[-1]["eval_accuracy"], epochs[-1]["eval_loss"])
    assert final["test_accuracy"] > 0.9, "the small data set is learned"
    accuracies = [row["eval_accuracy"] for row in epochs]
    assert final["best_epoch"] == 1 + accuracies.index(max(accuracies))


def test_config_yaml_names_every_option_and_where_the_run_was_made(plain):
    content = yaml.safe_load((plain["run"] / "config.yaml").read_text())
    provenance = content.pop("provenance")
    assert set(content) == set(TrainConfig().options())
    assert (content["learning_rate"], content["epochs"], content["batch_size"]) == (0.002, 3, 16)
    assert provenance["world_size"] == 1 and provenance["mixed_precision"] == "no"
    assert provenance["dataset_fingerprint"] == load_data(str(plain["dataset"])).fingerprint
    assert torch.__version__.startswith(provenance["versions"]["torch"]) and "accelerate" in provenance["versions"]


def test_the_weights_are_described_and_load(plain):
    test = load_data(str(plain["dataset"])).test
    for name in ("best", "final"):
        logits = evaluation.predict_logits(load_model(plain["run"] / name), test.images, torch.device("cpu"))
        accuracy = (logits.argmax(dim=1) == test.labels).double().mean().item()
        assert description(plain["run"], name)["accuracy"] == pytest.approx(accuracy)
        card = (plain["run"] / name / "README.md").read_text()
        assert card.startswith("---\n") and f"{accuracy:.2%}" in card
        assert description(plain["run"], name)["no_digit_level"] is None, "nothing is fitted to the test split"
    assert description(plain["run"], "final")["epoch"] == 3


def test_the_first_lines_name_the_device_the_images_and_the_network(plain):
    device, data, model, folder = plain["lines"][:4]
    assert device.startswith("Device: cpu (1 thread), 1 process, mixed precision no") or "cuda" in device
    assert "150 training images" in data and "53 test images" in data
    assert "mnist_net, 421,642 parameters" in model and model.endswith("global batch 16 = 16 images")
    assert str(plain["run"]) in folder


def test_progress_is_a_line_every_so_many_steps_and_at_the_end_of_each_epoch(plain):
    steps = [int(found[1]) for line in plain["lines"] if (found := re.search(r"Step: (\d+)  Loss: \d+\.\d{4}", line))]
    assert steps == [4, 8, 10, 12, 16, 20, 24, 28, 30]


def test_each_epoch_ends_in_the_line_that_users_of_the_original_know(plain):
    lines = [line for line in plain["lines"] if line.startswith("Test set: ")]
    assert len(lines) == 3
    best = -1.0
    for line, row in zip(lines, rows(plain["run"]), strict=False):
        loss, correct, total, percent, rest = re.fullmatch(
            r"Test set: Average loss: (\d+\.\d{4}), Accuracy: (\d+)/(\d+) \((\d+\.\d\d)%\)(.*)", line
        ).groups()
        assert total == "53" and int(correct) / 53 == pytest.approx(row["eval_accuracy"])
        assert float(percent) == pytest.approx(100 * row["eval_accuracy"], abs=0.006)
        assert float(loss) == pytest.approx(row["eval_loss"], abs=6e-5)
        assert ("new best" in rest) == (row["eval_accuracy"] > best)
        best = max(best, row["eval_accuracy"])


def test_tensorboard_has_scalars_of_steps_and_epochs_and_the_pictures(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(plain["run"] / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert all(event.value == pytest.approx(0.002) for event in events.Scalars("train/learning_rate"))
    logged = [(event.step, event.value) for event in events.Scalars("epoch/eval_accuracy")]
    assert logged == [(row["step"], pytest.approx(row["eval_accuracy"])) for row in rows(plain["run"])[:-1]]
    assert events.Scalars("final/test_accuracy")[0].value == pytest.approx(rows(plain["run"])[-1]["test_accuracy"])
    assert {"curves", "confusion_matrix", "mistakes"} <= set(events.Tags()["images"])


def test_tensorboard_goes_into_the_folder_that_a_run_of_a_taken_name_gets(small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mnist_accel.run_folder.time.strftime", lambda _: "now")
    Path("runs/now").mkdir(parents=True)
    run(small_dataset, tmp_path, "--max-steps", "1", "--report-to", "tensorboard", "--output-dir", "")
    assert any(Path("runs/now-2/tensorboard").iterdir()) and not any(Path("runs/now").iterdir())


def test_without_a_tracker_there_is_no_tensorboard_folder(small_dataset, tmp_path):
    run(small_dataset, tmp_path / "run", "--max-steps", "1", "--report-to", "none")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_the_config_that_a_run_leaves_repeats_it_bit_for_bit(small_dataset, tmp_path):
    options = ["--epochs", "2", "--augment", "--ema-decay", "0.9", "--scheduler", "cosine"]
    options += ["--seed", "5", "--max-steps", "15"]
    first = run(small_dataset, tmp_path / "first", *options)
    with own_process():
        Trainer(parse_config(["--config", str(first / "config.yaml"), "--output-dir", str(tmp_path / "second")])).run()
    for name in ("best", "final"):
        assert same_weights(weights(first, name), weights(tmp_path / "second", name))
    assert timeless(first) == timeless(tmp_path / "second")


def test_the_config_names_the_launcher_s_micro_batches_and_finds_the_data_from_anywhere(
    small_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(small_dataset.parent)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    folder = run(small_dataset.name, tmp_path / "run", "--max-steps", "1")
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert (content["gradient_accumulation_steps"], content["dataset"]) == (4, str(small_dataset))


def test_a_gradient_norm_of_zero_clips_nothing(small_dataset, tmp_path):
    plain, zero = (run(small_dataset, tmp_path / name, "--max-steps", "2", *o) for name, o in
                   (("plain", []), ("zero", ["--max-grad-norm", "0"])))  # fmt: skip
    assert same_weights(weights(plain), weights(zero))


def test_looking_for_a_micro_batch_that_fits_leaves_no_trace(small_dataset, tmp_path):
    options = ["--max-steps", "2", "--non-digits", "40"]
    plain, tried = (run(small_dataset, tmp_path / name, *options, *o) for name, o in
                    (("plain", []), ("tried", ["--auto-batch-size"])))  # fmt: skip
    assert same_weights(weights(plain), weights(tried))


def test_another_seed_is_another_start_and_another_order(small_dataset, tmp_path):
    started = []
    for seed in "01":
        with own_process():
            options = ["--dataset", str(small_dataset), "--output-dir", str(tmp_path / seed), *COMMON, "--seed", seed]
            begun = Trainer(parse_config(options))
            begun.folder.close()
            _, labels, _ = next(begun.loader.epoch(0)).micro_batches[0]
            started.append((begun.network.linear1.weight, labels))
    (weights_of_one, labels_of_one), (weights_of_other, labels_of_other) = started
    assert not torch.equal(weights_of_one, weights_of_other) and not torch.equal(labels_of_one, labels_of_other)


def test_each_option_of_what_is_shown_to_the_network_is_followed(small_dataset, tmp_path):
    choices = [[], ["--augment"], ["--augment", "--augmentation", "elastic"], ["--non-digits", "40"]]
    common = ["--max-steps", "1", "--model", "fast_net"]
    trained = [run(small_dataset, tmp_path / str(n), *common, *choice) for n, choice in enumerate(choices)]
    assert len({weights(folder)["conv1.weight"].sum().item() for folder in trained}) == len(choices)


# When it ends


def test_max_steps_may_end_within_an_epoch(small_dataset, tmp_path):
    folder = run(small_dataset, tmp_path / "run", "--epochs", "5", "--max-steps", "13")
    *epochs, final = rows(folder)
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 10), (2, 13)]
    assert final["final"] is True and final["step"] == 13
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step_00000010", "step_00000013"]
    state = read_checkpoint(folder / "checkpoints" / "step_00000013")
    assert same_weights(state["model"], weights(folder))
    # The epoch's loss is the mean over the 48 images that it got to.
    assert epochs[1]["train_loss"] == pytest.approx(state["state"]["loss_sum"] / 48, abs=1e-6)


def test_max_steps_beyond_the_epochs_does_not_prolong_them(small_dataset, tmp_path):
    folder = run(small_dataset, tmp_path / "run", "--epochs", "1", "--max-steps", "999")
    assert rows(folder)[-1]["step"] == STEPS


def test_max_steps_does_not_bend_the_schedule(small_dataset, tmp_path):
    short = run(small_dataset, tmp_path / "short", "--epochs", "2", "--max-steps", "10", "--scheduler", "cosine")
    long = run(small_dataset, tmp_path / "long", "--epochs", "2", "--scheduler", "cosine")
    assert timeless(short)[0] == timeless(long)[0]


def test_early_stopping_ends_after_so_many_epochs_without_a_new_best(small_dataset, tmp_path, capsys):
    # At rate zero the first epoch stays the best one.
    folder = run(
        small_dataset, tmp_path / "run", "--epochs", "9", "--learning-rate", "0", "--early-stopping-patience", "2"
    )
    *epochs, final = rows(folder)
    assert [row["epoch"] for row in epochs] == [1, 2, 3] and final["best_epoch"] == 1
    assert "Stopped early: no better accuracy in 2 epochs" in capsys.readouterr().out


def test_the_counter_of_early_stopping_survives_a_resume(small_dataset, tmp_path):
    options = ["--epochs", "9", "--learning-rate", "0", "--early-stopping-patience", "3"]
    folder = run(small_dataset, tmp_path / "run", *options, "--max-steps", str(3 * STEPS))
    run(small_dataset, folder, *options, "--resume", "auto")
    assert [row.get("epoch") for row in rows(folder)] == [1, 2, 3, 4, None]


def test_early_stopping_may_watch_the_loss_also_across_a_resume(small_dataset, tmp_path, monkeypatch):
    losses, original = chain([3.0, 2.0], repeat(1.0)), trainer.evaluate_on_all_ranks

    def falling(*args):
        result, logits = original(*args)
        return replace(result, loss=next(losses)), logits

    monkeypatch.setattr(trainer, "evaluate_on_all_ranks", falling)
    # At rate zero the accuracy of the first epoch stays the best, but the loss falls until the third.
    options = ["--epochs", "9", "--learning-rate", "0", "--early-stopping-patience", "2"]
    options += ["--early-stopping-metric", "loss"]
    folder = run(small_dataset, tmp_path / "run", *options, "--max-steps", str(4 * STEPS))
    run(small_dataset, folder, *options, "--resume", "auto")
    *epochs, final = rows(folder)
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4, 5] and final["best_epoch"] == 1


def test_of_equally_good_epochs_the_first_is_kept(plain, tmp_path):
    folder = run(
        plain["dataset"], tmp_path / "run", "--epochs", "6", "--learning-rate", "0.01", "--keep-checkpoints", "9"
    )
    *epochs, final = rows(folder)
    accuracies = [row["eval_accuracy"] for row in epochs]
    first = 1 + accuracies.index(max(accuracies))
    assert accuracies.count(max(accuracies)) > 1, "a tie is what this test is about"
    assert description(folder, "best")["epoch"] == final["best_epoch"] == first
    assert same_weights(
        weights(folder, "best"), read_checkpoint(folder / f"checkpoints/step_{first * STEPS:08d}")["model"]
    )


def test_a_stop_signal_in_the_last_step_does_not_keep_the_run_from_its_end(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "stop_signals", lambda: nullcontext(lambda: signal.SIGTERM))
    folder = run(small_dataset, tmp_path / "run", "--max-steps", "1")
    assert rows(folder)[-1]["final"] and (folder / "final").is_dir()


def test_the_clock_counts_training_alone_and_goes_on_across_a_resume(small_dataset, tmp_path, monkeypatch):
    now, batch, measure = [0.0], trainer.ResidentLoader._batch, trainer.evaluate_on_all_ranks

    def taking(seconds, function):
        return lambda *args: (now.__setitem__(0, now[0] + seconds), function(*args))[1]

    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(trainer.ResidentLoader, "_batch", taking(1.0, batch))
    monkeypatch.setattr(trainer, "evaluate_on_all_ranks", taking(100.0, measure))
    run(small_dataset, tmp_path / "run", "--epochs", "2", "--max-steps", "14")
    folder = run(small_dataset, tmp_path / "run", "--epochs", "2", "--resume", "auto")
    assert [row["train_seconds"] for row in rows(folder)[:-1]] == [10.0, 10.0]
    assert [row["images_per_second"] for row in rows(folder)[:-1]] == [15.0, 15.0]


# What is evaluated and kept


def test_the_reported_measures_are_those_of_the_weights_as_loaded_in_mixed_precision_too(
    small_dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = run(small_dataset, tmp_path / "run", "--epochs", "1")
    loss = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]
    data = load_data(str(small_dataset))
    again = evaluation.evaluate([load_model(folder / "final")], data.test, data.class_names, torch.device("cpu"))
    assert loss == pytest.approx(again.loss, abs=2e-6)


def test_with_validation_the_test_split_is_read_once_at_the_end(small_dataset, tmp_path, monkeypatch, capsys):
    data, seen = load_data(str(small_dataset)), []
    original = evaluation.predict_logits

    def spy(model, images, *args, **kwargs):
        seen.append(images)
        return original(model, images, *args, **kwargs)

    monkeypatch.setattr(evaluation, "predict_logits", spy)
    trained_on = []
    original_batch = trainer.ResidentLoader._batch
    monkeypatch.setattr(
        trainer.ResidentLoader,
        "_batch",
        lambda self, indices, step: (trained_on.extend(self.images[indices]), original_batch(self, indices, step))[1],
    )
    folder = run(small_dataset, tmp_path / "run", "--epochs", "3", "--validation-size", "40")
    assert [len(images) for images in seen[:3]] == [40, 40, 40]
    assert len(seen) <= 5 and all(torch.equal(images, data.test.images) for images in seen[3:]), (
        "final/ and best/, at the end"
    )
    held_out = {image.numpy().tobytes() for image in seen[0]}
    training = {image.numpy().tobytes() for image in data.train.images}
    assert len(held_out) == 40 and {image.numpy().tobytes() for image in trained_on} == training - held_out
    *epochs, final = rows(folder)
    assert all(row["eval_accuracy"] * 40 == pytest.approx(round(row["eval_accuracy"] * 40)) for row in epochs)
    assert final["test_accuracy"] * 53 == pytest.approx(round(final["test_accuracy"] * 53))
    output = capsys.readouterr().out
    assert output.count("Validation set: Average loss: ") == 3
    assert len(re.findall(r"^Test set.*Average loss: .*/53 ", output, re.MULTILINE)) == 1
    assert "110 training images, 40 held out" in output
    assert description(folder, "best")["split"] == "validation" and description(folder, "final")["split"] == "test"
    assert description(folder, "best")["no_digit_level"] and description(folder, "final")["no_digit_level"]
    logits = original(load_model(folder / "best"), data.test.images, torch.device("cpu"))
    accuracy = (logits.argmax(dim=1) == data.test.labels).double().mean().item()
    assert final["best_test_accuracy"] == pytest.approx(accuracy)
    assert description(folder, "best")["test_accuracy"] == final["best_test_accuracy"]
    card = ModelCard((folder / "best" / "README.md").read_text())
    reported = {result.dataset_split: result.metric_value for result in card.data.eval_results}
    best_row = epochs[final["best_epoch"] - 1]
    assert reported == pytest.approx({"validation": best_row["eval_accuracy"], "test": accuracy}, abs=1e-6)
    assert f"On the test split: accuracy {accuracy:.2%}." in card.text


def test_best_and_final_hold_the_averaged_weights(small_dataset, tmp_path):
    folder = run(small_dataset, tmp_path / "run", "--epochs", "1", "--ema-decay", "0.9")
    state = read_checkpoint(folder / "checkpoints" / "step_00000010")
    for name in ("best", "final"):
        assert same_weights(weights(folder, name), state["average"])
        assert not same_weights(weights(folder, name), state["model"])


def test_what_the_data_set_is_like_reaches_the_weights_and_the_figures(small_dataset, tmp_path, monkeypatch):
    data = replace(load_data(str(small_dataset)), class_names=FASHION, inverted=True)
    monkeypatch.setattr(trainer, "load_data", lambda name: data)
    drawn_with = []
    original = figures.draw_confusion_matrix
    monkeypatch.setattr(
        figures, "draw_confusion_matrix", lambda *args: (drawn_with.append(args[1]), original(*args))[1]
    )
    folder = run("zalando-datasets/fashion_mnist", tmp_path / "run", "--max-steps", "1")
    assert description(folder, "best")["class_names"] == FASHION and drawn_with == [FASHION]
    assert load_model(folder).class_names == FASHION and load_model(folder).inverted
    assert "Ankle boot" in (folder / "best" / "README.md").read_text()


def test_a_data_set_of_other_than_ten_classes_trains(small_dataset, tmp_path, monkeypatch):
    data = load_data(str(small_dataset))
    three = [replace(split, labels=split.labels % 3) for split in (data.train, data.test)]
    monkeypatch.setattr(
        trainer, "load_data", lambda name: replace(data, train=three[0], test=three[1], class_names=list("abc"))
    )
    folder = run("three", tmp_path / "run", "--max-steps", "2")
    assert weights(folder)["linear2.weight"].shape == (3, 128)


@pytest.mark.parametrize("model", ["compact_net", "residual_net", "deep_net"])
def test_the_other_networks_train_too(small_dataset, tmp_path, model):
    folder = run(small_dataset, tmp_path / "run", "--model", model, "--max-steps", "2")
    assert load_model(folder).name == model and (folder / "figures" / "mistakes.png").is_file()


def test_bf16_is_the_launcher_s_choice_and_leaves_plain_weights(small_dataset, tmp_path, monkeypatch, capsys):
    plain = run(small_dataset, tmp_path / "plain", "--max-steps", "6", "--dropout", "0")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    half = run(small_dataset, tmp_path / "half", "--max-steps", "6", "--dropout", "0")
    assert "mixed precision bf16" in capsys.readouterr().out
    assert yaml.safe_load((half / "config.yaml").read_text())["provenance"]["mixed_precision"] == "bf16"
    differences = [(tensor - weights(plain)[name]).abs().max() for name, tensor in weights(half).items()]
    assert all(tensor.dtype == torch.float32 for tensor in weights(half).values())
    assert 0 < max(differences) < 0.02


def test_deterministic_chooses_kernels_that_repeat_themselves(small_dataset, tmp_path, monkeypatch):
    seen = []
    original = Trainer._end_epoch

    def look(self):
        settings = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        seen.append((*settings, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        original(self)

    monkeypatch.setattr(Trainer, "_end_epoch", look)
    one, other = (run(small_dataset, tmp_path / name, "--epochs", "1", "--augment", "--deterministic") for name in "ab")
    assert seen == [(True, False, ":4096:8")] * 2
    assert same_weights(weights(one), weights(other))
    run(small_dataset, tmp_path / "fast", "--max-steps", "1")
    assert seen[-1] == (False, True, None)


def test_a_compiled_run_compiles_one_graph_and_leaves_the_same_weights(small_dataset, tmp_path, monkeypatch):
    options = ["--epochs", "2", "--dropout", "0", "--validation-size", "41", "--ema-decay", "0.9"]
    plain = run(small_dataset, tmp_path / "plain", *options)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    compiled = run(small_dataset, tmp_path / "compiled", *options)
    assert counters["unique_graphs"] == before + 1, "the last batch of an epoch has the shape of all others"
    for name in ("best", "final"):
        expected, found = (load_file(folder / name / "model.safetensors") for folder in (plain, compiled))
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0)


def test_advice_of_torch_s_that_users_cannot_follow_is_left_out(monkeypatch):
    from torch._inductor import compile_fx

    with own_process(), warnings.catch_warnings():
        warnings.simplefilter("error")
        build_accelerator()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        compile_fx._warn_tf32_disabled.__wrapped__()  # a warning in torch 2.11


def test_gradients_that_accumulate_survive_memory_that_the_next_micro_batch_writes_over(
    small_dataset, tmp_path, monkeypatch
):
    def like_a_cuda_graph(parameter: torch.nn.Parameter) -> None:
        """As in a replayed graph, the gradient is at the same place in memory each time."""
        place = torch.empty_like(parameter.detach())
        parameter.register_hook(lambda gradient: place.copy_(gradient).detach())

    class Network(models.FastNet):
        def __init__(self, *args):
            super().__init__(*args)
            for parameter in self.parameters():
                like_a_cuda_graph(parameter)

    options = ["--model", "fast_net", "--max-steps", "3", "--dropout", "0", "--optimizer", "sgd"]
    plain = run(small_dataset, tmp_path / "plain", *options)
    monkeypatch.setitem(models.MODELS, "fast_net", Network)
    accumulated = run(small_dataset, tmp_path / "accumulated", *options, "--gradient-accumulation-steps", "4")
    for name, tensor in weights(accumulated).items():
        torch.testing.assert_close(tensor, weights(plain)[name], atol=1e-6, rtol=0)


def test_training_beside_the_main_thread_works(small_dataset, tmp_path):
    """As in a notebook's or a window's worker; there Python lets nobody handle signals."""
    with ThreadPoolExecutor(1) as pool:
        folder = pool.submit(run, small_dataset, tmp_path / "run", "--max-steps", "2").result()
    assert rows(folder)[-1]["final"] is True
