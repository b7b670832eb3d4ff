"""Every command of the README does what a reader expects, on a tiny MNIST that a Hub on loopback serves.

A command is run as it stands, in processes forked from a warm one, or it stands in a list below with the reason why not;
what is listed is at least read by the parsers of its launcher and its script. A new command needs nothing here, unless
it cannot run.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from launching import ROOT, Job, train
from PIL import Image, ImageDraw
from pyarrow import parquet
from stand_in_hub import StandInHub, use_hub
from torch.distributed.run import get_args_parser as torchrun_parser

from mnist_accel import benchmark
from mnist_accel.config import TrainConfig
from mnist_accel.export import export_model
from mnist_accel.models import load_model

Variables = dict[str, str]
TEXT = (ROOT / "README.md").read_text()
SCRIPTS = {path.name for path in (ROOT / "scripts").glob("*.py")}

# Added to each run of a script, to keep it short.
SHORTENED = {"train.py": ["--max-steps", "3"]}
# Replaced in each command: the first of two machines, and a held-out part that suits the tests' small data set.
REPLACED = {"--machine_rank R ": "--machine_rank 0 ", "--validation-size 5000": "--validation-size 10"}

ENVIRONMENT = "it would change the environment that the tests run in"
NOT_RUN = {
    "uv sync": ENVIRONMENT,
    "uv sync --extra dev": ENVIRONMENT,
    "uv sync --extra export": ENVIRONMENT,
    "uv sync --extra heic": ENVIRONMENT,
    "pip install -e .": ENVIRONMENT,
    "pip install -e '.[export]'": ENVIRONMENT,
    "uv run --extra dev pytest": "this test is part of it",
    "accelerate config": "it asks questions",
    "nvidia-smi": "it needs a GPU",
    # Names of programs in the text, without anything to run.
    "uv run": "a name",
    "accelerate launch": "a name",
    "torchrun": "a name",
}
ONLY_PARSED = {
    "accelerate launch --dynamo_backend inductor scripts/train.py": "compiling takes a minute",
    "accelerate launch --multi_gpu --num_processes 4 scripts/train.py": "it needs four GPUs",
    "accelerate launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank R --main_process_ip 10.0.0.1 "
    "--main_process_port 29500 scripts/train.py --output-dir runs/two": "it needs two machines; see test_two_hosts.py",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "
    "10.0.0.1:29500 --max_restarts 3 scripts/train.py --output-dir runs/two --resume auto": "it needs two machines; see "
    "test_torchrun_restarts_what_fails",
    "python scripts/benchmark.py --parts training startup prediction --steps 200 --rounds 5 --figure benchmark.png": "it takes "
    "long; see test_benchmark.py",
    "python scripts/benchmark.py --parts accuracy scaling --steps 200": "it takes long; see test_benchmark.py",
}
PROGRAMS = "accelerate|hf|nvidia-smi|pip|python|tensorboard|torchrun|uv"
INSTALLER = "python -m pip install -q uv && "


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands of indented blocks and of code in sentences, each on one line, without comments and installers."""
    text = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    blocks = [block for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE) if "runs/<date-time>/" not in block]
    shown = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
    found = shown + [code for code in inline if re.match(rf"({PROGRAMS})( |$)", code)]
    found = [" ".join(re.sub(r" +# .*", "", line).replace(INSTALLER, "").split()) for line in found]
    return list(dict.fromkeys(line if "pytest" in line else line.removeprefix("uv run ") for line in found))


COMMANDS = commands()


