import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mhc_jax import (
    project_doubly_stochastic,
    project_identity_preserving,
    project_simplex,
    project_sparse_simplex,
)
from tests import reference

vectors = arrays(np.float64, st.integers(1, 8), elements=st.floats(-1e4, 1e4))
matrices = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(-1e4, 1e4)))


def gradient_error(project, reference_project, z, seed=0):
    """Distance of the gradient of a random functional of the weights from float64 central differences."""
    direction = np.random.default_rng(seed).normal(size=z.shape)
    with jax.enable_x64(True):
        actual = jax.grad(lambda z: jnp.vdot(direction, project(z)))(jnp.asarray(z))
    expected = reference.finite_differences(lambda z: np.vdot(direction, reference_project(z)), z)
    return np.abs(np.asarray(actual) - expected).max()  # a jax array outside of x64 would subtract in float32


@given(vectors, st.floats(0.1, 10.0))
def test_simplex(z, temperature):
    with jax.enable_x64(True):
        weights = project_simplex(jnp.asarray(z), temperature)
    np.testing.assert_allclose(weights, reference.softmax(z / temperature), atol=1e-12)


# XLA takes what is smaller than the smallest normal number for 0.
@given(vectors, st.floats(0.0, 0.99, allow_subnormal=False))
def test_identity_keeps_epsilon_on_the_latest(z, epsilon):
    with jax.enable_x64(True):
        weights = project_identity_preserving(jnp.asarray(z), epsilon)
    np.testing.assert_allclose(weights, reference.mixing_weights(z, constraint="identity", epsilon=epsilon), atol=1e-12)
    assert np.asarray(weights)[-1] >= epsilon  # in float64, which jax has only inside of x64


@given(vectors, st.floats(0.1, 10.0))
def test_sparse_is_the_nearest_point_of_the_simplex(z, temperature):
    with jax.enable_x64(True):
        weights = project_sparse_simplex(jnp.asarray(z), temperature)
    np.testing.assert_allclose(weights, reference.sparsemax(z / temperature), atol=1e-9)


def test_sparse_has_exact_zeros_and_the_exact_jacobian():
    z = np.array([0.4, -3.0, 0.7, 0.0])
    with jax.enable_x64(True):
        weights = project_sparse_simplex(jnp.asarray(z))
        jacobian = jax.jacobian(project_sparse_simplex)(jnp.asarray(z))
    support = np.array([1.0, 0.0, 1.0, 0.0])
    assert (np.asarray(weights) > 0).tolist() == [True, False, True, False]
    np.testing.assert_allclose(jacobian, np.diag(support) - np.outer(support, support) / 2, atol=1e-15)
    assert gradient_error(project_sparse_simplex, reference.sparsemax, z) < 1e-8


@given(matrices)
def test_sinkhorn_of_any_finite_logits(z):
    weights = np.asarray(project_doubly_stochastic(jnp.asarray(z, jnp.float32)))
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=-2), 1.0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_sinkhorn_of_large_and_batched_logits(n):
    z = np.random.default_rng(n).uniform(-1e4, 1e4, size=(2, 3, n, n)).astype(np.float32)
    weights = np.asarray(project_doubly_stochastic(jnp.asarray(z), 20, last="rows"))
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_sinkhorn_converges_on_both_sides(n):
    z = np.random.default_rng(n).uniform(-5, 5, size=(4, n, n)).astype(np.float32)
    weights, residual = project_doubly_stochastic(jnp.asarray(z), 500, tolerance=1e-7, return_residual=True)
    np.testing.assert_allclose(weights.sum(axis=-2), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-6)
    assert residual.shape == (4,)
    assert residual.max() <= 1e-6


@given(arrays(np.float64, (3, 3), elements=st.floats(-5, 5)), st.integers(1, 12), st.sampled_from(["rows", "columns"]))
@settings(max_examples=20)
def test_sinkhorn_iterations_and_their_order(z, iterations, last):
    with jax.enable_x64(True):
        weights = project_doubly_stochastic(jnp.asarray(z), iterations, last=last)
    np.testing.assert_allclose(weights, reference.sinkhorn(z, iterations, last), atol=1e-12)


def test_sinkhorn_does_not_lose_a_column_to_underflow():
    np.testing.assert_allclose(project_doubly_stochastic(jnp.array([[0.0, -200.0], [0.0, -200.0]])), 0.5)


@pytest.mark.parametrize("last", ["columns", "rows"])
@pytest.mark.parametrize("iterations", [1, 2, 9, 20])
def test_sinkhorn_gradient_of_exactly_these_iterations(iterations, last):
    z = np.random.default_rng(1).normal(size=(4, 4)) * 2
    error = gradient_error(
        lambda z: project_doubly_stochastic(z, iterations, last=last),
        lambda z: reference.sinkhorn(z, iterations, last),
        z,
    )
    assert error < 1e-8


def test_sinkhorn_gradient_at_the_fixed_point():
    z = np.random.default_rng(2).normal(size=(4, 4)) * 2
    error = gradient_error(
        lambda z: project_doubly_stochastic(z, 1000, tolerance=1e-13), lambda z: reference.sinkhorn(z, 1000), z
    )
    assert error < 1e-8


@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_sinkhorn_backward_memory_does_not_grow(tolerance):
    def temporaries(iterations):
        def loss(z):
            return jnp.sum(project_doubly_stochastic(z, iterations, tolerance=tolerance) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((64, 8, 8))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1000) <= 1.01 * temporaries(20)


def test_sinkhorn_residual_shows_how_slowly_a_triangular_matrix_converges():
    # Only the diagonal of a triangular matrix survives in the limit; what lies off it fades like 1 / iterations.
    z = jnp.array([[0.0, 0.0], [-1e4, 0.0]])
    residual = [project_doubly_stochastic(z, n, return_residual=True)[1] for n in (10, 100, 1000)]
    np.testing.assert_allclose(residual, [1 / 21, 1 / 201, 1 / 2001], rtol=0.2)


def test_half_precision_logits_are_projected_in_float32():
    z = jnp.array([[0.1, 1.3], [0.7, -2.0]], jnp.bfloat16)
    for project in (project_simplex, project_identity_preserving, project_sparse_simplex, project_doubly_stochastic):
        assert project(z).dtype == jnp.float32
        np.testing.assert_allclose(project(z), project(z.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: project_simplex(jnp.zeros(3), temperature=0.0), "temperature must be positive.*0.0"),
        (lambda: project_identity_preserving(jnp.zeros(3), epsilon=1.5), "epsilon must be in.*1.5"),
        (lambda: project_doubly_stochastic(jnp.zeros((2, 3))), r"logits must hold square.*\(2, 3\)"),
        (lambda: project_doubly_stochastic(jnp.zeros((2, 2)), 0), "iterations must be at least 1, got 0"),
        (lambda: project_doubly_stochastic(jnp.zeros((2, 2)), last="both"), "last must be.*both"),
        (lambda: project_doubly_stochastic(jnp.zeros((2, 2)), tolerance=-1.0), "tolerance must be positive.*-1.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
