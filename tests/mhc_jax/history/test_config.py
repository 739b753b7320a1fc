from functools import partial

import jax
import pytest

from mhc_jax import MHCConfig


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("max_history", 0, ValueError),
        ("max_history", 2.0, TypeError),
        ("max_history", True, TypeError),
        ("mode", "dense", ValueError),
        ("constraint", "doubly_stochastic", ValueError),
        ("init", "zeros", ValueError),
        ("epsilon", 1.0, ValueError),
        ("epsilon", -0.1, ValueError),
        ("epsilon", float("nan"), ValueError),
        ("temperature", 0.0, ValueError),
        ("temperature", float("inf"), ValueError),
        ("prune_threshold", 1.5, ValueError),
        ("use_gating", "yes", TypeError),
    ],
)
def test_names_the_option_and_the_value_that_are_wrong(name, value, kind):
    with pytest.raises(kind, match=f"{name} must.*{value!r}"):
        MHCConfig(**{name: value})


def test_serves_as_a_static_argument():
    traced = []

    @partial(jax.jit, static_argnums=0)
    def scaled(config, x):
        traced.append(config)
        return x / config.temperature

    assert scaled(MHCConfig(temperature=2.0), 1.0) == scaled(MHCConfig(temperature=2.0), 1.0) == 0.5
    assert len(traced) == 1
