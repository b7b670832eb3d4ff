"""Measure this project against the loops that users would write instead, side by side in one run."""

import json
import signal
import sys
from dataclasses import fields
from pathlib import Path

from mnist_accel.benchmark import DRAWN, Benchmark, as_table, draw_benchmark
from mnist_accel.cli import CommandLine, UserError, counted, run_script


def main() -> None:
    parser = CommandLine(description=__doc__)
    for field in fields(Benchmark):
        if field.metadata:
            parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **field.metadata)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every number")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw training speeds and times to 99%%")
    options = vars(parser.parse_args())
    output, figure = options.pop("output"), options.pop("figure")
    if figure and not DRAWN & set(options["parts"]):
        raise UserError("--figure shows training and accuracy: measure at least one of these --parts")

    # So that the process that is being measured ends too, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Benchmark(scripts=Path(__file__).resolve().parent, **options).run()
    print("\n" + as_table(results))
    from mnist_accel.output import new_file, write_picture

    if output:
        with new_file(output) as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n")
    if figure and DRAWN & {row["part"] for row in results["measurements"]}:
        write_picture(draw_benchmark(results), figure)
    if results["failures"]:
        raise UserError(f"{counted(len(results['failures']), 'process')} failed: the reasons stand above the table")


if __name__ == "__main__":
    run_script(main)
