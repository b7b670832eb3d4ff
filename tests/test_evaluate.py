"""Measuring models on a split: the numbers, the ensemble, and what scripts/evaluate.py prints and writes."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mnist_accel import metrics
from mnist_accel.cli import UserError
from mnist_accel.data import Split
from mnist_accel.evaluation import Evaluation, evaluate, load_for_evaluation, predict_logits
from mnist_accel.models import build_model, save_model
from mnist_accel.summary import confusion_lines

SCRIPT = Path(__file__).parent.parent / "scripts" / "evaluate.py"
CPU = torch.device("cpu")
DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 28, 28), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (50,), generator=generator))


def make_model(seed, temperature=1.0, class_names=DIGITS):
    """An untrained network whose last layer is scaled up, so that its answers vary and are confident."""
    torch.manual_seed(seed)
    model = build_model("mnist_net", class_names).eval()
    with torch.no_grad():
        model.linear2.weight *= 30
    model.temperature = temperature
    return model


@pytest.fixture
def saved(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        save_model(make_model(seed, temperature=2.0), folder)
    return folders


@pytest.fixture
def run_evaluate(monkeypatch, capsys):
    """A function that calls the script's main with these arguments and returns what it printed."""
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


def test_logits_do_not_depend_on_the_batch_size_and_come_from_eval_mode(split):
    model = make_model(0)
    with torch.no_grad():
        expected = model(split.images.unsqueeze(1) / 255)
    model.train()
    for batch_size in (7, 50, 1000):
        logits = predict_logits(model, split.images, CPU, batch_size)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_evaluation_of_one_model_matches_its_logits(split):
    model = make_model(0, temperature=3.0)
    logits = predict_logits(model, split.images, CPU)
    result = evaluate([model], split, DIGITS, CPU)
    assert result.total == 50
    assert result.correct == int((logits.argmax(dim=1) == split.labels).sum())
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    calibrated = F.softmax(logits / 3, dim=1)
    torch.testing.assert_close(result.probabilities, calibrated, atol=1e-5, rtol=1e-4)
    assert result.calibration_error == pytest.approx(
        metrics.expected_calibration_error(calibrated, split.labels), abs=1e-4
    )
    assert result.as_json()["accuracy_interval_95"] == list(metrics.accuracy_interval(result.correct, 50))


def test_an_ensemble_averages_probabilities(split):
    first, second = make_model(0), make_model(1, temperature=2.0)
    mean = sum(F.softmax(predict_logits(m, split.images, CPU) / m.temperature, dim=1) for m in (first, second)) / 2
    result = evaluate([first, second], split, DIGITS, CPU)
    torch.testing.assert_close(result.probabilities, mean, atol=1e-5, rtol=1e-4)
    assert result.correct == int((mean.argmax(dim=1) == split.labels).sum())
    plain = sum(F.softmax(predict_logits(m, split.images, CPU).double(), dim=1) for m in (first, second)) / 2
    assert result.loss == pytest.approx(float(F.nll_loss(plain.log(), split.labels)), rel=1e-5)
    alone = [evaluate([model], split, DIGITS, CPU) for model in (first, second)]
    assert result.single_accuracies == result.as_json()["single_accuracies"] == [each.accuracy for each in alone]
    assert result.as_text().splitlines()[1].split()[-2:] == [f"{each.accuracy:.2%}" for each in alone]
    assert "alone" not in alone[0].as_text()


def test_the_same_model_twice_is_the_model(split):
    once, twice = evaluate([make_model(0)], split, DIGITS, CPU), evaluate([make_model(0)] * 2, split, DIGITS, CPU)
    assert torch.equal(once.confusion, twice.confusion)
    assert once.loss == pytest.approx(twice.loss)


def test_classes_of_a_model_that_lists_them_in_another_order_are_matched_by_name(split, tmp_path, capsys):
    """As where one was trained on a Hub data set and the other on a folder, whose classes are sorted."""
    first, second, turned = make_model(0), make_model(1), make_model(1)
    turned.class_names = DIGITS[::-1]
    with torch.no_grad():
        for parameter in turned.linear2.parameters():
            parameter.copy_(parameter.flip(0))
    result, expected = (evaluate([first, each], split, DIGITS, CPU) for each in (turned, second))
    torch.testing.assert_close(result.probabilities, expected.probabilities)
    assert result.single_accuracies == expected.single_accuracies and result.loss == pytest.approx(expected.loss)
    save_model(turned, tmp_path)
    load_for_evaluation([str(tmp_path)], "digits")
    assert capsys.readouterr().err == ""


def test_precision_and_recall_stand_under_their_names():
    confusion = torch.tensor([[3, 1], [0, 4]])
    result = Evaluation(["cat", "dog"], confusion, 0.1, 0.0, torch.zeros(8, 2), [0.875])
    assert result.as_json()["per_class"] == [
        {"class": "cat", "images": 4, "precision": 1.0, "recall": 0.75},
        {"class": "dog", "images": 4, "precision": pytest.approx(0.8), "recall": 1.0},
    ]
    assert "cat              4    100.00%   75.00%" in result.as_text()


