"""How far two arrays lie from each other, in every measure that a reader may want to judge by."""

import math
from dataclasses import dataclass

import numpy as np

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Figures:
    """The difference of two arrays `a` and `b` of one shape.

    Attributes:
        max_abs: largest |a - b|; 0 where both are NaN or the same infinity, infinite where only one is.
        max_rel: largest |a - b| / max(|a|, |b|), with 0/0 = 0.
        index: where `max_abs` is.
        a, b: the two values there.
        p99: 99th percentile of |a - b|.
        ulp_max, ulp_p99: the same in units in the last place: how many numbers lie between the two; integers 0.
        cosine: cosine of the angle between the two, as vectors; 1 if both are zero.
        snr_db: 20·log10(|a| / |a - b|), signal to noise in decibels; infinite if they are equal.
        nan, inf: how many NaN and infinities `a` and `b` hold.
    """

    max_abs: float
    max_rel: float
    index: tuple[int, ...]
    a: float
    b: float
    p99: float
    ulp_max: int
    ulp_p99: float
    cosine: float
    snr_db: float
    nan: tuple[int, int]
    inf: tuple[int, int]


def compare(a: np.ndarray, b: np.ndarray) -> Figures:
    """The `Figures` of two real arrays of the same shape and dtype.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"a and b must agree in shape and dtype, got {a.dtype}{a.shape} and {b.dtype}{b.shape}")
    nan = int(np.isnan(a).sum()), int(np.isnan(b).sum())
    inf = int(np.isinf(a).sum()), int(np.isinf(b).sum())
    if a.size == 0:
        return Figures(0.0, 0.0, (), 0.0, 0.0, 0.0, 0, 0.0, 1.0, math.inf, nan, inf)
    ulp = ulp_distance(a, b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    gap = difference(a, b)
    larger = np.maximum(np.abs(a), np.abs(b))
    index = np.unravel_index(np.argmax(gap), gap.shape)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        relative = np.where(gap == 0, 0.0, np.where(np.isinf(gap), np.inf, gap / larger))
        signal, noise = np.linalg.norm(a), np.linalg.norm(gap)
        both = signal * np.linalg.norm(b)
        cosine = float(np.vdot(a, b) / both) if both else float(signal == noise)
        snr = 20 * math.log10(signal / noise) if 0 < noise < math.inf and 0 < signal < math.inf else math.inf
    return Figures(
        max_abs=float(gap.max()),
        max_rel=float(relative.max()),
        index=tuple(int(i) for i in index),
        a=float(a[index]),
        b=float(b[index]),
        p99=float(np.quantile(gap, 0.99, method="higher")),
        ulp_max=int(ulp.max()),
        ulp_p99=float(np.quantile(ulp, 0.99, method="higher")),
        cosine=cosine,
        snr_db=snr if noise == 0 or math.isfinite(snr) else -math.inf,
        nan=nan,
        inf=inf,
    )


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in float64; 0 where both are NaN or the same infinity, infinite where only one is."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(a - b)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.where(np.isnan(gap), np.inf, gap))


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many floating-point numbers of their common dtype lie between `a` and `b`, as uint64 (integers: 0).

    The bits of an IEEE number, read as sign and magnitude, are its rank among all numbers of its dtype; -0 and +0 have
    the same rank. Two NaN are equal; NaN and a number are the largest distance apart.
    """
    if a.dtype.kind in "iub":
        return np.zeros(a.shape, np.uint64)
    x, y = _rank(a), _rank(b)
    nan_a, nan_b = np.isnan(a.astype(np.float64)), np.isnan(b.astype(np.float64))
    steps = np.where(nan_a | nan_b, np.uint64(2**64 - 1), np.maximum(x, y) - np.minimum(x, y))
    return np.where(nan_a & nan_b, np.uint64(0), steps)


def _rank(x: np.ndarray) -> np.ndarray:
    """The place of each number among all numbers of its dtype, as uint64; that of 0 is 2**63."""
    middle = np.uint64(1 << 63)
    bits = np.ascontiguousarray(x).reshape(x.shape).view(_UNSIGNED[x.dtype.itemsize]).astype(np.uint64)
    sign = np.uint64(1 << (8 * x.dtype.itemsize - 1))
    magnitude = bits & (sign - np.uint64(1))
    return np.where(bits & sign, middle - magnitude, middle + magnitude)


def kl_divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Largest Kullback-Leibler divergence, in nats, of softmax(b) from softmax(a) over the last axis, in float64."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(a), log_softmax(b)
    return float(np.max(np.sum(np.exp(p) * (p - q), -1), initial=0.0))


def top_k_agreement(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Fraction of rows (last axis) with the same `k` largest entries in `a` and `b`; ties go to the lower index."""
    k = min(k, a.shape[-1])
    top_a, top_b = (np.sort(np.argsort(-x.astype(np.float64), -1, kind="stable")[..., :k], -1) for x in (a, b))
    return float(np.mean(np.all(top_a == top_b, -1))) if a.size else 1.0
