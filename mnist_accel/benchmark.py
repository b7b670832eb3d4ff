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
        name: of its rows in the table.
        command: the program and its options.
        units: which of its numbers to keep. `TIME` is its wall time from start to end, the others are what it prints as
            JSON in its last line, or, of train.py, what its metrics.jsonl says.
        rounds: how often it is run.
        seeded: whether each run gets a `--seed` of its own.
        environment: more variables for it.
    """

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
        workers: DataLoader workers of the examples' loop, each number a variant of it.
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
    workers: Sequence[int] = (0, 2)
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
            machine = self._measure([sys.executable, *LOOPS, "machine"], Path(folder))
            for part in self.parts:
                cases = list(getattr(self, f"_{part}")(machine, Path(folder)))
                values: dict[tuple[str, str], list[float]] = {}
                for turn in range(max((case.rounds for case in cases), default=0)):
                    for case in (case for case in cases if turn < case.rounds):
                        command = [*case.command, *(["--seed", turn] if case.seeded else [])]
                        numbers = self._measure(command, Path(folder), case.environment)
                        for unit in case.units:
                            values.setdefault((case.name, unit), []).append(numbers[unit])
                        say(f"{part}: {case.name}: " + ", ".join(as_text(numbers[unit], unit) for unit in case.units))
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
            launch = _launch(precision)
            raw = [sys.executable, *LOOPS, "raw", *common, *(["--bf16"] if precision == "bf16" else [])]
            commands = {"this project": [*launch, *self._train("--max-steps", self.steps)], "raw PyTorch": raw}
            for workers in self.workers:
                loop = [*LOOPS, "examples", *common, "--workers", workers]
                commands[f"examples, {workers} workers, default launch"] = [*launch, *loop]
                if machine["threads"] > 1:
                    threads = ["--num_cpu_threads_per_process", machine["threads"]]
                    commands[f"examples, {workers} workers, all cores"] = [*launch, *threads, *loop]
            for name, command in commands.items():
                yield Case(f"{name}, {precision}", command, [SPEED], self.rounds)

    def _kernels(self, _machine: dict[str, Any], _: Path) -> Iterator[Case]:
        for precision in self.precisions:
            command = [sys.executable, *LOOPS, "machine"]
            yield Case(f"matrix product, {precision}", command, [f"FLOP/s, {precision}"], self.rounds)

    def _accuracy(self, machine: dict[str, Any], _: Path) -> Iterator[Case]:
        bf16_is_faster = machine["FLOP/s, bf16"] > 1.2 * machine["FLOP/s, fp32"]
        fast = [*_launch("bf16" if bf16_is_faster else "fp32"), *self._train("--recipe", "fast")]
        yield Case("recipe fast", fast, [TIME, ACCURACY, "s training"], self.seeds, seeded=True)
        example = [sys.executable, *LOOPS, "pytorch", "--dataset", self.dataset, "--target", TARGET]
        yield Case("PyTorch's example", example, [TIME, ACCURACY], min(3, self.seeds), seeded=True)

    def _prediction(self, _machine: dict[str, Any], folder: Path) -> Iterator[Case]:
        images, weights = folder / "images", folder / "weights"
        both = ["--folder", images, "--model", weights]
        self._measure([sys.executable, *LOOPS, "make_images", "--dataset", self.dataset, "--steps", self.images, *both])
        ours = [self.scripts / "predict_dir.py", images, "--model", weights, "--output", folder / "predictions.csv"]
        yield Case("predict_dir.py", [sys.executable, *ours], [TIME], self.rounds)
        yield Case("one by one", [sys.executable, *LOOPS, "predict", *both], [TIME], self.rounds)

    def _scaling(self, machine: dict[str, Any], _: Path) -> Iterator[Case]:
        on_cpu = machine["device"] == "cpu"
        if (machine["threads"] if on_cpu else machine["devices"]) < 2:
            return
        # A device each, on a CPU one core each. Without the variable, processes on a CPU would train each alone.
        environment = {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
        for name, launch in (("1 process", _launch("fp32")), ("2 processes", _launch("fp32", processes=2))):
            command = [*launch, "--num_cpu_threads_per_process", 1, *self._train("--max-steps", self.steps)]
            yield Case(name, command, [SPEED], self.rounds, environment=environment)

    def _startup(self, _machine: dict[str, Any], _: Path) -> Iterator[Case]:
        commands: dict[str, list[Any]] = {
            "import torch, accelerate": ["-c", "import torch, accelerate"],
            "train.py --help": [self.scripts / "train.py", "--help"],
            "train.py --max-steps 1": self._train("--max-steps", 1),
        }
        for name, command in commands.items():
            yield Case(name, [sys.executable, *command], [TIME], self.rounds)

    # Processes

    def _train(self, *options: Any) -> list[Any]:
        return [self.scripts / "train.py", "--dataset", self.dataset, "--report-to", "none", *options]

    def _measure(
        self, command: Sequence[Any], folder: Path | None = None, environment: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The numbers of a command; a training among them leaves its run in `folder`."""
        words = [str(word) for word in command]
        trains = str(self.scripts / "train.py") in words and "--help" not in words
        run = Path(tempfile.mkdtemp(dir=folder)) / "run"
        if trains:
            words += ["--output-dir", str(run)]
        output, seconds = run_process(words, self.time_limit, environment)
        if trains:
            *epochs, final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            numbers = {SPEED: epochs[-1]["images_per_second"], ACCURACY: final["test_accuracy"]}
            numbers["s training"] = sum(epoch["train_seconds"] for epoch in epochs)
        else:
            last = output.strip().splitlines()[-1:]
            numbers = json.loads(last[0]) if last and last[0].startswith("{") else {}
        return {**numbers, TIME: seconds}


