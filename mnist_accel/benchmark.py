"""Measures this project against the loops that users would write instead, side by side in one run.

Every measurement is a process of its own with a hard time limit, started as a user would start it. The processes of a
part take turns, several rounds of them, so that a machine that grows slower in between slows all of them alike.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import psutil

from mnist_accel.cli import COUNT, POSITIVE, UserError, counted, number
from mnist_accel.config import option

if TYPE_CHECKING:
    import numpy as np

SPEED, TIME, ACCURACY = "images/s", "s", "test accuracy"
PRECISIONS = ("fp32", "bf16")
# What each part keeps of its commands' numbers, by their units. `TIME` is wall time from start to end; other numbers
# are what a command prints as JSON in its last line, or, of train.py, what its metrics.jsonl says.
UNITS = {
    "training": [SPEED],
    "accuracy": [TIME, ACCURACY, "s training"],
    "prediction": [TIME],
    "scaling": [SPEED],
    "startup": [TIME],
}
PARTS = tuple(UNITS)
DRAWN = {"training", "accuracy"}  # the parts that `draw_benchmark` shows
PREPARATION = "preparation"  # the name of a command that is run and not measured
TARGET = 0.99
PYTHON = sys.executable

Command = list[Any]  # words, paths and numbers
Commands = Iterator[tuple[str, Command]]  # by the name that the table shows


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

    def run(self) -> dict[str, Any]:
        """Measure everything; returns what the JSON file holds.

        That is `machine`, `settings`, `measurements`, `ratios`, and `failures`: a line for each process that failed or
        took longer than the time limit. An hour's other measurements are not lost by it. Raises a `UserError` where
        there is no such data set, which all of them would trip over.
        """
        from mnist_accel.data import load_data

        load_data(self.dataset)
        values: dict[tuple[str, str, str], list[float]] = {}
        failures: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            self.machine = self._measure(_loop("machine"))
            for part in self.parts:
                commands = getattr(self, f"_{part}")
                rounds = range(self.seeds if part == "accuracy" else self.rounds)
                for name, command in chain.from_iterable(map(commands, rounds)):
                    try:
                        numbers = self._measure(command)
                    except UserError as error:
                        failures.append(f"{part}: {name}: {error}")
                        print(failures[-1], flush=True)
                        continue
                    if name == PREPARATION:
                        continue
                    found = {unit: numbers[unit] for unit in UNITS[part] if unit in numbers}
                    for unit, value in found.items():
                        values.setdefault((part, name, unit), []).append(value)
                    print(f"{part}: {name}: " + ", ".join(as_text(found[unit], unit) for unit in found), flush=True)
        measurements = [
            {"part": part, "name": name, "unit": unit, "median": median(found), "mean": fmean(found), "values": found}
            for (part, name, unit), found in values.items()
        ]
        return {
            "machine": self.machine,
            "settings": {name: getattr(self, name) for name in ("dataset", "rounds", "steps", "seeds", "images")},
            "measurements": measurements,
            "ratios": compute_ratios(measurements, self.machine),
            "failures": failures,
        }

    # The parts: each yields the commands of one round, counted from 0

    def _training(self, _: int) -> Commands:
        common = {"dataset": self.dataset, "steps": self.steps}
        for precision in self.precisions:
            launch = _launch(precision)
            yield f"this project, {precision}", [*launch, *self._train("--max-steps", self.steps)]
            yield f"raw PyTorch, {precision}", _loop("raw", bf16=precision == "bf16", **common)
            for workers in self.workers:
                name, loop = f"examples, {workers} workers", _loop("examples", workers=workers, **common)[1:]
                yield f"{name}, default launch, {precision}", [*launch, *loop]
                if self.machine["threads"] > 1:
                    threads = ["--num_cpu_threads_per_process", self.machine["threads"]]
                    yield f"{name}, all cores, {precision}", [*launch, *threads, *loop]

    def _accuracy(self, seed: int) -> Commands:
        bf16_is_faster = self.machine["FLOP/s, bf16"] > 1.2 * self.machine["FLOP/s, fp32"]
        launch = _launch("bf16" if bf16_is_faster else "fp32")
        yield "recipe fast", [*launch, *self._train("--recipe", "fast", "--seed", seed)]
        if seed < 3:  # it takes minutes
            yield "PyTorch's example", _loop("pytorch", dataset=self.dataset, target=TARGET, seed=seed)

    def _prediction(self, turn: int) -> Commands:
        both = {"folder": str(self.folder / "images"), "model": str(self.folder / "weights")}
        if turn == 0:
            yield PREPARATION, _loop("make_images", dataset=self.dataset, number=self.images, **both)
        options = [both["folder"], "--model", both["model"], "--output", self.folder / "predictions.csv"]
        yield "predict_dir.py", [PYTHON, self.scripts / "predict_dir.py", *options]
        yield "one by one", _loop("predict", **both)

    def _scaling(self, _: int) -> Commands:
        on_cpu = self.machine["device"] == "cpu"
        if self.machine["threads" if on_cpu else "devices"] < 2:
            return
        # A device each, on a CPU one core each. Without the variable, processes on a CPU would train each alone.
        environment = ["env", "ACCELERATE_USE_CPU=true"] if on_cpu else []
        train = ["--num_cpu_threads_per_process", 1, *self._train("--max-steps", self.steps)]
        yield "1 process", [*environment, *_launch("fp32"), *train]
        yield "2 processes", [*environment, *_launch("fp32", processes=2), *train]

    def _startup(self, _: int) -> Commands:
        yield "import torch, accelerate", [PYTHON, "-c", "import torch, accelerate"]
        yield "train.py --help", [PYTHON, self.scripts / "train.py", "--help"]
        yield "train.py --max-steps 1", [PYTHON, *self._train("--max-steps", 1)]

    # Processes

    def _train(self, *options: Any) -> Command:
        common = ["--dataset", self.dataset, "--report-to", "none", "--output-dir", self.folder / "run"]
        return [self.scripts / "train.py", *common, *options]

    def _measure(self, command: Command) -> dict[str, Any]:
        """The numbers of a command, under their units."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)  # a training does not start in a folder that holds a run
        output, seconds = run_process([str(word) for word in command], self.time_limit)
        if run.exists():
            *epochs, final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            times = [epoch["train_seconds"] for epoch in epochs]
            speed = fmean([epoch["images_per_second"] for epoch in epochs], weights=times)
            return {SPEED: speed, ACCURACY: final["test_accuracy"], "s training": sum(times), TIME: seconds}
        last = output.strip().rpartition("\n")[2]
        return {**(json.loads(last) if last.startswith("{") else {}), TIME: seconds}


