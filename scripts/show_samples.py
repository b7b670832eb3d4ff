"""Show what a model makes of random test images: a table on the terminal and a picture."""

from pathlib import Path

from mnist_accel.cli import MODEL_HELP, CommandLine, UserError, is_first_rank, run_script

MOST = 1000  # a picture of more is too large to look at


def main() -> int:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--dataset", default="ylecun/mnist", help="a Hub id, a local folder, or digits")
    parser.add_argument("--num-samples", type=int, default=10, help=f"images to draw, at most {MOST}")
    parser.add_argument("--seed", type=int, help="the same seed chooses the same images (default: others each time)")
    parser.add_argument("--output", type=Path, default=Path("random_samples_test.png"), help="the picture")
    options = parser.parse_args()
    if not 1 <= options.num_samples <= MOST:
        raise UserError(f"--num-samples {options.num_samples}: give 1 to {MOST}")

    import torch
    from accelerate import PartialState

    from mnist_accel.data import Split, load_data
    from mnist_accel.distributed import use_all_cores
    from mnist_accel.evaluation import evaluate, load_models
    from mnist_accel.figures import draw_samples
    from mnist_accel.predict import default_model

    use_all_cores()
    device = PartialState().device
    if not is_first_rank():
        return 0
    name = options.model or default_model()
    data = load_data(options.dataset)
    models = load_models([name], data.class_names)
    generator = torch.Generator()
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)
    chosen = torch.randperm(len(data.test.labels), generator=generator)[: options.num_samples]
    samples = Split(data.test.images[chosen], data.test.labels[chosen])
    result = evaluate(models, samples, data.class_names, device)

    print(f"model {name}, {data.source}, test split")
    width = max(9, *map(len, data.class_names))
    print(f"{'image':>6}  {'true':{width}}  {'predicted':{width}}  confidence")
    confidences, predictions = result.probabilities.max(dim=1)
    rows = zip(chosen.tolist(), samples.labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True)
    for index, label, prediction, confidence in rows:
        true, predicted = data.class_names[label], data.class_names[prediction]
        mark = "" if label == prediction else "  wrong"
        print(f"{index:6}  {true:{width}}  {predicted:{width}}  {confidence:10.2%}{mark}")
    print(f"{result.correct} of {result.total} right")
    draw_samples(samples.images, samples.labels, result.probabilities, data.class_names, options.output)
    print(f"drawn to {options.output}")
    return 0


if __name__ == "__main__":
    run_script(main)
