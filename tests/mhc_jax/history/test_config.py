from functools import partial

import jax
import pytest

from mhc_jax import MHCConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_history", 0),
        ("max_history", 2.0),
        ("max_history", True),
        ("mode", "dense"),
        ("constraint", "doubly_stochastic"),
        ("init", "zeros"),
        ("epsilon", 1.0),
        ("epsilon", -0.1),
        ("epsilon", float("nan")),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("prune_threshold", 1.0),
        ("use_gating", "yes"),
    ],
)
def test_names_the_option_and_the_value_that_are_wrong(name, value):
    with pytest.raises(ValueError, match=f"{name} must.*{value!r}"):
        MHCConfig(**{name: value})


def test_serves_as_a_static_argument():
    traced = []

    @partial(jax.jit, static_argnums=0)
    def scaled(config, x):
        traced.append(config)
        return x / config.temperature

    assert scaled(MHCConfig(temperature=2.0), 1.0) == scaled(MHCConfig(temperature=2.0), 1.0) == 0.5
    assert len(traced) == 1