# A place where a reader has trained once


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[StandInHub]:
    """A Hub with 60 training and 20 test images as `ylecun/mnist`."""
    folder = tmp_path_factory.mktemp("mnist")
    names = {"_type": "ClassLabel", "names": [str(digit) for digit in range(10)]}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    for split, count in (("train", 60), ("test", 20)):
        rows = []
        for number in range(count):
            file = folder / "image.png"
            Image.fromarray(np.roll(np.eye(28, dtype=np.uint8) * 255, number % 10, axis=1)).save(file)
            rows.append({"image": {"bytes": file.read_bytes(), "path": None}, "label": number % 10})
            file.unlink()
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema({"image": kind, "label": pa.int64()}, {"huggingface": json.dumps(features)})
        path = folder / "mnist" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    server = StandInHub(folder, pattern="ylecun/mnist")
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, hub) -> Path:
    """A folder with three runs, images, and MNIST's files in `mnist`."""
    place = tmp_path_factory.mktemp("place")
    for name, data in hub.dataset.items():
        (place / "mnist" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "mnist" / name).write_bytes(data)
    for name in ("7/a.png", "1/b.png", "photo.jpg"):
        path = place / "images" / name if "/" in name else place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (60, 80), 230)
        ImageDraw.Draw(picture).line([(15, 12), (45, 12), (25, 68)], fill=20, width=6)
        picture.save(path)
    start(place, hub, "train.py", ["--output-dir", "runs/NAME"])
    for name in "AB":
        shutil.copytree(place / "runs" / "NAME", place / "runs" / name)
    return place


def start(
    place: Path,
    hub: StandInHub,
    script: str,
    options: list[str],
    processes: int = 1,
    environment: Variables | None = None,
) -> Job:
    """Run one of the scripts in `place` to its end, with this Hub."""
    own = {"HF_HOME": str(place / "hf_home"), "HF_TOKEN": "hf_test", "HF_ENDPOINT": hub.endpoint}
    own |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    here = partial(use_hub, hub.endpoint, str(place / "hf_home" / "hub"))
    job = {"script": script, "place": place, "processes": processes, "fault": here}
    options = [*options, *SHORTENED.get(script, [])]
    return train(options, place / "logs", seconds=150, environment={**(environment or {}), **own}, **job)


# What a command is


def split(command: str) -> tuple[Variables, list[str]]:
    """The variables in front of a command, and its words."""
    for written, run in REPLACED.items():
        command = command.replace(written, run)
    words = shlex.split(command)
    variables = [word for word in words if re.fullmatch(r"[A-Z_]+=\S+", word)]
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


def parse(words: list[str]) -> tuple[str, list[str], int, Variables]:
    """What a launcher would start: the script, its options, the processes and what they see in their environment."""
    if words[:2] == ["accelerate", "launch"]:
        arguments = launch_command_parser().parse_args(words[2:])
        if arguments.config_file:
            arguments.config_file = str(ROOT / arguments.config_file)
        arguments, _, _ = _validate_launch_command(arguments)
        _, environment = prepare_simple_launcher_cmd_env(arguments)
        changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        processes = arguments.num_processes if arguments.multi_gpu else 1
        return arguments.training_script, arguments.training_script_args, processes, changed
    if words[0] == "torchrun":
        arguments = torchrun_parser().parse_args(words[1:])
        return arguments.training_script, arguments.training_script_args, int(arguments.nproc_per_node), {}
    assert words[0] == "python" and words[1].startswith("scripts/"), f"how to run {' '.join(words)}?"
    return words[1], words[2:], 1, {}


def test_the_lists_hold_commands_of_the_readme_only():
    assert set(NOT_RUN) | set(ONLY_PARSED) <= set(COMMANDS)
    assert len(COMMANDS) > 35, "commands are found at all"


