"""Show what a model makes of random test images: a table on the terminal and a picture."""

from pathlib import Path
from random import Random

from mnist_accel.cli import COUNT, DATASET_HELP, MODEL_HELP, CommandLine, has_all_the_work, number, run_script

MOST = 1000  # a picture of more is too large to look at


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--dataset", help=DATASET_HELP)
    parser.add_argument("--num-samples", type=number(int, 1, MOST + 1), default=10, help=f"how many, at most {MOST}")
    parser.add_argument("--seed", type=COUNT, help="the same seed chooses the same images (default: others each time)")
    parser.add_argument("--output", type=Path, default=Path("random_samples_test.png"), help="the picture")
    options = parser.parse_args()
    if not has_all_the_work():
        return

    from accelerate import PartialState

    from mnist_accel.data import Split
    from mnist_accel.evaluation import evaluate, load_for_evaluation
    from mnist_accel.figures import draw_samples
    from mnist_accel.output import picture_format, write_picture

    picture_format(options.output)
    device = PartialState().device
    models, data = load_for_evaluation(options.model and [options.model], options.dataset)
    total, names = len(data.test.labels), data.class_names
    chosen = Random(options.seed).sample(range(total), min(options.num_samples, total))
    samples = Split(data.test.images[chosen], data.test.labels[chosen])
    result = evaluate(list(models.values()), samples, names, device)

    print(f"model {''.join(models)}, {data.source}, test split")
    width = max(9, *map(len, names))
    print(f"{'image':>6}  {'true':{width}}  {'predicted':{width}}  confidence")
    confidences, predictions = result.probabilities.max(dim=1)
    rows = zip(chosen, samples.labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    for index, label, prediction, confidence in rows:
        mark = "" if label == prediction else "  wrong"
        print(f"{index:6}  {names[label]:{width}}  {names[prediction]:{width}}  {confidence:10.2%}{mark}")
    print(f"{result.correct} of {result.total} right")
    write_picture(draw_samples(samples.images, samples.labels, result.probabilities, names), options.output)
    print(f"drawn to {options.output}")


if __name__ == "__main__":
    run_script(main)
