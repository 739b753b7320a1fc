"""MHCSkip and MatrixMHCSkip against sums written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mhc_jax import History, MHCConfig
from mhc_jax.nn import MatrixMHCSkip, MHCSkip

RNG = np.random.default_rng(0)
STATES = [RNG.normal(size=(3, 5)) for _ in range(6)]
X = RNG.normal(size=(3, 5))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def expected_weights(logits, mode, constraint, epsilon, temperature):
    if mode == "residual":
        return np.eye(len(logits))[-1]
    weights = softmax(logits / temperature)
    if mode == "mhc" and constraint == "identity":
        weights = (1 - epsilon) * weights
        weights[-1] += epsilon
    return weights


def with_logits(skip, logits):
    skip.mixing_logits[...] = jnp.asarray(logits)
    return skip


@pytest.mark.parametrize(
    ("mode", "constraint"), [("mhc", "simplex"), ("mhc", "identity"), ("hc", "identity"), ("residual", "simplex")]
)
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_adds_the_weighted_window(mode, constraint, count):
    logits = RNG.normal(size=4)
    with jax.enable_x64(True):
        skip = MHCSkip(4, mode=mode, constraint=constraint, epsilon=0.3, temperature=0.7, use_gating=True)
        skip = with_logits(skip, logits)
        skip.gate_logit[...] = jnp.asarray(0.4)
        y = skip(jnp.asarray(X), [jnp.asarray(state) for state in STATES[:count]])

        live = min(count, 4)
        weights = expected_weights(logits[-live:], mode, constraint, 0.3, 0.7)
        gate = 1.0 if mode == "residual" else 1 / (1 + np.exp(-0.4))
        expected = X + gate * sum(w * s for w, s in zip(weights, STATES[count - live : count], strict=True))
        np.testing.assert_allclose(y, expected, rtol=1e-12)
        np.testing.assert_allclose(skip.mixing_weights(live), weights, rtol=1e-12)
        np.testing.assert_allclose(skip.mixing_weights(live, gated=True), gate * weights, rtol=1e-12)


@pytest.mark.parametrize("make", [lambda: MHCSkip(3, init="uniform"), lambda: MatrixMHCSkip(3, rngs=nnx.Rngs(0))])
def test_a_carried_history_gives_what_a_list_of_states_gives(make):
    skip = make()
    skip.mixing_logits[...] = jax.random.normal(jax.random.key(1), skip.mixing_logits.shape)
    step = jax.jit(lambda skip, x, history: skip(x, history))
    states = [jnp.asarray(STATES[0], jnp.float32)]
    history = History.create(states[0], 3)
    for _ in range(5):
        x = jnp.sin(3 * states[-1])
        y = skip(x, states)
        np.testing.assert_allclose(step(skip, x, history), y, atol=1e-6)
        states.append(y)
        history = history.push(y)


@pytest.mark.parametrize("make", [lambda: MHCSkip(3), lambda: MatrixMHCSkip(3, rngs=nnx.Rngs(0))])
def test_an_empty_history_leaves_the_branch_as_it_is(make):
    np.testing.assert_array_equal(make()(jnp.asarray(X), []), jnp.asarray(X))


@pytest.mark.parametrize("constraint", ["simplex", "identity", "sparse"])
def test_gradient_of_the_logits_is_that_of_finite_differences(constraint):
    logits = np.array([0.3, -0.2, 0.1])
    with jax.enable_x64(True):
        skip = MHCSkip(3, constraint=constraint)
        states = [jnp.asarray(state) for state in STATES[:3]]

        def loss(logits):
            return jnp.sum(jnp.sin(with_logits(nnx.clone(skip), logits)(jnp.asarray(X), states)))

        gradient = jax.grad(loss)(jnp.asarray(logits))
        step = 1e-6 * np.eye(3)
        numeric = [(loss(logits + h) - loss(logits - h)) / 2e-6 for h in step]
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-9)
        assert np.abs(numeric).min() > 1e-3


def test_detached_history_passes_no_gradient_to_past_states():
    def loss(state, detach):
        return MHCSkip(2, detach_history=detach)(2 * state, [state]).sum()

    state = jnp.ones(3)
    np.testing.assert_allclose(jax.grad(loss)(state, True), 2.0)
    np.testing.assert_allclose(jax.grad(loss)(state, False), 3.0)


def test_noise_is_drawn_in_training_only_and_keeps_to_the_constraint():
    skip = MHCSkip(3, stochastic=True, constraint="identity", epsilon=0.4, init="uniform", rngs=nnx.Rngs(0))
    one_hot = list(jnp.eye(3))
    draws = np.array([skip(jnp.zeros(3), one_hot) for _ in range(50)])
    np.testing.assert_allclose(draws.sum(axis=1), 1.0, rtol=1e-5)
    assert (draws >= 0).all()
    assert (draws[:, -1] >= 0.4).all()
    assert len({tuple(row) for row in draws}) == 50
    skip.eval()
    np.testing.assert_allclose(skip(jnp.zeros(3), one_hot), [0.2, 0.2, 0.6], rtol=1e-6)
    skip.train()
    assert not np.allclose(skip(jnp.zeros(3), one_hot), [0.2, 0.2, 0.6])


def test_pruned_states_do_not_count():
    skip = with_logits(MHCSkip(3, prune_threshold=0.2), jnp.log(jnp.array([0.1, 0.3, 0.6])))
    np.testing.assert_allclose(skip(jnp.zeros(3), list(jnp.eye(3))), [0.0, 0.3, 0.6], rtol=1e-6)


def test_auto_project_maps_states_of_the_other_width():
    skip = MHCSkip(2, auto_project=True, history_features=5, features=7, init="uniform", rngs=nnx.Rngs(0))
    wide = jnp.asarray(RNG.normal(size=(3, 7)), jnp.float32)
    narrow = jnp.asarray(X, jnp.float32)
    y = skip(wide, [narrow, wide])
    np.testing.assert_allclose(y, wide + 0.5 * narrow @ skip.projection.kernel[...] + 0.5 * wide, rtol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(3, 6\).*from 5 to 7"):
        skip(wide, [jnp.zeros((3, 6))])
    with pytest.raises(ValueError, match="auto_project needs history_features"):
        MHCSkip(auto_project=True, rngs=nnx.Rngs(0))


def test_bad_input_is_named():
    assert MHCSkip(8, config=MHCConfig(temperature=2.0)).config == MHCConfig(max_history=8, temperature=2.0)
    with pytest.raises(TypeError, match="config must be of type MHCConfig, got 4"):
        MHCSkip(config=4)
    with pytest.raises(TypeError, match="max_histroy"):
        MHCSkip(max_histroy=8)
    with pytest.raises(ValueError, match="stochastic needs rngs"):
        MHCSkip(stochastic=True)
    with pytest.raises(ValueError, match=r"shape \(4, 5\).*gave \(3, 5\)"):
        MHCSkip()(jnp.zeros((3, 5)), [jnp.zeros((4, 5))])
    with pytest.raises(ValueError, match=r"shape \(4, 5\).*gave \(3, 5\)"):
        MatrixMHCSkip(rngs=nnx.Rngs(0))(jnp.zeros((3, 5)), [jnp.zeros((4, 5))])
    for skip in (MHCSkip(4), MatrixMHCSkip(4, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match="window of 3, expected 4"):
            skip(jnp.zeros(5), History.create(jnp.zeros(5), 3))
        with pytest.raises(ValueError, match=r"k must be in 1\.\.4, got 5"):
            skip.mixing_weights(5)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        MatrixMHCSkip(iterations=0, rngs=nnx.Rngs(0))


def test_matrix_skip_takes_the_last_row_of_the_projected_live_logits():
    logits = RNG.normal(size=(4, 4))
    with jax.enable_x64(True):
        for doubly_stochastic in (True, False):
            skip = MatrixMHCSkip(4, doubly_stochastic, iterations=7, rngs=nnx.Rngs(0))
            skip = with_logits(skip, logits)
            matrix = np.exp(logits[-3:, -3:])
            matrix /= matrix.sum(axis=1, keepdims=True)
            if doubly_stochastic:
                matrix /= matrix.sum(axis=0)
                for _ in range(6):
                    matrix /= matrix.sum(axis=1, keepdims=True)
                    matrix /= matrix.sum(axis=0)
            np.testing.assert_allclose(skip.mixing_matrix(3), matrix, rtol=1e-10)
            expected = X + sum(w * s for w, s in zip(matrix[-1], STATES[:3], strict=True))
            np.testing.assert_allclose(skip(jnp.asarray(X), list(map(jnp.asarray, STATES[:3]))), expected, rtol=1e-10)
