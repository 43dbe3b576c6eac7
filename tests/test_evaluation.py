from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cliphar.bundle import Bundle, Calibration
from cliphar.evaluation import evaluate, fit_calibration, macro_f1, model_card
from cliphar.evaluation import expected_calibration_error as ece_of
from cliphar.recognizer import Prediction, Recognizer, Score, probabilities, to_predictions


def answer(label: str, *top: tuple[str, float], members: tuple[str, ...] = ()) -> Prediction:
    scores = tuple(Score(name, score) for name, score in top)
    return Prediction(label, scores[0].score, members or (scores[0].label,), scores, 0.5)


# --- metrics


def test_macro_f1_by_hand() -> None:
    truth = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "d", "a"]
    # a: 2 hits, 3 claims, 3 cases -> 4/6; b: 1 hit, 2 claims, 2 cases -> 2/4; c: none; d does not occur
    assert macro_f1(truth, predicted) == pytest.approx((4 / 6 + 2 / 4 + 0) / 3)
    assert macro_f1(truth, truth) == 1
    assert macro_f1(["a"], ["b"]) == 0


def test_macro_f1_needs_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        macro_f1(["a", "b"], ["a"])


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, False, True, True])
    # two bins of half the photos each: |0.95 - 0.5| and |0.55 - 1|
    assert ece_of(confidence, correct, bins=10) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    assert ece_of(confidence, correct, bins=1) == pytest.approx(0)
    assert ece_of(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert ece_of(np.array([1.0]), np.array([False])) == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
def test_calibration_error_is_a_fraction(pairs: list[tuple[float, bool]]) -> None:
    error = ece_of(np.array([p for p, _ in pairs]), np.array([c for _, c in pairs]))
    assert 0 <= error <= 1


def test_honest_scores_have_little_error() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0, 1, 20_000)
    correct = random.uniform(0, 1, 20_000) < confidence
    assert ece_of(confidence, correct) < 0.02


def test_evaluate_by_hand() -> None:
    predictions = [
        answer("a", ("a", 0.9), ("b", 0.1)),
        answer("unknown", ("a", 0.6), ("b", 0.4), members=("a", "b")),
        answer("b", ("b", 0.7), ("a", 0.3)),
        answer("b", *((name, 0.2) for name in "bcdeaf"), members=tuple("bcde")),
    ]
    report = evaluate(predictions, ["a", "a", "a", "f"])
    assert report.n == 4
    assert report.top1 == 0.5  # unknown does not count against it
    assert report.top5 == 0.75  # f is the sixth
    assert report.macro_f1 == pytest.approx((2 * 2 / (2 + 3) + 0) / 2)
    assert report.coverage == 0.5
    assert report.set_size == (1 + 2 + 1 + 4) / 4
    assert report.unknown == 0.25
    assert report.ece == pytest.approx((0.1 + 0.4 + 0.7 + 0.2) / 4)
    plain = report.to_dict()
    assert list(plain) == ["n", "top1", "top5", "macro_f1", "ece", "coverage", "set_size", "unknown"]
    assert isinstance(plain["n"], int)


def test_labels_are_as_many_as_predictions() -> None:
    one = answer("a", ("a", 1.0))
    for predictions, truth in (([], []), ([one], []), ([one], ["a", "b"])):
        with pytest.raises(ValueError, match="predictions for"):
            evaluate(predictions, truth)


# --- calibration


NAMES = tuple(f"label {i}" for i in range(12))