def run_process(words: Sequence[str], time_limit: float) -> tuple[str, float]:
    """Run a command to its end; returns its standard output and its wall time in seconds.

    Raises a `UserError` where it failed or took longer than `time_limit` seconds; nothing of it runs on.
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


def _loop(name: str, **arguments: Any) -> Command:
    return [PYTHON, "-m", "mnist_accel.benchmark_loops", name, json.dumps(arguments)]


def _launch(precision: str, processes: int = 1) -> Command:
    """`accelerate launch`, with everything given that the user's own configuration could change."""
    launch = [PYTHON, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", 1]
    launch += ["--mixed_precision", "bf16" if precision == "bf16" else "no", "--dynamo_backend", "no"]
    several = ["--multi_gpu", "--main_process_port", 0] if processes > 1 else []  # port 0: any that is free
    return [*launch, "--num_processes", processes, *several]


def compute_ratios(measurements: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What the medians say: `name` and `value` of each ratio whose parts were both measured.

    Times to the target are means, and compared only if the mean accuracies reached it.
    """
    medians = {(row["part"], row["name"], row["unit"]): row["median"] for row in measurements}
    means = {(row["name"], row["unit"]): row["mean"] for row in measurements}
    pairs: dict[str, tuple[float | None, float | None]] = {}
    for precision in PRECISIONS:
        speeds = {name: value for (part, name, _), value in medians.items() if part == "training" and precision in name}
        ours, raw = (speeds.pop(f"{name}, {precision}", None) for name in ("this project", "raw PyTorch"))
        achieved = ours and ours * machine["operations_per_image"]
        rate = machine.get(f"FLOP/s, {precision}")
        pairs |= {f"training: speed over {name}": (ours, speed) for name, speed in speeds.items()}
        best = max(speeds.values(), default=None)
        pairs[f"training, {precision}: speed over the examples' loop, its best variant"] = ours, best
        pairs[f"training, {precision}: speed over raw PyTorch"] = ours, raw
        pairs[f"training, {precision}: fraction of the matrix-product rate"] = achieved, rate
    example, fast = "PyTorch's example", "recipe fast"
    if min(means.get((name, ACCURACY), 0.0) for name in (example, fast)) >= TARGET:
        name = f"command to {TARGET:.0%} on test images: time of PyTorch's example over recipe fast"
        pairs[name] = means.get((example, TIME)), means.get((fast, TIME))
    for name, part, above, below in (
        ("prediction: time of one by one over predict_dir.py", "prediction", "one by one", "predict_dir.py"),
        ("scaling: speed of 2 processes over 1", "scaling", "2 processes", "1 process"),
        ("start: --help over the imports", "startup", "train.py --help", "import torch, accelerate"),
        ("start: one step over the imports", "startup", "train.py --max-steps 1", "import torch, accelerate"),
    ):
        unit = UNITS[part][0]
        pairs[name] = medians.get((part, above, unit)), medians.get((part, below, unit))
    return [{"name": name, "value": above / below} for name, (above, below) in pairs.items() if above and below]


def as_table(results: dict[str, Any]) -> str:
    """The results as text for a terminal: the machine, every measurement's median, lowest and highest, the ratios."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {counted(machine['threads'], 'thread')}, device {machine['device']}; "
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}, "
        f"accelerate {machine['accelerate']}",
        f"\n{'part':10}  {'what':42}  {'median':>19}  {'lowest':>19}  {'highest':>19}",
    ]
    for row in results["measurements"]:
        numbers = (row["median"], min(row["values"]), max(row["values"]))
        cells = "  ".join(f"{as_text(value, row['unit']):>19}" for value in numbers)
        lines.append(f"{row['part']:10}  {row['name']:42}  {cells}")
    return "\n".join([*lines, "", *(f"{row['value']:8.2f}  {row['name']}" for row in results["ratios"])])


