import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mnist_accel.cli import UserError
from mnist_accel.config import FREE_ON_RESUME, TrainConfig, differing_options, parse_config


def test_the_defaults_are_the_original_workflow():
    config = parse_config([])
    assert (config.epochs, config.batch_size, config.optimizer, config.learning_rate) == (10, 64, "adam", 0.001)
    assert (config.dataset, config.model, config.dropout, config.validation_size) == (
        "ylecun/mnist",
        "mnist_net",
        0.5,
        0,
    )


def test_a_name_that_no_file_can_record_is_refused():
    with pytest.raises(UserError, match=r"--output-dir 'runs/\\udcff' is not in UTF-8"):
        parse_config(["--output-dir", "runs/\udcff"])


@pytest.mark.parametrize(("given", "hint"), [
    (["--mixed_precision", "bf16"], "stands before the script: accelerate launch --mixed_precision ..."),
    (["--num-processes=2"], "stands before the script: accelerate launch --num_processes ..."),
    (["--learning_rat", "0.1"], "did you mean --learning-rate?"),
    (["--lr", "0.1"], "did you mean --learning-rate?"),
    (["--out", "runs/a"], "did you mean --output-dir?"),
    (["--colour", "red"], "; see "),
    (["--device", "cpu"], "; see "),
])  # fmt: skip
def test_an_option_that_is_not_there_is_told_with_the_way_on(given, hint):
    with pytest.raises(UserError, match="unrecognized arguments: ") as error:
        parse_config(given)
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bad name/x", "a..b/x", "me/-x", "me/x.", "me/a--b", "me/x.git", "x", "a/b/c"])
def test_a_repository_that_the_hub_would_refuse_is_refused_before_training(name):
    with pytest.raises(UserError, match="is not of the form USER/NAME"):
        parse_config(["--push-to-hub", name])


def test_a_repository_that_the_hub_takes_is_taken():
    for name in ("me/mnist-net_1.0", "a/b", "_me/x_"):
        assert parse_config(["--push-to-hub", name]).push_to_hub == name


def test_more_pictures_of_no_digit_than_memory_holds_are_refused():
    with pytest.raises(UserError, match=r"--non-digits: '1000000000': give a whole number of at least 0 and less than"):
        parse_config(["--non-digits", "1000000000"])


def test_a_path_given_from_python_is_recorded_as_text():
    config = TrainConfig(dataset=Path("mnist"), output_dir=Path("runs/a"))
    assert config == TrainConfig(dataset="mnist", output_dir="runs/a")
    assert json.dumps(config.options())


def test_a_file_that_is_not_there_is_told_once():
    with pytest.raises(UserError, match=r"^--config nowhere\.yaml: No such file or directory; give a file"):
        parse_config(["--config", "nowhere.yaml"])


def test_hyphens_and_underscores_are_the_same():
    assert parse_config(["--batch_size", "32"]) == parse_config(["--batch-size=32"])


def test_a_file_beats_defaults_and_the_command_line_beats_the_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("batch-size: 128\nlearning_rate: 1e-2\naugment: true\nema_decay: off\n")
    config = parse_config(["--config", str(file), "--batch-size", "256"])
    assert (config.batch_size, config.learning_rate, config.augment, config.ema_decay) == (256, 0.01, True, None)
    assert parse_config(["--config", str(file), "--no-augment"]).augment is False


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "options.yaml").write_text("# nothing yet\n")
    assert parse_config(["--config", str(tmp_path / "options.yaml")]) == TrainConfig()


def test_the_config_that_a_run_leaves_repeats_it(tmp_path):
    config = parse_config(["--max-steps", "7", "--resume", "auto", "--checkpoint-every", "5", "--augment"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.options() | {"provenance": {"world_size": 2}}))
    assert parse_config(["--config", str(file)]) == config


def test_a_recipe_beside_a_runs_record_is_refused_as_it_would_change_nothing_but_the_name(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(TrainConfig().options() | {"provenance": {"world_size": 1}}))
    with pytest.raises(UserError, match="--recipe would change none"):
        parse_config(["--config", str(file), "--recipe", "accurate"])
    file.write_text("recipe: fast\nepochs: 3\n")  # of a file that names some options, a recipe changes the others
    config = parse_config(["--config", str(file), "--recipe=accurate"])
    assert (config.recipe, config.model, config.epochs) == ("accurate", "deep_net", 3)


def test_a_recipes_augmentation_can_be_turned_off():
    assert parse_config(["--recipe", "accurate", "--no-augment"]).augmentation == "elastic"


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--no-such-option", "1"], "--no-such-option"),
        (["--model", "resnet"], "mnist_net"),
        (["--optimizer", "lion"], "adam"),
        (["--early-stopping-metric", "f1"], "loss"),
        (["--push-to-hub", "digits"], "USER/NAME"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--batch-size", "1" + 20 * "0"], "less than 1e+09"),
        (["--seed", "-1"], "--seed"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--dropout", "1"], "--dropout"),
        (["--batch", "64"], "--batch"),
        (["stray"], "stray"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--augmentation", "elastic"], "add --augment"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(arguments, names):
    with pytest.raises(UserError) as error:
        parse_config(arguments)
    assert names in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "no_such_key: 1",
        "config: other.yaml",
        "epochs: many",
        "epochs: [1, 2]",
        "epochs: true",
        "augment: 3",
        "- a list",
        "a: b: c",
        "model: resnet",
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"options\.yaml"):
        parse_config(["--config", str(file)])


def test_options_that_change_the_result_may_not_differ_on_resume():
    then = TrainConfig().options()
    assert differing_options(then, TrainConfig(learning_rate=0.01)) == ["--learning-rate was 0.001, is 0.01"]
    assert differing_options(then, TrainConfig(log_every=7, keep_checkpoints=5, epochs=20)) == []
    for course in ({"scheduler": "cosine"}, {"warmup_fraction": 0.1}):
        assert differing_options(TrainConfig(**course).options(), TrainConfig(**course, epochs=20))
    assert set(then) >= FREE_ON_RESUME


def test_help_answers_without_importing_torch():
    code = "import sys, mnist_accel.config as c\ntry: c.parse_config(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--gradient-accumulation-steps" in result.stdout


def test_an_option_with_nothing_behind_it_keeps_its_default_and_off_turns_trackers_off(tmp_path):
    (tmp_path / "options.yaml").write_text("output_dir:\naugment:\nreport_to: off\n")
    config = parse_config(["--config", str(tmp_path / "options.yaml")])
    assert (config.output_dir, config.augment, config.report_to) == ("", False, "none")


def test_repeating_a_run_uploads_nothing_and_starts_afresh(tmp_path):
    file = tmp_path / "config.yaml"
    options = parse_config(["--push-to-hub", "me/digits", "--resume", "runs/a/checkpoints/step_00000010"]).options()
    file.write_text(yaml.safe_dump(options | {"provenance": {}}))
    repeated = parse_config(["--config", str(file)])
    assert (repeated.push_to_hub, repeated.resume) == (None, None)
    file.write_text(yaml.safe_dump(options))  # a user's own file, which means what it says
    assert parse_config(["--config", str(file)]).push_to_hub == "me/digits"


def test_a_path_may_hold_a_line_end():
    assert parse_config(["--resume", "runs/a\nb"]).resume == "runs/a\nb"