def synthetic(n: int, scale: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines, and labels drawn from their softmax at a scale: a model whose right temperature is known."""
    random = np.random.default_rng(seed)
    cosines = random.uniform(0.1, 0.3, (n, len(NAMES))).astype(np.float32)
    noise = random.gumbel(size=(n, len(NAMES)))
    return cosines, (cosines * scale + noise).argmax(1)


@pytest.mark.parametrize("scale", [15.0, 40.0, 100.0])
def test_the_temperature_is_recovered(scale: float) -> None:
    cosines, truth = synthetic(6000, scale, 1)
    assert fit_calibration(cosines, truth).logit_scale == pytest.approx(scale, rel=0.08)


@pytest.mark.parametrize("margin", [None, 0.0, 0.5])
def test_sets_hold_the_truth_as_often_as_asked(margin: float | None) -> None:
    fitted = fit_calibration(*synthetic(2000, 40, 2), margin=margin)
    cosines, truth = synthetic(3000, 40, 3)
    sizes = []
    for coverage in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        sets = [p.set for p in to_predictions(cosines, NAMES, fitted, 5, coverage)]
        held = np.mean([NAMES[t] in members for t, members in zip(truth, sets, strict=True)])
        assert coverage - 0.03 < held
        if coverage >= 0.8:  # below, the best label alone already holds it more often
            assert held < coverage + 0.03
        sizes.append(np.mean([len(members) for members in sets]))
    assert sizes == sorted(sizes)
    assert sizes[0] < len(NAMES) / 2
    assert {len(p.set) for p in to_predictions(cosines, NAMES, fitted, 5, 0.999)} == {len(NAMES)}


def test_a_set_by_margin_has_what_is_near_enough_to_the_best() -> None:
    fitted = Calibration(logit_scale=40, margin=0.5, conformal=((0.9, -0.04),), unknown_below=-1, photos=1)
    cosines = np.array([[0.3, 0.2, 0.1, 0.4]], np.float32)
    assert to_predictions(cosines[:, :3], ("a", "b", "c"), fitted)[0].set == ("a", "b")
    assert to_predictions(cosines, ("a", "b", "c", "d"), fitted)[0].set == ("d", "a")
    assert to_predictions(cosines[:, 2:3], ("c",), fitted)[0].set == ("c",)


def test_scores_are_honest_after_the_fit() -> None:
    fitted = fit_calibration(*synthetic(3000, 40, 4))
    cosines, truth = synthetic(3000, 40, 5)
    report = evaluate(to_predictions(cosines, NAMES, fitted, 5, 0.9), [NAMES[t] for t in truth])
    assert report.ece < 0.04
    assert 0.005 < report.unknown < 0.1


def test_conformal_thresholds_are_within_bounds() -> None:
    for n in (1, 2, 10, 300):  # and they ascend, or there would be no calibration
        assert all(0 <= threshold <= 1 for _, threshold in fit_calibration(*synthetic(n, 40, n)).conformal)
        assert fit_calibration(*synthetic(n, 40, n), margin=0.5).conformal[-1][1] <= 1.5


def test_too_few_photos_for_a_coverage_give_the_whole_set() -> None:
    # of ten photos, no threshold can promise 95 %
    cosines, truth = synthetic(10, 40, 0)
    fitted = fit_calibration(cosines, truth)
    misfit = np.sort(1 - probabilities(cosines, fitted.logit_scale)[np.arange(10), truth])
    assert [dict(fitted.conformal)[c] for c in (0.5, 0.9, 0.95)] == [misfit[5], misfit[9], 1.0]


@pytest.mark.parametrize("refused", [0.02, 0.1])
def test_unknown_refuses_as_many_right_as_asked(refused: float) -> None:
    cosines, truth = synthetic(5000, 60, 6)
    fitted = fit_calibration(cosines, truth, refused)
    for fresh, labels in ((cosines, truth), synthetic(5000, 60, 7)):
        right = fresh.max(1)[fresh.argmax(1) == labels]
        assert float((right < fitted.unknown_below).mean()) == pytest.approx(refused, abs=0.006 + 0.3 * refused)


def test_a_model_that_is_never_right_refuses_nothing() -> None:
    cosines = np.tile(np.array([0.9, 0.1], np.float32), (20, 1))
    fitted = fit_calibration(cosines, np.ones(20, np.int64))
    assert fitted.unknown_below == -1
    assert fitted.photos == 20


@pytest.mark.parametrize("n", [1, 7, 19])
def test_too_few_right_answers_set_no_bound_for_unknown(n: int) -> None:
    assert fit_calibration(*synthetic(n, 400, 0)).unknown_below == -1  # of one, half of those to come were unknown


def test_a_model_that_is_always_right() -> None:
    cosines = np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    fitted = fit_calibration(cosines, np.arange(40, dtype=np.int64) % 4)
    assert fitted.unknown_below == 1
    assert 0.02 < dict(fitted.conformal)[0.9] < 0.03  # 1 in 42


# --- the card


def test_the_card_of_the_embedded_model(mini: Recognizer) -> None:
    info = mini.bundle.info
    card = model_card(mini.bundle)
    for heading in (f"# {info.name}", "## Measured", "## Learned from", "## Not good for", "## Made by"):
        assert heading in card.splitlines()
    for label in info.labels:
        assert label in card
    for source in info.sources:
        assert f"| {source.name} | {source.role} | {source.licence} |" in card
    for limit in info.limits:
        assert f"- {limit}" in card
    for metrics in info.metrics.values():
        assert f"| {metrics.description} | {metrics.n} |" in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    table = rows[: 2 + len(info.metrics)]
    assert len({line.count("|") for line in table}) == 1
    assert "None" not in card


def test_the_card_of_a_tiny_bundle(tiny: Bundle) -> None:
    card = model_card(tiny)
    assert "- known actions: red, green, blue" in card
    assert "0.500" in card
    assert card.endswith(".\n")
