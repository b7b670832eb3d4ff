"""A model as a file for other programs: TorchScript, ONNX, torch.export; checked before it is written."""

import importlib
import json
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from mnist_accel import __version__
from mnist_accel.cli import UserError
from mnist_accel.models import DigitClassifier
from mnist_accel.output import new_file

INPUT_DESCRIPTION = "float32 (N, 1, 28, 28) in 0..1, white ink on black, the ink's centre of mass centred as in MNIST"
CHECKED_BATCH_SIZES = (1, 7, 64)
TOLERANCE = 1e-4
OPSET = 18  # new enough for GroupNormalization, old enough for runtimes of 2023
EXAMPLE = (torch.zeros(2, 1, 28, 28),)  # two images: tracers take a batch of one for a constant
ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)

Runtime = Callable[[Tensor], Tensor]


def export_model(model: DigitClassifier, file_format: str, output: Path) -> float:
    """Write a model on the CPU, in eval mode, for batches of any size, checked in the runtime that users load it with.

    The file takes `images`, float32 (N, 1, 28, 28) in 0..1, and gives `logits`, float32 (N, C). The labels, the
    temperature and a description of the input lie in it as metadata: ONNX `metadata_props`, and the extra file
    `metadata.json` in the other two. `file_format` is a key of `FORMATS`; a .pt2 is for `torch.export.load`.

    Returns the largest difference of any logit between file and model, over batches of 1, 7 and 64 images. Raises a
    `UserError` where a package is missing, or that difference is 1e-4 or more: what was in `output` then stays.
    """
    convert, load = FORMATS[file_format]
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        # PyTorch advises against TorchScript at every call; who asks for it has a program that reads nothing else.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+. is deprecated")
        # Some of PyTorch's own layers check the size of what they get in Python, which a trace leaves out.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"torch\.nn\.")
        # Of PyTorch 2.11 itself: what its exporter calls is deprecated, and what `torch.export.load` reads is bytes.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        content = convert(model)
        difference = _largest_difference(model, load(content))
    if not difference < TOLERANCE:
        raise UserError(
            f"{output} was not written: its logits would differ from the model's by {difference:.2g}, and "
            f"{TOLERANCE:g} is too much; try another --format"
        )
    with new_file(output) as temporary:
        temporary.write_bytes(content)
    return difference


def _largest_difference(model: DigitClassifier, runtime: Runtime) -> float:
    """In any logit; nan if a file computes one, inf if it gives another shape."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(CHECKED_BATCH_SIZES), 1, 28, 28, generator=generator)
    images *= torch.rand(images.shape, generator=generator) < 0.5  # half the pixels black, as paper is
    pairs = [(model(images[:size]), runtime(images[:size])) for size in CHECKED_BATCH_SIZES]
    if any(logits.shape != expected.shape for expected, logits in pairs):
        return torch.inf
    return float(torch.cat([logits - expected for expected, logits in pairs]).abs().max())


def _metadata(model: DigitClassifier) -> dict[str, str]:
    """What a file says about itself; every value is text, lists are JSON."""
    return {
        "model": model.name,
        "labels": json.dumps(model.class_names),
        "temperature": str(model.temperature),
        "no_digit_level": str(model.no_digit_level),
        "input": INPUT_DESCRIPTION,
        "output": "float32 (N, classes) logits; with s = logits / temperature and q = sigmoid(2 * (no_digit_level - "
        "logsumexp(s))), confidences are (1 - q) * softmax(s) + q / classes",
        "producer": f"mnist_accel {__version__}",
    }


def _to_torchscript(model: DigitClassifier) -> bytes:
    file = BytesIO()
    traced = torch.jit.trace(model, EXAMPLE)
    torch.jit.save(traced, file, _extra_files={"metadata.json": json.dumps(_metadata(model))})
    return file.getvalue()


def _to_torch_export(model: DigitClassifier) -> bytes:
    file = BytesIO()
    program = torch.export.export(model, EXAMPLE, dynamic_shapes=ANY_BATCH)
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(_metadata(model))})
    return file.getvalue()


def _to_onnx(model: DigitClassifier) -> bytes:
    try:
        onnx, *_ = (importlib.import_module(package) for package in ("onnx", "onnxscript", "onnxruntime"))
    except ImportError as error:
        raise UserError(
            f"ONNX needs a package that cannot be imported ({error}): install it with `uv sync --extra export` "
            "or `pip install 'mnist-accel[export]'`"
        ) from error
    converted = torch.onnx.export(
        model,
        EXAMPLE,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=ANY_BATCH,
        verbose=False,
    )
    assert converted is not None
    proto = converted.model_proto
    proto.producer_name, proto.producer_version = "mnist_accel", __version__
    proto.doc_string = f"{model.name}: {INPUT_DESCRIPTION}"
    onnx.helper.set_model_props(proto, _metadata(model))
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def _load_onnx(content: bytes) -> Runtime:
    import onnxruntime

    # Left alone, onnxruntime pins a thread to each core of the machine, and complains where a container allows fewer.
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


# How each format is made, and read back.
FORMATS: dict[str, tuple[Callable[[DigitClassifier], bytes], Callable[[bytes], Runtime]]] = {
    "torchscript": (_to_torchscript, lambda content: torch.jit.load(BytesIO(content))),
    "onnx": (_to_onnx, _load_onnx),
    "torch-export": (_to_torch_export, lambda content: torch.export.load(BytesIO(content)).module()),
}
