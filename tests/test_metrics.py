"""The measures, against values worked out by hand or by another way."""

import math

import pytest
import torch

from mnist_accel import metrics


@pytest.fixture
def confusion():
    # Class 0: 3 of 4 right; class 1: 2 of 2; class 2: never predicted.
    return torch.tensor([[3, 1, 0], [0, 2, 0], [1, 1, 0]])


def test_confusion_matrix_has_true_classes_as_rows():
    matrix = metrics.confusion_matrix(torch.tensor([1, 1, 2, 0]), torch.tensor([0, 1, 2, 0]), 4)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_confusion_matrices_of_parts_add_up_to_that_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    predictions, labels = torch.randint(0, 5, (2, 101), generator=generator)
    whole = metrics.confusion_matrix(predictions, labels, 5)
    parts = metrics.confusion_matrix(predictions[:40], labels[:40], 5)
    parts += metrics.confusion_matrix(predictions[40:], labels[40:], 5)
    assert torch.equal(whole, parts)
    assert int(whole.sum()) == 101


def test_precision_and_recall_per_class_are_nan_where_nothing_was_counted(confusion):
    torch.testing.assert_close(metrics.precision(confusion), torch.tensor([0.75, 0.5, torch.nan]), equal_nan=True)
    torch.testing.assert_close(metrics.recall(confusion), torch.tensor([0.75, 1.0, 0.0]))
    assert metrics.recall(torch.tensor([[1, 0], [0, 0]]))[1].isnan()


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(9950, 10000, 0.99342, 0.99620), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0)],
)
def test_accuracy_interval_is_wilsons(correct, total, low, high):
    assert metrics.accuracy_interval(correct, total) == pytest.approx((low, high), abs=1e-5)


def test_accuracy_interval_solves_the_equation_that_defines_it():
    # Each end is the true accuracy p whose standard error puts the measured share exactly z away.
    for p in metrics.accuracy_interval(970, 1000):
        assert abs(0.97 - p) / math.sqrt(p * (1 - p) / 1000) == pytest.approx(1.959964, abs=1e-5)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 1])
    # Two images at 90% of which half are right, two at 60% that both are: (0.4 + 0.4) / 2.
    assert metrics.expected_calibration_error(probabilities, labels) == pytest.approx(0.4, abs=1e-6)


def test_calibration_error_of_certain_predictions():
    certain = torch.eye(10)
    assert metrics.expected_calibration_error(certain, torch.arange(10)) == 0.0
    assert metrics.expected_calibration_error(certain, torch.arange(10).roll(1)) == 1.0


def test_fitted_temperature_recovers_the_scale_of_overconfident_logits():
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(20000, 10, generator=generator) * 2
    labels = torch.multinomial(honest.softmax(dim=1), 1, generator=generator).squeeze(1)
    temperature = metrics.fit_temperature(honest * 3, labels)
    assert temperature == pytest.approx(3.0, rel=0.05)
    assert metrics.fit_temperature(honest * 0.2, labels) == pytest.approx(0.2, rel=0.05), "and of timid ones"
    before = metrics.expected_calibration_error((honest * 3).softmax(dim=1), labels)
    after = metrics.expected_calibration_error((honest * 3 / temperature).softmax(dim=1), labels)
    assert before > 0.1
    assert after < 0.02


def test_fitted_temperature_is_where_the_losss_slope_is_zero():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 10, generator=generator, dtype=torch.float64) * 4
    labels = logits.argmax(dim=1)
    labels[::10] = 0
    log_temperature = torch.tensor(math.log(metrics.fit_temperature(logits, labels)), requires_grad=True)
    torch.nn.functional.cross_entropy(logits / log_temperature.exp(), labels).backward()
    assert abs(float(log_temperature.grad)) < 1e-3


def test_temperature_stays_one_where_every_prediction_is_right():
    assert metrics.fit_temperature(torch.eye(10) * 5, torch.arange(10)) == 1.0


def test_digits_give_up_their_small_share_of_confidence_whatever_the_size_of_the_logits():
    logits = 20 * torch.rand(500, 10, generator=torch.Generator().manual_seed(0))
    for shift in (-60.0, 0.0, 60.0):
        level = metrics.fit_no_digit_level(logits + shift, temperature=1.0)
        kept = metrics.confidences(logits + shift, 1.0, level) - 0.1
        given_up = 1 - kept / (logits.double().softmax(dim=1) - 0.1)
        assert float(given_up[:, 0].mean()) == pytest.approx(metrics.NO_DIGIT_SHARE, rel=1e-3)
    assert metrics.NO_DIGIT_SHARE < 0.01, "the calibration error is limited to 1%"


def test_little_evidence_of_a_digit_makes_confidence_low_and_changes_no_answer():
    logits = torch.tensor([[-3.0, 1.0, 0.5], [0.0, 0.1, 0.2], [9.0, 1.0, 1.0]])
    for level in (-torch.inf, 0.0, 30.0, 1000.0):
        shares = metrics.confidences(logits, 0.7, level)
        assert torch.equal(shares.argmax(dim=1), logits.argmax(dim=1)), level
        assert torch.allclose(shares.sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert (shares - 1 / 3).abs().max() < 1e-5
