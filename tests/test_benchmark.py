"""The benchmark: what it starts, what it makes of the numbers, and that nothing runs on for ever."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, median

import pytest
from PIL import Image

from mnist_accel import benchmark
from mnist_accel.benchmark import Benchmark, compute_ratios, draw_benchmark, run_process
from mnist_accel.cli import UserError

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmark.py"


def measurement(part: str, name: str, unit: str, *values: float) -> dict:
    return {"part": part, "name": name, "unit": unit, "median": median(values), "mean": fmean(values), "values": values}


def accuracies(fast: float, example: float) -> list[dict]:
    return [
        measurement("accuracy", "recipe fast", "s", 2.0, 4.0),
        measurement("accuracy", "recipe fast", "test accuracy", fast),
        measurement("accuracy", "PyTorch's example", "s", 60.0),
        measurement("accuracy", "PyTorch's example", "test accuracy", example),
    ]


@pytest.mark.timeout(420)  # on a machine with other work, where threads that spin wait for each other
def test_the_smallest_run_prints_its_ratios_and_writes_json_and_a_figure(small_dataset: Path, tmp_path: Path) -> None:
    output, figure = tmp_path / "numbers.json", tmp_path / "figure.png"
    command = [sys.executable, SCRIPT, "--dataset", small_dataset, "--output", output, "--figure", figure]
    command += ["--parts", "training", "startup", "--precisions", "fp32", "--workers", 0, "--time-limit", 350]
    command += ["--rounds", 1, "--steps", 2]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    measured = {row["name"]: row["median"] for row in results["measurements"]}
    assert {"this project, fp32", "raw PyTorch, fp32", "train.py --help"} < measured.keys()
    assert all(value > 0 for value in measured.values())
    ratios = {row["name"]: row["value"] for row in results["ratios"]}
    raw = measured["this project, fp32"] / measured["raw PyTorch, fp32"]
    assert ratios["training, fp32: speed over raw PyTorch"] == pytest.approx(raw)
    assert all(name in done.stdout for name in [*measured, *ratios, results["machine"]["torch"]])
    assert min(Image.open(figure).size) > 250


def test_the_plain_prediction_loop_classifies_every_generated_image(small_dataset: Path, tmp_path: Path) -> None:
    from mnist_accel import benchmark_loops

    folder, model = tmp_path / "images", tmp_path / "weights"
    benchmark_loops.make_images(str(small_dataset), number=60, folder=str(folder), model=str(model))
    assert Image.open(folder / "000059.png").size == (28, 28)
    assert benchmark_loops.predict(str(folder), str(model)) == {"images": 60}


def test_the_reference_stops_at_its_target(small_dataset: Path) -> None:
    from mnist_accel import benchmark_loops

    reference = partial(benchmark_loops.pytorch, str(small_dataset), seed=0, most_epochs=2)
    assert reference(target=0.0) == {"test accuracy": 0.0, "epochs": 0}
    found = reference(target=2.0)
    assert found["epochs"] == 2 and 0.2 < found["test accuracy"] <= 1


def test_the_fraction_of_the_matrix_product_rate_counts_the_arithmetic_of_an_image() -> None:
    rows = [measurement("training", "this project, bf16", "images/s", 100.0)]
    ratios = compute_ratios(rows, {"operations_per_image": 20e6, "FLOP/s, bf16": 4e9})
    assert ratios == [{"name": "training, bf16: fraction of the matrix-product rate", "value": 0.5}]


def test_times_to_the_target_are_compared_by_their_means() -> None:
    (ratio,) = compute_ratios(accuracies(0.991, 0.99), {})
    assert ratio["value"] == pytest.approx(60 / 3)


def test_the_figure_says_which_trainings_missed_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    monkeypatch.setattr("mnist_accel.figures.pixels_of", lambda figure: names.extend(figure.axes[0].get_yticklabels()))
    machine = {"processor": "a processor", "threads": 1, "device": "cpu", "torch": "2"}
    draw_benchmark({"measurements": accuracies(0.987, 0.991), "machine": machine})
    assert [name.get_text() for name in names] == ["recipe fast, missed: 98.70%", "PyTorch's example"]


@pytest.mark.parametrize("pair", [(0.989, 0.991), (0.991, 0.989)])
def test_times_are_not_compared_where_one_missed_the_target(pair: tuple[float, float]) -> None:
    assert compute_ratios(accuracies(*pair), {}) == []


def test_the_best_variant_of_the_examples_is_the_fastest() -> None:
    speeds = {"this project": 90.0, "examples, 0 workers, default launch": 10.0, "examples, 2 workers, all cores": 30.0}
    rows = [measurement("training", f"{name}, fp32", "images/s", speed) for name, speed in speeds.items()]
    ratios = {row["name"]: row["value"] for row in compute_ratios(rows, {"operations_per_image": 1.0})}
    assert ratios["training, fp32: speed over the examples' loop, its best variant"] == 3.0


def test_a_figure_of_accuracy_alone_can_be_drawn() -> None:
    machine = {"processor": "a processor", "threads": 2, "device": "cpu", "torch": "2"}
    assert draw_benchmark({"measurements": accuracies(0.99, 0.99), "machine": machine}).std() > 5


def test_a_process_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(1.5); open({str(late)!r}, 'w')"
    for session in (False, True):  # a launcher starts each of several ranks in a session of its own
        started = f"[sys.executable, '-c', {child!r}], start_new_session={session}"
        with pytest.raises(UserError, match=r"took more than 0\.5 s"):
            run_process([sys.executable, "-c", f"import subprocess, sys; subprocess.run({started})"], time_limit=0.5)
    with pytest.raises(UserError, match="took more than 2 s"):
        run_process([sys.executable, "-c", "import time; time.sleep(60)"], time_limit=2)
    assert not late.exists()


def test_a_process_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"status 3: no such thing$"):
        run_process([sys.executable, "-c", "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"], 30)


def test_a_process_that_fails_costs_no_other_its_place_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_process(words: list[str], time_limit: float) -> tuple[str, float]:
        if "--help" in words:
            raise UserError("train.py --help failed with status 3")
        return '{"operations_per_image": 1}', 2.0

    monkeypatch.setattr(benchmark, "run_process", run_process)
    results = Benchmark(scripts=Path("scripts"), dataset="digits", parts=["startup"], rounds=2).run()
    values = {row["name"]: row["values"] for row in results["measurements"]}
    assert values == {"import torch, accelerate": [2.0, 2.0], "train.py --max-steps 1": [2.0, 2.0]}
    assert results["failures"] == ["startup: train.py --help: train.py --help failed with status 3"] * 2
    assert results["failures"][0] in capsys.readouterr().out


def test_a_data_set_that_is_not_there_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "run_process", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(UserError, match="no folder nowhere"):
        Benchmark(scripts=Path("scripts"), dataset="nowhere").run()


def test_writing_the_images_to_predict_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "run_process", lambda words, time_limit: ('{"operations_per_image": 1}', 2.0))
    results = Benchmark(scripts=Path("scripts"), dataset="digits", parts=["prediction"], rounds=2).run()
    assert {row["name"]: row["values"] for row in results["measurements"]} == {
        "predict_dir.py": [2.0, 2.0],
        "one by one": [2.0, 2.0],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "training", "speed"], "invalid choice: 'speed'"),
        (["--rounds", "0"], "a whole number of at least 1"),
        (["--parts", "startup", "--figure", "f.png"], "measure at least one"),
    ],
)
def test_a_mistaken_option_is_one_line_and_status_2(options: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
