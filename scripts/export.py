"""Write a trained model as TorchScript, ONNX or torch.export, and check the file against the model."""

from pathlib import Path

from mnist_accel.cli import MODEL_HELP, CommandLine, UserError, has_all_the_work, run_script

ENDINGS = {"torchscript": ".pt", "onnx": ".onnx", "torch-export": ".pt2"}


def main() -> None:
    parser = CommandLine(description=__doc__)
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument("--format", required=True, choices=list(ENDINGS), help="onnx needs the `export` extra")
    parser.add_argument("--output", type=Path, help="the file to write (default: model.pt, model.onnx or model.pt2)")
    options = parser.parse_args()
    if not has_all_the_work():
        return

    from mnist_accel.export import CHECKED_BATCH_SIZES, export_model
    from mnist_accel.models import load_model
    from mnist_accel.predict import default_model

    name = options.model or default_model()
    output = options.output or Path("model" + ENDINGS[options.format])
    if output.suffix != ENDINGS[options.format]:
        raise UserError(f"{output} is to be {options.format}: its name should end in {ENDINGS[options.format]}")
    model = load_model(name)
    difference = export_model(model, options.format, output)
    sizes = ", ".join(map(str, CHECKED_BATCH_SIZES))
    print(f"model    {name} ({model.name}, {len(model.class_names)} classes)")
    print(f"written  {output}, {output.stat().st_size:,} bytes")
    print(f"checked  with batches of {sizes} images: no logit differs by more than {difference:.2g}")


if __name__ == "__main__":
    run_script(main)
