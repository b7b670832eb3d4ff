"""scripts/show_samples.py: the table, the picture, and which images are chosen."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnist_accel.cli import UserError
from mnist_accel.data import load_data
from mnist_accel.evaluation import predict_logits
from mnist_accel.models import build_model, load_model, save_model

SCRIPT = Path(__file__).parent.parent / "scripts" / "show_samples.py"


@pytest.fixture
def show(monkeypatch, capsys, tmp_path):
    """A function that calls the script's main in an empty folder and returns the lines that it printed."""
    main = runpy.run_path(str(SCRIPT))["main"]
    torch.manual_seed(0)
    save_model(build_model("mnist_net"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["show_samples.py", "--model", "model", "--dataset", "digits", *arguments])
        main()
        return capsys.readouterr().out.splitlines()

    return run


def table(lines):
    return [line.split() for line in lines if line.split()[0].isdigit() and "%" in line]


def test_ten_images_are_shown_and_drawn_by_default(show):
    lines = show()
    assert len(table(lines)) == 10
    assert Image.open("random_samples_test.png").width > 800
    assert "random_samples_test.png" in lines[-1]


def test_the_table_tells_what_the_model_answers_and_what_is_wrong(show, tmp_path):
    data = load_data("digits")
    logits = predict_logits(load_model(tmp_path / "model"), data.test.images, torch.device("cpu"))
    lines = show("--num-samples", "40", "--seed", "1")
    rows = table(lines)
    for index, true, predicted, confidence, *mark in rows:
        assert int(true) == int(data.test.labels[int(index)])
        probabilities = logits[int(index)].softmax(dim=0)
        assert int(predicted) == int(probabilities.argmax())
        assert float(confidence.rstrip("%")) == pytest.approx(100 * float(probabilities.max()), abs=0.02)
        assert mark == ([] if true == predicted else ["wrong"])
    right = sum(len(row) == 4 for row in rows)
    assert 0 < right < 40
    assert f"{right} of 40 right" in lines


def test_a_seed_repeats_the_choice_and_without_one_it_differs(show):
    first, second = show("--seed", "5"), show("--seed", "5")
    assert first == second
    assert table(show("--seed", "6")) != table(first)
    assert table(show()) != table(show())


def test_output_names_the_picture_and_more_samples_make_it_larger(show):
    show("--output", "new/few.png", "--num_samples", "3")
    show("--output", "new/many.png", "--num_samples", "30")
    assert Image.open("new/many.png").height > Image.open("new/few.png").height


def test_no_more_images_than_there_are(show, small_dataset):
    assert len(table(show("--dataset", str(small_dataset), "--num-samples", "1000"))) == 53


@pytest.mark.parametrize("count", ["0", "1001", "ten"])
def test_an_impossible_number_of_samples_is_refused(show, count):
    with pytest.raises(UserError, match="--num-samples"):
        show("--num-samples", count)
