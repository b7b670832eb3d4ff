"""Measure this project against the loops that users would write instead, side by side in one run."""

import json
import signal
import sys
from pathlib import Path

from mnist_accel.benchmark import PARTS, PRECISIONS, Benchmark, as_table, draw_benchmark
from mnist_accel.cli import CommandLine, UserError, run_script


def main() -> int:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--dataset", default="ylecun/mnist", help="a Hub id, a local folder, or digits")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="of the training speeds")
    parser.add_argument("--workers", default="0,2", help="DataLoader workers of the examples' loop, one variant each")
    parser.add_argument("--rounds", type=int, default=3, help="how often each command is run, in turn")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a training measurement")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of the recipe fast")
    parser.add_argument("--images", type=int, default=10_000, help="files to predict")
    parser.add_argument("--time-limit", type=float, default=3600, help="seconds after which a process is killed")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every number")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw training speeds and times to 99%%")
    options = parser.parse_args()
    for name in ("rounds", "steps", "seeds", "images"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give at least 1")
    parts = _chosen("--parts", options.parts, PARTS)
    precisions = _chosen("--precisions", options.precisions, PRECISIONS)
    try:
        workers = [int(number) for number in options.workers.split(",")]
    except ValueError as error:
        raise UserError(f"--workers {options.workers}: give numbers, such as 0,2") from error
    if options.figure and not {"training", "accuracy"} & set(parts):
        raise UserError("--figure shows training and accuracy: measure at least one of these --parts")

    scripts = Path(__file__).resolve().parent
    benchmark = Benchmark(
        scripts=scripts, dataset=options.dataset, parts=parts, precisions=precisions, workers=workers,
        rounds=options.rounds, steps=options.steps, seeds=options.seeds, images=options.images,
        time_limit=options.time_limit,
    )  # fmt: skip
    # So that the process that is being measured ends too, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = benchmark.run(say=lambda line: print(line, flush=True))
    print("\n" + as_table(results))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    if options.figure:
        draw_benchmark(results, options.figure)
    return 0


def _chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name!r} is unknown: choose from {','.join(known)}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    run_script(main)