@pytest.mark.timeout(300)  # the first one also makes the place; a run takes one to three seconds
@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in {*NOT_RUN, *ONLY_PARSED}])
def test_a_command_of_the_readme_runs(command, place, hub, monkeypatch):
    variables, words = split(command)
    if words[0] == "tensorboard":
        from tensorboard.plugins.core.core_plugin import CorePluginLoader
        from tensorboard.program import TensorBoard

        board = TensorBoard([CorePluginLoader()])
        board.configure(words)
        assert list((place / board.flags.logdir).glob("*/tensorboard/events.*"))
    elif words[:2] == ["hf", "download"]:
        download(words, place, hub, monkeypatch)
    elif words[:2] == ["python", "-c"]:
        exec(words[2], {})
    else:
        script, options, processes, environment = parse(words)
        assert script in {f"scripts/{name}" for name in SCRIPTS}
        job = start(place, hub, Path(script).name, options, processes, environment | variables)
        assert job.output()
        if "--output-dir" in options:
            assert (place / options[options.index("--output-dir") + 1] / "final" / "model.safetensors").is_file()
        for name in [word for word in options if word.endswith((".parquet", ".png"))]:
            assert (place / name).stat().st_size


def download(words: list[str], place: Path, hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.cli.hf import app

    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE"):
        monkeypatch.setattr(constants, name, getattr(constants, name))  # put back at the end
    use_hub(hub.endpoint, str(place / "hf_home" / "hub"))
    shutil.rmtree(place / "mnist", ignore_errors=True)
    monkeypatch.chdir(place)
    app(words[1:], standalone_mode=False)
    for name, data in hub.dataset.items():
        assert (place / "mnist" / name).read_bytes() == data


@pytest.mark.parametrize("command", ONLY_PARSED)
def test_a_command_that_cannot_run_here_is_understood(command, monkeypatch):
    script, options, _, _ = parse(split(command)[1])
    understood(script, options, monkeypatch)


def understood(script: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script up to the moment when it has checked its options."""

    def stop(*_: object, **__: object) -> None:
        raise SystemExit(99)

    monkeypatch.setattr(benchmark.Benchmark, "run", stop)
    monkeypatch.setattr("mnist_accel.trainer.Trainer.__init__", stop)
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 99


# What else the README shows


def test_the_slurm_script_is_a_shell_script_that_starts_the_training(tmp_path, monkeypatch):
    (script,) = fenced("bash")
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True, timeout=30)
    (inner,) = re.findall(r"srun bash -c '(.*?)'", script.replace("\\\n", " "))
    values = {"$SLURM_NNODES": "2", "$SLURM_NODEID": "1", "$MAIN": "node1"}
    words = [values.get(word, word) for word in shlex.split(inner)]
    understood(*parse(words)[:2], monkeypatch)


def test_the_python_of_the_readme_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    model = load_model(ROOT / "mnist_accel" / "pretrained")
    for file_format, ending in (("onnx", ".onnx"), ("torch-export", ".pt2")):
        export_model(model, file_format, Path("model" + ending))
    results = []
    for block in fenced("python"):  # each stands for itself
        names = {}
        exec(block, names)
        results.append(names)
    assert [tuple(names["logits"].shape) for names in results] == [(1, 10), (1, 10), (1, 10)]
    digit = results[1]["digit"]
    assert digit.shape == (28, 28) and digit.dtype == np.uint8 and digit.any()
    assert np.abs(results[2]["logits"].numpy() - results[1]["logits"].numpy()).max() < 1e-4
    assert json.loads(results[2]["facts"]["labels"]) == [str(label) for label in range(10)]


def test_every_option_that_the_readme_names_exists():
    text = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.py"))
    known = {"--" + name.replace("_", "-") for name in TrainConfig().options()} | {"--config", "--help"}
    known |= set(re.findall(r'"(--[a-z-]+)"', text))
    in_sentences = re.findall(r"`(--[a-z_-]+)[^`\n]*`", TEXT)
    assert len(in_sentences) > 15 and set(in_sentences) <= known | {"--num_processes", "--multi_gpu"}


def test_every_module_and_picture_that_the_readme_names_exists():
    modules = re.findall(r"`(\w+\.py)`", TEXT[TEXT.index("## How the code is laid out") :])
    folder = {path.name for path in (ROOT / "mnist_accel").glob("*.py")} - {"__init__.py"}
    assert set(modules) <= folder
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", TEXT)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)
