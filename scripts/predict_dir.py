"""Predict the digit in every image of a folder and its subfolders: photos, scans, drawings, of any size and colour."""

from pathlib import Path

from mnist_accel.cli import MODEL_HELP, POSITIVE, CommandLine, run_script


def main() -> int:
    parser = CommandLine(description=__doc__)
    parser.add_argument("folder", help="the folder of images")
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--output", default="predictions.csv", help=".csv, .jsonl or .parquet file; - is CSV on stdout")
    parser.add_argument("--probabilities", action="store_true", help="add a column for each class: p0, p1, ...")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw images, what the model saw, its answers")
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 if any file or folder could not be read"
    )
    parser.add_argument(
        "--labels",
        choices=["folder", "name"],
        help="where the true class stands: the parent folder's name, or the file name's first character; prints "
        "accuracy and a confusion matrix",
    )
    parser.add_argument(
        "--as-is", action="store_true", help="only make images grey and 28x28: they are light on dark, as for training"
    )
    parser.add_argument("--workers", type=POSITIVE, help="readers and threads (default: one of each a core)")
    options = vars(parser.parse_args())
    strict = options.pop("strict")

    from mnist_accel.predict import predict_folder

    return int(predict_folder(**options) > 0 and strict)


if __name__ == "__main__":
    run_script(main)
