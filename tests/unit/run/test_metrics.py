"""Measures worked by hand, and by the formulas that textbooks have for two classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidelock.run.metrics import sequence_metrics


def outputs_of(classes: list[int], num_classes: int) -> np.ndarray:
    return np.eye(num_classes, dtype=np.float32)[classes]


def measured(predicted: list[int], labels: list[int], num_classes: int = 2) -> dict[str, float]:
    return sequence_metrics(outputs_of(predicted, num_classes), np.array(labels))


def correlated(predicted: list[float], numbers: list[float]) -> dict[str, float]:
    return sequence_metrics(np.array(predicted, np.float32)[:, None], np.array(numbers, np.float32))


def test_two_classes_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    found = measured([1] * 4 + [0] * 6, [1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(6 / 9)
    assert found["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert found["mean_of_accuracy_and_f1"] == pytest.approx((0.7 + 6 / 9) / 2)


def test_three_classes_by_hand() -> None:
    """The confusion matrix [[2, 1, 0], [0, 2, 0], [1, 0, 1]], rows the true classes."""
    found = measured([0, 0, 1, 1, 1, 0, 2], [0, 0, 0, 1, 1, 2, 2], 3)
    assert found.keys() == {"accuracy", "matthews"}
    assert found["accuracy"] == pytest.approx(5 / 7)
    # Gorodkin's sums: 5 of 7 right, predicted 3, 3, 1 times, true 3, 2, 2 times.
    assert found["matthews"] == pytest.approx((5 * 7 - 17) / math.sqrt((49 - 19) * (49 - 17)))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_two_classes_by_the_formulas(pairs: list[tuple[int, int]]) -> None:
    found = measured([predicted for predicted, _ in pairs], [label for _, label in pairs])
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / math.sqrt(spread) if spread else 0, abs=1e-12)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0)


def test_numbers_by_hand() -> None:
    found = correlated([1.0, 2.0, 2.0, 9.0], [0.0, 1.0, 2.0, 3.0])
    assert found["pearson"] == pytest.approx(12 / math.sqrt(41 * 5))
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert found["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert found["mean_of_pearson_and_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_ranks_see_order_only() -> None:
    found = correlated([-3.0, 0.5, 1.0, 2.0], [math.exp(value) for value in (-3.0, 0.5, 1.0, 2.0)])
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] < 0.95
    assert correlated([4.0, 3.0, 2.0], [1.0, 2.0, 5.0])["spearman"] == pytest.approx(-1)


def test_a_correlation_with_what_does_not_vary_is_none() -> None:
    assert set(correlated([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]).values()) == {0.0}
    assert set(correlated([2.0], [1.0]).values()) == {0.0}


def test_small_numbers_correlate_as_large_ones_do() -> None:
    small = correlated([1e-30, 2e-30, 4e-30], [1.0, 2.0, 4.0])
    assert small["pearson"] == pytest.approx(1, abs=1e-6)
