"""Measures this project against the loops that users would write instead, side by side in one run.

Every measurement is a process of its own with a hard time limit, started as a user would start it. The processes of a
part take turns, several rounds of them, so that a machine that grows slower in between slows all of them alike.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil

from mnist_accel.cli import COUNT, POSITIVE, UserError, number
from mnist_accel.config import option

DRAWN = {"training", "accuracy"}  # the parts that `draw_benchmark` shows
PARTS = ("training", "kernels", "accuracy", "prediction", "scaling", "startup")
PRECISIONS = ("fp32", "bf16")
TARGET = 0.99
SPEED, TIME, ACCURACY = "images/s", "s", "test accuracy"
PYTHON = sys.executable
LOOPS = ["-m", "mnist_accel.benchmark_loops"]

# What takes turns: its name, which numbers to keep by their units, and a command for each round. `TIME` is wall time
# from start to end; other numbers are what the command prints as JSON in its last line, or, of train.py, what its
# metrics.jsonl says.
Case = tuple[str, Sequence[str], Sequence[list[Any]]]


@dataclass
class Benchmark:
    """What to measure and how often: the options of scripts/benchmark.py, and what is known once it runs."""

    scripts: Path  # the folder of train.py and predict_dir.py
    dataset: str = option("ylecun/mnist", "a Hub id, a local folder, or digits")
    parts: Sequence[str] = option(PARTS, "what to measure (default: all)", nargs="+", choices=PARTS)
    precisions: Sequence[str] = option(PRECISIONS, "of the trainings (default: both)", nargs="+", choices=PRECISIONS)
    workers: Sequence[int] = option((0, 2), "of the examples' DataLoader (default: 0 2)", nargs="+", type=COUNT)
    rounds: int = option(3, "how often each command is run, in turn", type=POSITIVE)
    steps: int = option(300, "optimizer steps of a training measurement", type=POSITIVE)
    seeds: int = option(5, "trainings of the recipe fast", type=POSITIVE)
    images: int = option(10_000, "files to predict", type=POSITIVE)
    time_limit: float = option(3600, "seconds after which a process is killed", type=number(float, 0))
    machine: dict[str, Any] = field(init=False)  # of `benchmark_loops.machine`
    folder: Path = field(init=False)  # for what the processes write; removed at the end

    def run(self, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Measure everything; returns what the JSON file holds.

        That is `machine`, `settings`, `measurements`, `ratios`, and `failures`: a line for each process that failed or
        took longer than the time limit. An hour's other measurements are not lost by it.
        """
        values: dict[tuple[str, str, str], list[float]] = {}
        failures: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            self.machine = self._measure([PYTHON, *LOOPS, "machine"])
            for part in self.parts:
                cases: list[Case] = list(getattr(self, f"_{part}")())
                runs = [(turn, *case) for case in cases for turn in range(len(case[-1]))]
                for turn, name, units, commands in sorted(runs, key=itemgetter(0)):
                    try:
                        numbers = self._measure(commands[turn])
                    except UserError as error:
                        failures.append(f"{part}: {name}: {error}")
                        say(failures[-1])
                        continue
                    for unit in units:
                        values.setdefault((part, name, unit), []).append(numbers[unit])
                    say(f"{part}: {name}: " + ", ".join(as_text(numbers[unit], unit) for unit in units))
        measurements = [
            {"part": part, "name": name, "unit": unit, "median": statistics.median(found), "values": found}
            for (part, name, unit), found in values.items()
        ]
        settings = {name: getattr(self, name) for name in ("dataset", "rounds", "steps", "seeds", "images")}
        ratios = compute_ratios(measurements, self.machine)
        return {
            "machine": self.machine,
            "settings": settings,
            "measurements": measurements,
            "ratios": ratios,
            "failures": failures,
        }

    # The parts: each yields the cases that take turns

    def _training(self) -> Iterator[Case]:
        common = ["--dataset", self.dataset, "--steps", self.steps]
        for precision in self.precisions:
            launch, bf16 = _launch(precision), ["--bf16"] if precision == "bf16" else []
            yield self._case(f"this project, {precision}", SPEED, [*launch, *self._train("--max-steps", self.steps)])
            yield self._case(f"raw PyTorch, {precision}", SPEED, [PYTHON, *LOOPS, "raw", *common, *bf16])
            for workers in self.workers:
                name, loop = f"examples, {workers} workers", [*LOOPS, "examples", *common, "--workers", workers]
                yield self._case(f"{name}, default launch, {precision}", SPEED, [*launch, *loop])
                if self.machine["threads"] > 1:
                    threads = ["--num_cpu_threads_per_process", self.machine["threads"]]
                    yield self._case(f"{name}, all cores, {precision}", SPEED, [*launch, *threads, *loop])

    def _kernels(self) -> Iterator[Case]:
        for precision in self.precisions:
            yield self._case(f"matrix product, {precision}", f"FLOP/s, {precision}", [PYTHON, *LOOPS, "machine"])

    def _accuracy(self) -> Iterator[Case]:
        bf16_is_faster = self.machine["FLOP/s, bf16"] > 1.2 * self.machine["FLOP/s, fp32"]
        fast = [*_launch("bf16" if bf16_is_faster else "fp32"), *self._train("--recipe", "fast", "--seed")]
        yield "recipe fast", [TIME, ACCURACY, "s training"], [[*fast, seed] for seed in range(self.seeds)]
        example = [PYTHON, *LOOPS, "pytorch", "--dataset", self.dataset, "--target", TARGET, "--seed"]
        yield "PyTorch's example", [TIME, ACCURACY], [[*example, seed] for seed in range(min(3, self.seeds))]

    def _prediction(self) -> Iterator[Case]:
        images, weights = self.folder / "images", self.folder / "weights"
        both = ["--folder", images, "--model", weights]
        self._measure([PYTHON, *LOOPS, "make_images", "--dataset", self.dataset, "--steps", self.images, *both])
        options = [images, "--model", weights, "--output", self.folder / "predictions.csv"]
        yield self._case("predict_dir.py", TIME, [PYTHON, self.scripts / "predict_dir.py", *options])
        yield self._case("one by one", TIME, [PYTHON, *LOOPS, "predict", *both])

    def _scaling(self) -> Iterator[Case]:
        on_cpu = self.machine["device"] == "cpu"
        if self.machine["threads" if on_cpu else "devices"] < 2:
            return
        # A device each, on a CPU one core each. Without the variable, processes on a CPU would train each alone.
        environment = ["env", "ACCELERATE_USE_CPU=true"] if on_cpu else []
        train = ["--num_cpu_threads_per_process", 1, *self._train("--max-steps", self.steps)]
        yield self._case("1 process", SPEED, [*environment, *_launch("fp32"), *train])
        yield self._case("2 processes", SPEED, [*environment, *_launch("fp32", processes=2), *train])

    def _startup(self) -> Iterator[Case]:
        yield self._case("import torch, accelerate", TIME, [PYTHON, "-c", "import torch, accelerate"])
        yield self._case("train.py --help", TIME, [PYTHON, self.scripts / "train.py", "--help"])
        yield self._case("train.py --max-steps 1", TIME, [PYTHON, *self._train("--max-steps", 1)])

    # Processes

    def _case(self, name: str, unit: str, command: list[Any]) -> Case:
        return name, [unit], [command] * self.rounds

    def _train(self, *options: Any) -> list[Any]:
        common = ["--dataset", self.dataset, "--report-to", "none", "--output-dir", self.folder / "run"]
        return [self.scripts / "train.py", *common, *options]

    def _measure(self, command: Sequence[Any]) -> dict[str, Any]:
        """The numbers of a command, under their units."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)  # a training does not start in a folder that holds a run
        output, seconds = run_process([str(word) for word in command], self.time_limit)
        if run.exists():
            *epochs, final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            times = [epoch["train_seconds"] for epoch in epochs]
            speed = statistics.fmean([epoch["images_per_second"] for epoch in epochs], weights=times)
            return {SPEED: speed, ACCURACY: final["test_accuracy"], "s training": sum(times), TIME: seconds}
        last = output.strip().rpartition("\n")[2]
        return {**(json.loads(last) if last.startswith("{") else {}), TIME: seconds}


def run_process(words: Sequence[str], time_limit: float) -> tuple[str, float]:
    """Run a command to its end; returns its standard output and its wall time in seconds.

    Raises:
        UserError: it failed or took longer than `time_limit` seconds; nothing of it runs on.
    """
    began = time.perf_counter()
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        output, errors = process.communicate(timeout=time_limit)
    except BaseException as error:
        # Children are found one by one, as the launcher starts each of several ranks in a session of its own; the
        # session ends those whose parent has gone.
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise UserError(f"{' '.join(words)} took more than {time_limit:g} s") from error
        raise
    if process.returncode:
        reason = (errors.strip() or output.strip() or "no output").splitlines()[-1]
        raise UserError(f"{' '.join(words)} failed with status {process.returncode}: {reason}")
    return output, time.perf_counter() - began


def _launch(precision: str, processes: int = 1) -> list[Any]:
    """`accelerate launch`, with everything given that the user's own configuration could change."""
    launch = [PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", 1]
    launch += ["--num_processes", processes, "--mixed_precision", "bf16" if precision == "bf16" else "no"]
    launch += ["--dynamo_backend", "no"]
    # Port 0: any that is free.
    return [*launch, "--multi_gpu", "--main_process_port", 0] if processes > 1 else launch


def compute_ratios(measurements: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What the medians say: `name` and `value` of each ratio whose parts were both measured.

    Times to the target are means, and compared only if the mean accuracies reached it.
    """
    median = {(row["part"], row["name"], row["unit"]): row["median"] for row in measurements}
    mean = {(row["part"], row["name"], row["unit"]): statistics.fmean(row["values"]) for row in measurements}
    ratios: list[dict[str, Any]] = []

    def compare(name: str, above: float | None, below: float | None) -> None:
        if above and below:
            ratios.append({"name": name, "value": above / below})

    for precision in PRECISIONS:
        speeds = {name: value for (part, name, _), value in median.items() if part == "training" and precision in name}
        ours, raw = (speeds.pop(f"{name}, {precision}", None) for name in ("this project", "raw PyTorch"))
        for name, speed in speeds.items():
            if "default launch" in name:
                compare(f"training: speed over {name}", ours, speed)
        best = max(speeds.values(), default=None)
        compare(f"training, {precision}: speed over the examples' loop, its best variant", ours, best)
        compare(f"training, {precision}: speed over raw PyTorch", ours, raw)
        rate = median.get(("kernels", f"matrix product, {precision}", f"FLOP/s, {precision}"))
        achieved = ours and ours * machine["operations_per_image"]
        compare(f"training, {precision}: fraction of the matrix-product rate", achieved, rate)
    example, fast = ("accuracy", "PyTorch's example"), ("accuracy", "recipe fast")
    if min(mean.get((*run, ACCURACY), 0.0) for run in (example, fast)) >= TARGET:
        name = f"command to {TARGET:.0%} on test images: time of PyTorch's example over recipe fast"
        compare(name, mean.get((*example, TIME)), mean.get((*fast, TIME)))
    for name, part, unit, above, below in (
        ("prediction: time of one by one over predict_dir.py", "prediction", TIME, "one by one", "predict_dir.py"),
        ("scaling: speed of 2 processes over 1", "scaling", SPEED, "2 processes", "1 process"),
        ("start: --help over the imports", "startup", TIME, "train.py --help", "import torch, accelerate"),
        ("start: one step over the imports", "startup", TIME, "train.py --max-steps 1", "import torch, accelerate"),
    ):
        compare(name, median.get((part, above, unit)), median.get((part, below, unit)))
    return ratios


def as_table(results: dict[str, Any]) -> str:
    """The results as text for a terminal: the machine, every measurement's median, lowest and highest, the ratios."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, device {machine['device']}; {machine['system']}, "
        f"Python {machine['python']}, torch {machine['torch']}, accelerate {machine['accelerate']}",
        f"\n{'part':10}  {'what':42}  {'median':>16}  {'lowest':>16}  {'highest':>16}",
    ]
    for row in results["measurements"]:
        numbers = (row["median"], min(row["values"]), max(row["values"]))
        cells = "  ".join(f"{as_text(value, row['unit']):>16}" for value in numbers)
        lines.append(f"{row['part']:10}  {row['name']:42}  {cells}")
    return "\n".join([*lines, "", *(f"{row['value']:8.2f}  {row['name']}" for row in results["ratios"])])


def as_text(value: float, unit: str) -> str:
    """A measured number with its unit."""
    if unit == ACCURACY:
        return f"{value:.2%}"
    if unit.startswith("FLOP/s"):
        return f"{value / 1e9:,.0f} GFLOP/s"
    return f"{value:,.0f} {unit}" if unit == SPEED else f"{value:.2f} {unit}"


def draw_benchmark(results: dict[str, Any], path: str | Path) -> None:
    """Draw training speeds, by precision, and times to the target accuracy, as far as they were measured.

    Bars are medians, lines the range from lowest to highest.

    Raises:
        UserError: `path` cannot be written.
    """
    import numpy as np

    from mnist_accel.figures import BLUE, GREY, VERMILION, render_figure, styled_figure

    colour = {"this project": BLUE, "recipe fast": BLUE, "raw PyTorch": GREY}
    panels = []
    for title, part, unit, ending in (
        *((f"Training, {name}: images a second", "training", SPEED, f", {name}") for name in PRECISIONS),
        (f"Seconds from command to {TARGET:.0%} on test images", "accuracy", TIME, ""),
    ):
        rows = [row for row in results["measurements"] if (row["part"], row["unit"]) == (part, unit)]
        if rows := [row for row in rows if row["name"].endswith(ending)]:
            panels.append((title, unit, ending, rows))
    heights = [len(rows) + 1.2 for *_, rows in panels]
    with styled_figure(8.4, 0.3 * sum(heights) + 0.6) as figure:
        all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, unit, ending, rows) in zip(all_axes, panels, strict=True):
            names = [row["name"].removesuffix(ending) for row in rows]
            colours = [colour.get(name, VERMILION) for name in names]
            numbers = np.array([(row["median"], min(row["values"]), max(row["values"])) for row in rows])
            medians, lowest, highest = numbers.T
            ranges = (medians - lowest, highest - medians)
            bars = axes.barh(names, medians, xerr=ranges, color=colours, height=0.7, error_kw={"elinewidth": 1})
            axes.bar_label(bars, [as_text(value, unit).removesuffix(f" {unit}") for value in medians], padding=4)
            axes.set(title=title, xlim=(0, 1.12 * highest.max()))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        machine = results["machine"]
        device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
        figure.supxlabel(f"{device}, {machine['threads']} threads, torch {machine['torch']}", size=9, color=GREY)
        render_figure(figure, path)
