"""Measures this project against the loops that users would write instead, side by side in one run.

Every measurement is a process of its own with a hard time limit, started as a user would start it. The processes of a
part take turns, several rounds of them, so that a machine that grows slower in between slows all of them alike.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnist_accel.cli import UserError

PARTS = ("training", "kernels", "accuracy", "prediction", "scaling", "startup")
PRECISIONS = ("fp32", "bf16")
TARGET = 0.99
SPEED, TIME, ACCURACY = "images/s", "s", "test accuracy"
LOOPS = ["-m", "mnist_accel.benchmark_loops"]


@dataclass(frozen=True)
class Case:
    """A command to measure.

    Attributes:
        part, name: where it stands in the table.
        command: the program and its options.
        units: which of its numbers to keep: `TIME` is its wall time from start to end, the others are what it prints as
            JSON in its last line, or, of train.py, what its metrics.jsonl says.
        rounds: how often it is run.
        seeded: whether each run gets a `--seed` of its own.
        environment: more variables for it.
    """

    part: str
    name: str
    command: Sequence[Any]
    units: Sequence[str]
    rounds: int
    seeded: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """What to measure and how often.

    Attributes:
        scripts: the folder of train.py and predict_dir.py.
        dataset: as for train.py.
        parts, precisions: which of `PARTS` and `PRECISIONS`.
        rounds: how often each command is run.
        steps: optimizer steps of a training measurement, at batch 64.
        seeds: trainings to `TARGET`, each with a seed of its own; of the slow reference at most three.
        images: PNG files to predict.
        time_limit: seconds after which a process is killed and the benchmark ends.
    """

    scripts: Path
    dataset: str = "ylecun/mnist"
    parts: Sequence[str] = PARTS
    precisions: Sequence[str] = PRECISIONS
    rounds: int = 3
    steps: int = 300
    seeds: int = 5
    images: int = 10_000
    time_limit: float = 3600

    def run(self, say: Callable[[str], None] = print) -> dict[str, Any]:
        """Measure everything; returns `machine`, `settings`, `measurements` and `ratios`, as the JSON file holds them.

        Raises:
            UserError: a process failed or took longer than the time limit.
        """
        measurements = []
        with tempfile.TemporaryDirectory() as folder:
            machine, _ = self._execute([sys.executable, *LOOPS, "machine"], Path(folder))
            for part in self.parts:
                cases = list(getattr(self, f"_{part}")(machine, Path(folder)))
                values: dict[tuple[str, str], list[float]] = {}
                for turn in range(max((case.rounds for case in cases), default=0)):
                    for case in (case for case in cases if turn < case.rounds):
                        command = [*case.command, *(["--seed", turn] if case.seeded else [])]
                        numbers, seconds = self._execute(command, Path(folder), case.environment)
                        numbers[TIME] = seconds
                        for unit in case.units:
                            values.setdefault((case.name, unit), []).append(numbers[unit])
                        say(f"{part}: {case.name}: " + ", ".join(_text(numbers[unit], unit) for unit in case.units))
                measurements += [
                    {"part": part, "name": name, "unit": unit, "median": statistics.median(found), "values": found}
                    for (name, unit), found in values.items()
                ]
        settings = {name: getattr(self, name) for name in ("dataset", "rounds", "steps", "seeds", "images")}
        ratios = compute_ratios(measurements, machine)
        return {"machine": machine, "settings": settings, "measurements": measurements, "ratios": ratios}

    # The parts: each yields the commands that take turns

    def _training(self, machine: dict[str, Any], _: Path) -> Iterator[Case]:
        common = ["--dataset", self.dataset, "--steps", self.steps]
        for precision in self.precisions:
            launch = self._launch(precision)

            def case(name: str, command: Sequence[Any], precision: str = precision) -> Case:
                return Case("training", f"{name}, {precision}", command, (SPEED,), self.rounds)

            yield case("this project", [*launch, *self._train("--max-steps", self.steps)])
            raw = [sys.executable, *LOOPS, "raw", *common, *(["--bf16"] if precision == "bf16" else [])]
            yield case("raw PyTorch", raw)
            for workers in (0, 2):
                loop = [*LOOPS, "examples", *common, "--workers", workers]
                yield case(f"examples, {workers} workers, default launch", [*launch, *loop])
                if machine["threads"] > 1:
                    threads = ["--num_cpu_threads_per_process", machine["threads"]]
                    yield case(f"examples, {workers} workers, all cores", [*launch, *threads, *loop])

    def _kernels(self, _machine: dict[str, Any], _: Path) -> Iterator[Case]:
        units = [f"FLOP/s, {precision}" for precision in self.precisions]
        yield Case("kernels", "matrix product", [sys.executable, *LOOPS, "machine"], units, self.rounds)

    def _accuracy(self, machine: dict[str, Any], _: Path) -> Iterator[Case]:
        bf16_is_faster = machine["FLOP/s, bf16"] > 1.2 * machine["FLOP/s, fp32"]
        fast = [*self._launch("bf16" if bf16_is_faster else "fp32"), *self._train("--recipe", "fast")]
        yield Case("accuracy", "recipe fast", fast, (TIME, ACCURACY, "s training"), self.seeds, seeded=True)
        example = [sys.executable, *LOOPS, "pytorch", "--dataset", self.dataset, "--target", TARGET]
        yield Case("accuracy", "PyTorch's example", example, (TIME, ACCURACY), min(3, self.seeds), seeded=True)

    def _prediction(self, _machine: dict[str, Any], folder: Path) -> Iterator[Case]:
        images, weights = folder / "images", folder / "weights"
        both = ["--folder", images, "--model", weights]
        self._execute([sys.executable, *LOOPS, "make_images", "--dataset", self.dataset, "--steps", self.images, *both])
        ours = [self.scripts / "predict_dir.py", images, "--model", weights, "--output", folder / "predictions.csv"]
        yield Case("prediction", "predict_dir.py", [sys.executable, *ours], (TIME,), self.rounds)
        yield Case("prediction", "one by one", [sys.executable, *LOOPS, "predict", *both], (TIME,), self.rounds)

    def _scaling(self, machine: dict[str, Any], _: Path) -> Iterator[Case]:
        on_cpu = machine["device"] == "cpu"
        if (machine["threads"] if on_cpu else machine["devices"]) < 2:
            return
        # Each process gets one device, on a CPU one core. Without the variable, processes on a CPU would each train alone.
        environment = {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
        for processes in (1, 2):
            launch = [*self._launch("fp32", processes), "--num_cpu_threads_per_process", 1]
            command = [*launch, *self._train("--max-steps", self.steps)]
            name = f"{processes} process{'es' if processes > 1 else ''}"
            yield Case("scaling", name, command, (SPEED,), self.rounds, environment=environment)

    def _startup(self, _machine: dict[str, Any], _: Path) -> Iterator[Case]:
        imports = [sys.executable, "-c", "import torch, accelerate"]
        for name, command in (
            ("import torch, accelerate", imports),
            ("train.py --help", [sys.executable, self.scripts / "train.py", "--help"]),
            ("train.py --max-steps 1", [sys.executable, *self._train("--max-steps", 1)]),
        ):
            yield Case("startup", name, command, (TIME,), self.rounds)

    # Processes

    def _launch(self, precision: str, processes: int = 1) -> list[Any]:
        """`accelerate launch` with everything that the user's own configuration could change."""
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", 1]
        launch += ["--num_processes", processes, "--mixed_precision", "bf16" if precision == "bf16" else "no"]
        launch += ["--dynamo_backend", "no"]
        return [*launch, "--multi_gpu", "--main_process_port", _free_port()] if processes > 1 else launch

    def _train(self, *options: Any) -> list[Any]:
        return [self.scripts / "train.py", "--dataset", self.dataset, "--report-to", "none", *options]

    def _execute(
        self, command: Sequence[Any], folder: Path | None = None, environment: dict[str, str] | None = None
    ) -> tuple[dict[str, Any], float]:
        """Run a command to its end; returns its numbers and its wall time in seconds.

        Raises:
            UserError: it failed or took too long.
        """
        words = [str(word) for word in command]
        run = Path(tempfile.mkdtemp(dir=folder)) if str(self.scripts / "train.py") in words else None
        if run and "--help" not in words:
            words += ["--output-dir", str(run)]
        began = time.perf_counter()
        # A session of its own, so that a launcher's children are killed with it.
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            output, errors = process.communicate(timeout=self.time_limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise UserError(f"{' '.join(words)} took more than {self.time_limit:g} s") from error
            raise
        seconds = time.perf_counter() - began
        if process.returncode:
            reason = (errors.strip() or output.strip() or "no output").splitlines()[-1]
            raise UserError(f"{' '.join(words)} failed with status {process.returncode}: {reason}")
        if run and (run / "metrics.jsonl").exists():
            *epochs, final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            training = sum(epoch["train_seconds"] for epoch in epochs)
            return {SPEED: epochs[-1]["images_per_second"], "s training": training} | {
                ACCURACY: final["test_accuracy"]
            }, seconds
        last = output.strip().splitlines()[-1:]
        return (json.loads(last[0]) if last and last[0].startswith("{") else {}), seconds


def compute_ratios(measurements: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What the medians say: `name` and `value` of each ratio whose parts were measured; above 1 is in our favour.

    Times to the target accuracy are compared only if both reached it on average.
    """
    medians = {(row["part"], row["name"], row["unit"]): row["median"] for row in measurements}
    means = {(row["part"], row["name"], row["unit"]): statistics.fmean(row["values"]) for row in measurements}
    ratios: list[dict[str, Any]] = []

    def add(name: str, numerator: float | None, denominator: float | None) -> None:
        if numerator is not None and denominator is not None:
            ratios.append({"name": name, "value": numerator / denominator})

    for precision in PRECISIONS:
        speeds = {name: median for (part, name, _), median in medians.items() if part == "training"}
        ours = speeds.get(f"this project, {precision}")
        examples = {name: s for name, s in speeds.items() if name.startswith("examples") and name.endswith(precision)}
        for workers in (0, 2):
            default = examples.get(f"examples, {workers} workers, default launch, {precision}")
            add(
                f"training, {precision}: speed over the examples' loop, {workers} workers, default launch",
                ours,
                default,
            )
        add(
            f"training, {precision}: speed over the examples' loop, its best variant",
            ours,
            max(examples.values(), default=None),
        )
        add(f"training, {precision}: speed over raw PyTorch", ours, speeds.get(f"raw PyTorch, {precision}"))
        rate = medians.get(("kernels", "matrix product", f"FLOP/s, {precision}"))
        achieved = ours * machine["operations_per_image"] if ours else None
        add(f"training, {precision}: fraction of the matrix-product rate", achieved, rate)
    fast, example = "recipe fast", "PyTorch's example"
    if all(means.get(("accuracy", name, ACCURACY), 0.0) >= TARGET for name in (fast, example)):
        seconds = [means.get(("accuracy", name, TIME)) for name in (example, fast)]
        add(f"time from command to {TARGET:.0%}: PyTorch's example over recipe fast", *seconds)

    def add_times(name: str, part: str, slow: str, quick: str, unit: str = TIME) -> None:
        add(name, medians.get((part, slow, unit)), medians.get((part, quick, unit)))

    add_times("prediction: time of one by one over predict_dir.py", "prediction", "one by one", "predict_dir.py")
    add_times("scaling: speed of 2 processes over 1", "scaling", "2 processes", "1 process", SPEED)
    imports = "import torch, accelerate"
    add_times("start: time of train.py --help over the imports", "startup", "train.py --help", imports)
    add_times("start: time of one training step over the imports", "startup", "train.py --max-steps 1", imports)
    return ratios


def as_table(results: dict[str, Any]) -> str:
    """The results as text for a terminal: the machine, every measurement's median, lowest and highest, the ratios."""
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, device {machine['device']}; Python {machine['python']}, "
        f"torch {machine['torch']}, accelerate {machine['accelerate']}, {machine['system']}",
        "",
        f"{'part':10}  {'what':50}  {'median':>10}  {'lowest':>10}  {'highest':>10}  unit",
    ]
    for row in results["measurements"]:
        numbers = "  ".join(
            f"{_number(value, row['unit']):>10}" for value in (row["median"], min(row["values"]), max(row["values"]))
        )
        lines.append(f"{row['part']:10}  {row['name']:50}  {numbers}  {_unit(row['unit'])}")
    lines += ["", *(f"{row['value']:8.2f}  {row['name']}" for row in results["ratios"])]
    return "\n".join(lines)


def _number(value: float, unit: str) -> str:
    if unit == ACCURACY:
        return f"{value:.2%}"
    if unit.startswith("FLOP/s"):
        return f"{value / 1e9:,.0f}"
    return f"{value:,.0f}" if unit == SPEED else f"{value:.2f}"


def _unit(unit: str) -> str:
    return f"G{unit}" if unit.startswith("FLOP/s") else unit


def _text(value: float, unit: str) -> str:
    return f"{_number(value, unit)} {_unit(unit)}"


def draw_benchmark(results: dict[str, Any], path: str | Path) -> None:
    """Draw the training speeds, by precision, and the times to the target accuracy, as far as they were measured.

    Raises:
        UserError: `path` cannot be written, or neither was measured.
    """
    from mnist_accel.figures import BLUE, GREY, VERMILION, _figure, _render

    panels = []
    for precision in PRECISIONS:
        rows = [row for row in results["measurements"] if row["part"] == "training" and row["name"].endswith(precision)]
        panels.append((f"Training, {precision}: images a second", rows, SPEED))
    rows = [row for row in results["measurements"] if row["part"] == "accuracy" and row["unit"] == TIME]
    panels.append((f"Seconds from command to {TARGET:.0%} on test images", rows, TIME))
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise UserError("--figure shows training and accuracy: measure at least one of these --parts")
    heights = [len(rows) + 1.2 for _, rows, _ in panels]
    with _figure(8.4, 0.32 * sum(heights) + 0.6) as figure:
        all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, rows, unit) in zip(all_axes, panels, strict=True):
            ours = [row["name"].startswith(("this project", "recipe")) for row in rows]
            raw = [row["name"].startswith("raw") for row in rows]
            colours = [BLUE if own else GREY if plain else VERMILION for own, plain in zip(ours, raw, strict=True)]
            names = [row["name"].removesuffix(", fp32").removesuffix(", bf16") for row in rows]
            bars = axes.barh(names, [row["median"] for row in rows], color=colours, height=0.7)
            axes.bar_label(bars, [_number(row["median"], unit) for row in rows], padding=4)
            low = [row["median"] - min(row["values"]) for row in rows]
            high = [max(row["values"]) - row["median"] for row in rows]
            axes.errorbar([row["median"] for row in rows], names, xerr=[low, high], fmt="none", ecolor="black", lw=1)
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.set(title=title)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        machine = results["machine"]
        name = machine["processor"] if machine["device"] == "cpu" else machine["device"]
        figure.supxlabel(f"{name}, {machine['threads']} threads, torch {machine['torch']}", size=9, color=GREY)
        _render(figure, path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