def test_a_class_that_never_occurs_has_no_recall_in_json_and_a_dash_in_text():
    split = Split(torch.zeros(3, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    result = evaluate([make_model(0)], split, DIGITS, CPU)
    unseen = json.loads(json.dumps(result.as_json(), allow_nan=False))["per_class"][9]
    assert unseen["images"] == 0
    assert unseen["recall"] is None
    assert next(line for line in result.as_text().splitlines() if line.startswith("9 ")).split()[-1] == "-"


def test_a_model_of_another_number_of_classes_is_refused(tmp_path):
    save_model(make_model(0, class_names=["cat", "dog", "bird"]), tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} has 3 classes \(cat, dog, bird\)"):
        load_for_evaluation([str(tmp_path)], "digits")


def test_a_run_that_was_not_asked_for_is_named_where_it_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(make_model(0, class_names=["cat", "dog", "bird"]), tmp_path / "runs" / "mine" / "best")
    with pytest.raises(UserError, match="runs/mine/best, the newest run here, has 3 classes"):
        load_for_evaluation(None, "digits")
    assert list(load_for_evaluation(["shipped"], "digits")[0]) == ["shipped"]


def test_a_model_of_other_class_names_is_used_with_a_note(tmp_path, capsys):
    save_model(make_model(0, class_names=[f"class {digit}" for digit in DIGITS]), tmp_path)
    models, _ = load_for_evaluation([str(tmp_path)], "digits")
    assert list(models) == [str(tmp_path)]
    assert "10 classes (class 0, class 1, " in capsys.readouterr().err


def test_script_prints_and_writes_the_same_measures_for_an_ensemble(run_evaluate, saved, tmp_path):
    files = {name: tmp_path / "new" / name for name in ("measures.json", "mistakes.png", "confusion.png")}
    printed = run_evaluate(
        *("--model", *saved, "--dataset", "digits", "--output", files["measures.json"]),
        *("--mistakes", files["mistakes.png"], "--confusion", files["confusion.png"]),
    )
    measures = json.loads(files["measures.json"].read_text())
    assert [model["path"] for model in measures["models"]] == [str(folder) for folder in saved]
    assert measures["images"] == sum(map(sum, measures["confusion_matrix"])) > 300
    assert measures["correct"] == sum(row[index] for index, row in enumerate(measures["confusion_matrix"]))
    assert measures["accuracy"] == measures["correct"] / measures["images"]
    low, high = measures["accuracy_interval_95"]
    assert low < measures["accuracy"] < high
    assert f"{measures['accuracy']:.2%}" in printed
    assert f"{low:.2%} to {high:.2%}" in printed
    assert f"{measures['loss']:.4f}" in printed
    assert f"{measures['expected_calibration_error']:.2%}" in printed
    assert all(path.stat().st_size > 1000 for path in files.values())


def test_script_measures_the_newest_run_where_no_model_is_given(run_evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(make_model(0), Path("runs/today/best"))
    assert str(Path("runs/today/best")) in run_evaluate("--dataset", "digits")


def test_a_model_is_measured_on_its_own_data_set_where_none_is_given(tmp_path):
    save_model(make_model(0), tmp_path, dataset="digits")
    _, data = load_for_evaluation([str(tmp_path)], None)
    assert data.source.startswith("the embedded digits")


def test_script_measures_the_training_split_when_asked(run_evaluate, saved, tmp_path):
    output = tmp_path / "measures.json"
    run_evaluate("--model", saved[0], "--dataset", "digits", "--split", "train", "--output", output)
    measures = json.loads(output.read_text())
    assert measures["split"] == "train"
    assert measures["images"] > 1000


@pytest.mark.parametrize("launcher", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_only_the_first_of_several_processes_prints(run_evaluate, saved, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "1")
    assert run_evaluate("--model", saved[0], "--dataset", "digits") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing"], "no model folder missing"),
        (["--split", "validation"], "invalid choice"),
    ],
)
def test_users_mistakes_are_named(run_evaluate, arguments, message):
    with pytest.raises(UserError, match=message):
        run_evaluate("--dataset", "digits", *arguments)


def test_an_output_that_cannot_be_written_is_the_users_mistake(run_evaluate, saved, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        run_evaluate("--model", saved[0], "--dataset", "digits", "--output", tmp_path)


def test_long_class_names_are_cut_above_the_columns_only_where_they_stay_different():
    counts = np.array([[5, 1], [0, 7]])
    assert confusion_lines(counts, ["number_one", "digit"])[1].split() == ["number_", "digit"]
    header = confusion_lines(counts, ["number_one", "number_two"])[1]
    assert header.split() == ["number_one", "number_two"]
