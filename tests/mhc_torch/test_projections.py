"""The projections land on their manifolds, and agree with references and finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_torch.constraints import (
    project_doubly_stochastic,
    project_identity_preserving,
    project_simplex,
    project_sparse_simplex,
)

VECTORS = [project_simplex, project_identity_preserving, project_sparse_simplex]
logits = st.lists(st.floats(-50, 50), min_size=1, max_size=6).map(lambda v: torch.tensor(v, dtype=torch.float64))


def nearest_on_simplex(z: np.ndarray) -> np.ndarray:
    """argmin |p - z|^2 over the simplex by bisection on the multiplier tau of p = max(z - tau, 0)."""
    low, high = z.min() - 1, z.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.maximum(z - tau, 0).sum() > 1 else (low, tau)
    return np.maximum(z - tau, 0)


@pytest.mark.parametrize("project", VECTORS)
@settings(deadline=None, max_examples=50)
@given(z=logits, temperature=st.floats(0.1, 10))
def test_vectors_are_on_the_simplex_and_ignore_shifts(project, z, temperature):
    weights = project(z, temperature=temperature)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(project(z + 7, temperature=temperature), weights, rtol=0, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(z=logits, temperature=st.floats(0.1, 10))
def test_simplex_and_identity_follow_their_formulas(z, temperature):
    powers = [math.exp((v - max(z.tolist())) / temperature) for v in z.tolist()]
    softmax = torch.tensor([p / sum(powers) for p in powers], dtype=torch.float64)
    torch.testing.assert_close(project_simplex(z, temperature), softmax, rtol=1e-9, atol=1e-12)
    expected = 0.75 * softmax
    expected[-1] += 0.25
    torch.testing.assert_close(project_identity_preserving(z, 0.25, temperature), expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(z=logits, temperature=st.floats(0.1, 10))
def test_sparse_is_the_nearest_point(z, temperature):
    expected = nearest_on_simplex(z.numpy() / temperature)
    np.testing.assert_allclose(project_sparse_simplex(z, temperature).numpy(), expected, atol=1e-9)


def test_sparse_weights_are_exactly_zero():
    assert project_sparse_simplex(torch.tensor([-3.0, 0.0, 0.2])).tolist() == pytest.approx([0.0, 0.4, 0.6])
    assert project_sparse_simplex(torch.tensor([-3.0, 0.0, 0.2]))[0].item() == 0.0


@pytest.mark.parametrize("project", VECTORS)
def test_vectors_gradients(project):
    z = torch.tensor([[0.3, -0.2, 0.1], [0.4, 0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: project(z, temperature=0.9), z)


@pytest.mark.parametrize("project", VECTORS)
def test_rows_of_a_batch_are_projected_one_by_one(project):
    z = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(project(z), torch.stack([project(row) for row in z]))


@pytest.mark.parametrize("project", [*VECTORS, project_doubly_stochastic])
def test_half_precision_logits_are_projected_in_float32(project):
    assert project(torch.zeros(3, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_doubly_stochastic_agrees_with_plain_sinkhorn():
    z = torch.tensor([[0.5, -1.0, 0.2], [0.0, 2.0, -0.3], [1.0, 0.1, 0.4]], dtype=torch.float64)
    matrix = np.exp(z.numpy() / 0.7)
    for _ in range(10):
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
        matrix = matrix / matrix.sum(axis=0, keepdims=True)
    np.testing.assert_allclose(project_doubly_stochastic(z, 10, 0.7).numpy(), matrix, rtol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1000, 1000), min_size=9, max_size=9))
def test_doubly_stochastic_columns_sum_to_one_for_any_finite_logits(values):
    matrix = project_doubly_stochastic(torch.tensor(values, dtype=torch.float64).reshape(3, 3))
    torch.testing.assert_close(matrix.sum(dim=0), torch.ones(3, dtype=torch.float64))


def test_doubly_stochastic_rows_converge_and_gradient():
    z = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    matrix = project_doubly_stochastic(z, iterations=100)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(2, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda z: project_doubly_stochastic(z, iterations=5), z)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: project_simplex(torch.zeros(3), temperature=0.0),
            ValueError,
            "temperature must be positive and finite, got 0.0",
        ),
        (lambda: project_simplex(torch.zeros(3, dtype=torch.int64)), TypeError, "logits must be floating point"),
        (lambda: project_identity_preserving(torch.zeros(3), epsilon=1.0), ValueError, r"epsilon must be in \[0, 1\)"),
        (lambda: project_doubly_stochastic(torch.zeros(2, 3)), ValueError, "logits must be square"),
        (
            lambda: project_doubly_stochastic(torch.zeros(2, 2), iterations=0),
            ValueError,
            "iterations must be at least 1",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
