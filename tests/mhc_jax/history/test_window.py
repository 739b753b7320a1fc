import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import History


def test_keeps_the_last_states_oldest_first():
    history = History.create(jnp.full(2, 0.0), 3)
    for step in range(1, 5):
        live = min(step, 3)
        assert history.count == live
        expected = [[0.0, 0.0]] * (3 - live) + [[k, k] for k in range(step - live, step)]
        np.testing.assert_array_equal(history.window, expected)
        history = history.push(jnp.full(2, float(step)))


def test_is_a_carry_of_a_scan_with_any_state():
    x = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros((), jnp.bfloat16),)}

    def body(history, step):
        state = jax.tree.map(lambda leaf: jnp.full(leaf.shape[1:], step, leaf.dtype), history.window)
        return history.push(state), None

    history, _ = jax.lax.scan(body, History.create(x, 2), jnp.arange(5.0))
    assert history.count == 2
    assert history.max_history == 2
    np.testing.assert_array_equal(history.window["a"][:, 0, 0], [3, 4])
    assert history.window["b"][0].dtype == jnp.bfloat16


def test_leaves_the_earlier_history_as_it_was():
    first = History.create(jnp.zeros(2), 2)
    first.push(jnp.ones(2))
    np.testing.assert_array_equal(first.window, jnp.zeros((2, 2)))
    assert first.count == 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="max_history must be at least 1, got 0"):
        History.create(jnp.zeros(2), 0)
    with pytest.raises(ValueError, match=r"x must have the shape.*\(2,\).*\(3,\)"):
        History.create(jnp.zeros(2), 2).push(jnp.zeros(3))
