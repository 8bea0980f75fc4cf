from __future__ import annotations

import numpy as np
import pytest

from batchinfer.engine.lengths import ENOUGH, FRESH, MARGIN, WINDOW, LengthPredictor, survival_moments

NOBODY = np.zeros(0)


def test_full_length_is_expected_until_enough_samples_finished() -> None:
    predictor = LengthPredictor()
    for _ in range(ENOUGH - 1):
        predictor.finished(1, 100)
    assert predictor.expected(200) == 200
    predictor.finished(1, 100)
    assert predictor.expected(200) == 2


def test_the_estimate_is_mean_and_margin_of_the_last_window() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 3 * WINDOW)
    predictor = LengthPredictor()
    for length in lengths.tolist():
        predictor.finished(length, 100)
    last = lengths[-WINDOW:] / 100
    assert predictor.expected(1000) == pytest.approx((last.mean() + MARGIN * last.std()) * 1000, abs=1)


def test_the_estimate_lies_within_one_and_max_tokens() -> None:
    predictor = LengthPredictor()
    for _ in range(ENOUGH):
        predictor.finished(100, 100)
    assert predictor.expected(7) == 7
    assert LengthPredictor(fixed_share=0.001).expected(10) == 1


def test_a_fixed_share_takes_the_place_of_learning() -> None:
    predictor = LengthPredictor(fixed_share=0.5)
    for _ in range(ENOUGH):
        predictor.finished(1, 100)
    assert predictor.expected(100) == 50


def test_a_group_is_told_apart_once_enough_of_it_finished() -> None:
    predictor = LengthPredictor()
    for _ in range(3 * ENOUGH):
        predictor.finished(80, 100, group=1)
    for _ in range(ENOUGH - 1):
        predictor.finished(10, 100, group=2)
    everybody = predictor.expected(100)
    assert 60 < everybody < 80
    assert predictor.expected(100, group=1) == 80
    assert predictor.expected(100, group=2) == everybody == predictor.expected(100, group=3)
    for _ in range(4 * ENOUGH // FRESH):  # an estimate is not made anew for each
        predictor.finished(10, 100, group=2)
    assert predictor.expected(100, group=2) == 10


def test_with_nobody_running_the_moments_are_those_of_the_sample() -> None:
    shares = np.random.default_rng(1).random(500).round(1)
    mean, deviation = survival_moments(shares, NOBODY)
    assert mean == pytest.approx(shares.mean())
    assert deviation == pytest.approx(shares.std())


def test_the_estimator_of_kaplan_and_meier_on_a_case_by_hand() -> None:
    """Deaths at 0.2, 0.4 (two) and 0.8, lost from sight at 0.3 and 0.9: S = 5/6, * 2/4, * 1/2; the rest is 1."""
    mean, deviation = survival_moments(np.array([0.4, 0.2, 0.8, 0.4]), np.array([0.9, 0.3]))
    mass = np.array([1 / 6, 5 / 12, 5 / 24, 5 / 24])
    values = np.array([0.2, 0.4, 0.8, 1.0])
    assert mean == pytest.approx(mass @ values)
    assert deviation == pytest.approx(np.sqrt(mass @ values**2 - (mass @ values) ** 2))


def test_the_first_to_finish_do_not_mislead() -> None:
    """256 samples start together. When the first eighth of them has ended, the mean of those is a fraction of the true
    one; with those that still run, the estimate is never too low, and right in the end."""
    lengths = np.clip(np.random.default_rng(2).lognormal(4.8, 1.0, 256).astype(int), 1, 1000)
    true = lengths.mean()
    predictor, told = LengthPredictor(), []
    for now in range(1, 1001):
        for length in lengths[lengths == now].tolist():
            predictor.finished(length, 1000)
        running = lengths[lengths > now]
        predictor.running(np.full(len(running), now), np.full(len(running), 1000), np.zeros(len(running), int))
        told.append(predictor.expected(1000))
    early = int(np.sort(lengths)[len(lengths) // 8])
    assert lengths[lengths <= early].mean() < true / 4
    assert min(told) >= true
    assert told[-1] == pytest.approx(true + MARGIN * lengths.std(), abs=1)


def test_those_that_run_count_for_their_own_group() -> None:
    predictor = LengthPredictor()
    for _ in range(ENOUGH):
        predictor.finished(10, 100, group=1)
        predictor.finished(10, 100, group=2)
    predictor.running(np.full(50, 60), np.full(50, 100), np.full(50, 1))
    assert predictor.expected(100, group=2) == 10
    assert predictor.expected(100, group=1) > 70
