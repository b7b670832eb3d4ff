"""Measure a trained model, or several together as an ensemble, on one split of a data set."""

import json
from pathlib import Path

from mnist_accel.cli import DATASET_HELP, MODEL_HELP, CommandLine, has_all_the_work, run_script


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--model", nargs="+", help=f"one, or several that are averaged as an ensemble: {MODEL_HELP}")
    parser.add_argument("--dataset", help=DATASET_HELP)
    parser.add_argument("--split", default="test", choices=["test", "train"], help="the images to measure on")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every measure to this file")
    parser.add_argument("--mistakes", type=Path, metavar="FILE.png", help="draw the most confident mistakes")
    parser.add_argument("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix")
    options = parser.parse_args()
    if not has_all_the_work():
        return

    from accelerate import PartialState

    from mnist_accel.evaluation import evaluate, load_for_evaluation
    from mnist_accel.figures import draw_confusion_matrix, draw_mistakes
    from mnist_accel.models import count_parameters
    from mnist_accel.output import new_file, picture_format, write_picture

    for picture in filter(None, (options.mistakes, options.confusion)):
        picture_format(picture)
    device = PartialState().device
    models, data = load_for_evaluation(options.model, options.dataset)
    split = data.test if options.split == "test" else data.train
    described = []
    for name, model in models.items():
        size = count_parameters(model)
        described.append({"path": name, "name": model.name, "parameters": size, "temperature": model.temperature})
        print(f"model              {name} ({model.name}, {size:,} parameters, temperature {model.temperature:.3g})")
    if len(models) > 1:
        print(f"ensemble           the mean of the probabilities of these {len(models)}")
    print(f"data set           {data.source}, {options.split} split, {len(split.labels):,} images, on {device}")
    result = evaluate(list(models.values()), split, data.class_names, device)
    print(result.as_text())

    if options.output:
        measures = {"models": described, "dataset": options.dataset or data.source, "fingerprint": data.fingerprint}
        measures |= {"split": options.split, **result.as_json()}
        with new_file(options.output) as temporary:
            temporary.write_text(json.dumps(measures, indent=2) + "\n")
    if options.mistakes:
        mistakes = draw_mistakes(split.images, split.labels, result.probabilities, data.class_names)
        write_picture(mistakes, options.mistakes)
    if options.confusion:
        write_picture(draw_confusion_matrix(result.confusion, data.class_names), options.confusion)


if __name__ == "__main__":
    run_script(main)
