"""Exported files, read back in the runtimes that their users have."""

import json
import re
import runpy
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mnist_accel import export
from mnist_accel.cli import UserError
from mnist_accel.models import MODELS, DigitClassifier, build_model, save_model

SCRIPT = Path(__file__).parent.parent / "scripts" / "export.py"
ALL_FORMATS = list(export.FORMATS)


class OtherNet(DigitClassifier):
    """Layers that the networks may come to use: group, batch and layer normalisation, depthwise, global mean."""

    def __init__(self, num_classes, dropout):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.group = nn.GroupNorm(4, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.batch = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout2d(dropout)
        self.layer = nn.LayerNorm(8)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, images):
        x = F.silu(self.group(self.conv(self.normalise(images))))
        x = self.dropout(F.gelu(self.batch(self.depthwise(x))))
        return self.linear(self.layer(F.avg_pool2d(x, 2).mean((2, 3))))


@pytest.fixture(params=[*MODELS, "other_net"])
def model(request, monkeypatch):
    monkeypatch.setitem(MODELS, "other_net", OtherNet)
    torch.manual_seed(0)
    names = ["cat", "dog", "Vögel"] if request.param == "other_net" else [str(digit) for digit in range(10)]
    model = build_model(request.param, names)
    model.temperature = 1.5
    return model


def logits_of(file_format, path, images):
    """What a user's own program would do with the file."""
    if file_format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        runtime = torch.jit.load(path) if file_format == "torchscript" else torch.export.load(path).module()
        return runtime(images)


def metadata_of(file_format, path):
    if file_format == "onnx":
        import onnx

        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    extra = {"metadata.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if file_format == "torchscript":
            torch.jit.load(path, _extra_files=extra)
        else:
            torch.export.load(path, extra_files=extra)
    return json.loads(extra["metadata.json"])


@pytest.mark.parametrize("file_format", ALL_FORMATS)
def test_file_gives_the_models_logits_for_any_batch_size_and_describes_itself(model, file_format, tmp_path, capfd):
    path = tmp_path / "new" / f"model of {file_format}.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the exporters are noisy; a user should hear nothing
        assert export.export_model(model, file_format, path) < 1e-4
    assert capfd.readouterr() == ("", "")
    assert list(path.parent.iterdir()) == [path]  # a single file, nothing left over
    for batch_size in (1, 2, 33):
        images = torch.rand(batch_size, 1, 28, 28)
        with torch.no_grad():
            expected = model(images)
        torch.testing.assert_close(logits_of(file_format, path, images), expected, atol=1e-4, rtol=0)
    described = metadata_of(file_format, path)
    assert json.loads(described["labels"]) == model.class_names
    assert float(described["temperature"]) == 1.5
    assert "white ink on black" in described["input"]
    assert "mnist_accel" in described["producer"]


def test_onnx_names_its_input_output_and_batch_dimension(tmp_path):
    import onnx

    export.export_model(build_model("mnist_net"), "onnx", tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    (images,), (logits,) = proto.graph.input, proto.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    batch, *rest = images.type.tensor_type.shape.dim
    assert batch.dim_param == "batch"
    assert [dimension.dim_value for dimension in rest] == [1, 28, 28]
    assert logits.type.tensor_type.shape.dim[1].dim_value == 10
    assert proto.producer_name == "mnist_accel"


@pytest.mark.parametrize(
    "broken",
    [
        lambda logits: logits + 2e-4,
        lambda logits: logits - 2e-4,
        lambda logits: logits * torch.nan,
        lambda logits: logits[:, :5],
        lambda logits: torch.cat([logits[:1], logits[1:] + 1]),  # right for one image only
        lambda logits: torch.cat([logits[:10], logits[10:] + 1]),  # or for a few
        lambda logits: logits + (len(logits) == 1),  # or for several
    ],
)
def test_a_file_that_differs_is_not_written_and_the_old_one_stays(tmp_path, monkeypatch, broken):
    convert, load = export.FORMATS["torch-export"]

    def load_broken(path):
        runtime = load(path)
        return lambda images: broken(runtime(images))

    monkeypatch.setitem(export.FORMATS, "torch-export", (convert, load_broken))
    output = tmp_path / "model.pt2"
    output.write_text("the old file")
    with pytest.raises(UserError, match="not written"):
        export.export_model(build_model("mnist_net"), "torch-export", output)
    assert output.read_text() == "the old file"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra_that_installs_it(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*--extra export"):
        export.export_model(build_model("mnist_net"), "onnx", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for output in (tmp_path / "folder", tmp_path / "file" / "model.pt"):
        with pytest.raises(UserError, match="cannot write"):
            export.export_model(build_model("mnist_net"), "torchscript", output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.fixture
def run_export(monkeypatch, capsys, tmp_path):
    """A function that calls the script's main in an empty folder and returns what it printed."""
    main = runpy.run_path(str(SCRIPT))["main"]
    save_model(build_model("mnist_net"), tmp_path / "weights")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("file_format", "name"), [("torchscript", "model.pt"), ("onnx", "model.onnx"), ("torch-export", "model.pt2")]
)
def test_script_writes_a_file_with_the_formats_ending(run_export, file_format, name):
    printed = run_export("--model", "weights", "--format", file_format)
    assert name in printed
    assert "1, 7, 64" in printed
    assert logits_of(file_format, name, torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_of_several_processes_one_exports(run_export, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_export("--model", "weights", "--format", "torchscript") == ""
    assert not (tmp_path / "model.pt").exists()


def test_script_takes_the_model_as_an_option_and_an_output(run_export):
    run_export("--model", "weights", "--format", "torch-export", "--output", "other/digits.pt2")
    assert logits_of("torch-export", "other/digits.pt2", torch.zeros(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "weights"], "--format"),
        (["--format", "tflite"], "invalid choice"),
        (["--model", "missing", "--format", "torchscript"], "no model folder missing"),
        (["--format", "torch-export", "--output", "model.pt"], r"end in \.pt2"),
    ],
)
def test_script_names_the_users_mistake(run_export, arguments, message):
    with pytest.raises(UserError, match=message):
        run_export(*arguments)


def test_the_described_formula_gives_the_models_confidences(tmp_path):
    model = build_model("fast_net").eval()
    model.temperature, model.no_digit_level = 1.7, 0.4
    export.export_model(model, "torchscript", tmp_path / "model.pt")
    described = metadata_of("torchscript", tmp_path / "model.pt")
    formula = re.search(r"s = (.+) and q = (.+), confidences are (.+)", described["output"])
    logits = torch.randn(5, 10).double()
    known = {"logits": logits, "classes": 10, "sigmoid": torch.sigmoid}
    known |= {"temperature": float(described["temperature"]), "no_digit_level": float(described["no_digit_level"])}
    known |= {"logsumexp": partial(torch.logsumexp, dim=1, keepdim=True), "softmax": partial(torch.softmax, dim=1)}
    known["s"] = eval(formula[1], known)
    known["q"] = eval(formula[2], known)
    torch.testing.assert_close(eval(formula[3], known), model.probabilities(logits))
