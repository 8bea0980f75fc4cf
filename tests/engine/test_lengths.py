from __future__ import annotations

import numpy as np
import pytest

from batchinfer.engine.lengths import ENOUGH, MARGIN, WINDOW, LengthPredictor


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
