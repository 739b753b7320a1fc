"""Figures of a difference, against definitions written out."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.proof.metrics import compare, kl_divergence, top_k_agreement, ulp_distance

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@given(st.floats(-(2.0**99), 2.0**99, width=32), st.integers(0, 50))
def test_ulp_distance_counts_steps_to_the_next_number(start: float, steps: int) -> None:
    a = b = np.float32(start)
    for _ in range(steps):
        b = np.nextafter(b, np.float32(np.inf))
    assert ulp_distance(np.array([a]), np.array([b]))[0] == steps
    assert ulp_distance(np.array([b]), np.array([a]))[0] == steps


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_ulp_distance_in_every_precision(dtype: type) -> None:
    one, eps = np.array([1.0]).astype(dtype), float(ml_dtypes.finfo(dtype).eps)
    assert ulp_distance(one, (one.astype(float) + eps).astype(dtype))[0] == 1
    assert ulp_distance(one, (one.astype(float) - eps / 2).astype(dtype))[0] == 1
    zero, tiny = (
        np.array([0.0]).astype(dtype),
        np.array([float(ml_dtypes.finfo(dtype).smallest_subnormal)]).astype(dtype),
    )
    assert ulp_distance(zero, -zero)[0] == 0
    assert ulp_distance(-tiny, tiny)[0] == 2


def test_figures_of_a_known_difference() -> None:
    a = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    b = np.array([[3.0, 4.5], [0.0, 0.0]], np.float32)
    figures = compare(a, b)
    assert (figures.max_abs, figures.index, figures.a, figures.b) == (0.5, (0, 1), 4.0, 4.5)
    assert figures.max_rel == pytest.approx(0.5 / 4.5)
    assert figures.cosine == pytest.approx(27 / (5 * math.hypot(3, 4.5)))
    assert figures.snr_db == pytest.approx(20)  # 5 against 0.5
    assert figures.ulp_max == 2**20  # half of 2^-2 of the 2^23 numbers from 4 to 8


def test_infinity_and_nan_agree_only_with_themselves() -> None:
    same = np.array([np.nan, np.inf, -np.inf, 1.0], np.float32)
    figures = compare(same, same.copy())
    assert (figures.max_abs, figures.ulp_max, figures.nan, figures.inf) == (0, 0, (1, 1), (2, 2))
    for value in (1.0, np.nan, -np.inf):
        other = same.copy()
        other[1] = value
        assert compare(same, other).max_abs == math.inf
    with pytest.raises(ValueError, match="shape"):
        compare(same, same[:2])
    assert compare(same[:0], same[:0]).max_abs == 0


def test_logits_as_distributions() -> None:
    a, b = np.array([[0.0, 1.0, 2.0]]), np.array([[0.0, 1.0, 3.0]])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
    assert kl_divergence(a, b) == pytest.approx((p * np.log(p / q)).sum())
    assert kl_divergence(a, a + 100) == pytest.approx(0, abs=1e-12)
    rows = np.array([[5.0, 4.0, 3.0], [1.0, 2.0, 3.0]])
    swapped = rows[:, [1, 0, 2]]
    assert top_k_agreement(rows, swapped, 1) == 0.5
    assert top_k_agreement(rows, swapped, 2) == 0.5
    assert top_k_agreement(rows, swapped, 3) == 1