def run_process(
    words: Sequence[str], time_limit: float, environment: dict[str, str] | None = None
) -> tuple[str, float]:
    """Run a command to its end; returns its standard output and its wall time in seconds.

    Raises:
        UserError: it failed or took longer than `time_limit` seconds; nothing of it runs on.
    """
    began = time.perf_counter()
    # A session of its own, so that a launcher's children are killed with it.
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=time_limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
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
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", 1]
    launch += ["--num_processes", processes, "--mixed_precision", "bf16" if precision == "bf16" else "no"]
    launch += ["--dynamo_backend", "no"]
    return [*launch, "--multi_gpu", "--main_process_port", _free_port()] if processes > 1 else launch


def compute_ratios(measurements: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[dict[str, Any]]:
    """What the medians say: `name` and `value` of each ratio whose parts were both measured.

    Times to the target are means, and compared only if the mean accuracies reached it.
    """
    median = {(row["part"], row["name"], row["unit"]): row["median"] for row in measurements}
    mean = {(row["part"], row["name"], row["unit"]): statistics.fmean(row["values"]) for row in measurements}
    pairs: list[tuple[str, float | None, float | None]] = []
    for precision in PRECISIONS:
        speeds = {name: value for (part, name, _), value in median.items() if part == "training" and precision in name}
        ours, examples = speeds.get(f"this project, {precision}"), "speed over the examples' loop"
        for name, speed in speeds.items():
            if "default launch" in name:
                pairs.append((f"training: speed over {name}", ours, speed))
        best = max((speed for name, speed in speeds.items() if name.startswith("examples")), default=None)
        pairs.append((f"training, {precision}: {examples}, its best variant", ours, best))
        raw = speeds.get(f"raw PyTorch, {precision}")
        pairs.append((f"training, {precision}: speed over raw PyTorch", ours, raw))
        rate = median.get(("kernels", f"matrix product, {precision}", f"FLOP/s, {precision}"))
        achieved = ours and ours * machine["operations_per_image"]
        pairs.append((f"training, {precision}: fraction of the matrix-product rate", achieved, rate))
    example, fast = (("accuracy", name) for name in ("PyTorch's example", "recipe fast"))
    if min(mean.get((*run, ACCURACY), 0.0) for run in (example, fast)) >= TARGET:
        name = f"command to {TARGET:.0%} on test images: time of PyTorch's example over recipe fast"
        pairs.append((name, mean.get((*example, TIME)), mean.get((*fast, TIME))))
    for name, part, unit, above, below in (
        ("prediction: time of one by one over predict_dir.py", "prediction", TIME, "one by one", "predict_dir.py"),
        ("scaling: speed of 2 processes over 1", "scaling", SPEED, "2 processes", "1 process"),
        ("start: --help over the imports", "startup", TIME, "train.py --help", "import torch, accelerate"),
        ("start: one step over the imports", "startup", TIME, "train.py --max-steps 1", "import torch, accelerate"),
    ):
        pairs.append((name, median.get((part, above, unit)), median.get((part, below, unit))))
    return [{"name": name, "value": above / below} for name, above, below in pairs if above and below]


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
    from mnist_accel.figures import BLUE, GREY, VERMILION, _figure, _render

    panels = []
    for unit, title, part, ending in (
        *((SPEED, f"Training, {precision}: images a second", "training", precision) for precision in PRECISIONS),
        (TIME, f"Seconds from command to {TARGET:.0%} on test images", "accuracy", ""),
    ):
        rows = [row for row in results["measurements"] if (row["part"], row["unit"]) == (part, unit)]
        rows = [row for row in rows if row["name"].endswith(ending)]
        if rows:
            panels.append((title, rows, f", {ending}", unit))
    assert panels, "neither training nor accuracy was measured"
    heights = [len(rows) + 1.2 for _, rows, _, _ in panels]
    with _figure(8.4, 0.3 * sum(heights) + 0.6) as figure:
        all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, rows, ending, unit) in zip(all_axes, panels, strict=True):
            names, medians = [row["name"].removesuffix(ending) for row in rows], [row["median"] for row in rows]
            colour = {"this project": BLUE, "recipe fast": BLUE, "raw PyTorch": GREY}
            axes.barh(names, medians, color=[colour.get(name, VERMILION) for name in names], height=0.7)
            ranges = [(min(row["values"]), max(row["values"])) for row in rows]
            axes.hlines(names, *zip(*ranges, strict=True), color="black", linewidth=1)
            for name, value, (_, highest) in zip(names, medians, ranges, strict=True):
                text = as_text(value, unit).removesuffix(f" {unit}")
                axes.annotate(text, (highest, name), xytext=(4, 0), textcoords="offset points", va="center")
            axes.set(title=title, xlim=(0, 1.12 * max(highest for _, highest in ranges)))
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        machine = results["machine"]
        device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
        figure.supxlabel(f"{device}, {machine['threads']} threads, torch {machine['torch']}", size=9, color=GREY)
        _render(figure, path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