def as_text(value: float, unit: str) -> str:
    """A measured number with its unit."""
    if unit == ACCURACY:
        return f"{value:.2%}"
    return f"{value:,.0f} {unit}" if unit == SPEED else f"{value:.2f} {unit}"


def draw_benchmark(results: dict[str, Any]) -> "np.ndarray":
    """Training speeds, by precision, and times to the target accuracy, as far as they were measured.

    Bars are medians, lines the range from lowest to highest; the picture is RGB uint8 (H, W, 3).
    """
    import numpy as np

    from mnist_accel.figures import BLUE, GREY, VERMILION, pixels_of, styled_figure

    colour = {"this project": BLUE, "recipe fast": BLUE, "raw PyTorch": GREY}
    short = [row for row in results["measurements"] if row["unit"] == ACCURACY and row["mean"] < TARGET]
    missed = {row["name"]: f"{row['name']}, missed: {row['mean']:.2%}" for row in short}
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
            medians, lowest, highest = np.array([(r["median"], min(r["values"]), max(r["values"])) for r in rows]).T
            ranges = (medians - lowest, highest - medians)
            labels = [missed.get(name, name) for name in names]
            bars = axes.barh(labels, medians, xerr=ranges, color=colours, height=0.7, error_kw={"elinewidth": 1})
            axes.bar_label(bars, [as_text(value, unit).removesuffix(f" {unit}") for value in medians], padding=4)
            axes.set(title=title, xlim=(0, 1.12 * highest.max()))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        machine = results["machine"]
        device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
        threads = counted(machine["threads"], "thread")
        figure.supxlabel(f"{device}, {threads}, torch {machine['torch']}", size=9, color=GREY)
        return pixels_of(figure)
