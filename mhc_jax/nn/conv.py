"""Convolutions with history mixing: the one layer, and what it shares with the blocks of a ResNet."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax.history.config import DEFAULTS, MHCConfig
from mhc_jax.kernels.choice import Implementation
from mhc_jax.nn.skip import MHCSkip
from mhc_jax.options import resolve

Image = Float[Array, "B *spatial C"]
Output = Float[Array, "B *out_spatial out_C"]


def fit(states: Sequence[Image], project: Callable[[Image], Output] | None) -> list[Output]:
    """The window as the output of a layer sees it: itself, or all of it mapped to the new shape in one go."""
    if project is None:
        return list(states)
    return jnp.split(project(jnp.concatenate(states)), len(states))


class MHCConv(nnx.Module):
    """A convolution whose output is added to a mix of past states, channels last.

        x_{l+1} = conv(x_l) + g * sum_k alpha_k P x_k

    P is the identity, or a convolution of kernel size 1 where the layer changes width or resolution.

    Args:
        in_features, out_features, kernel_size, strides, padding, use_bias: as `nnx.Conv`; kernel_size is a sequence
            with one entry for each spatial axis.
        max_history: window H, 4 by default.
        config: all options in one value; keywords, the fields of `MHCConfig`, change single ones.
        implementation: as of `mhc_jax.history.mix`.
        rngs: for the parameters, and for the noise of `stochastic`.

    Attributes:
        conv: the `nnx.Conv`.
        skip: the `MHCSkip`.
        projection: P, or None.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import MHCConv
        >>> rngs = nnx.Rngs(0)
        >>> first, second = MHCConv(3, 8, (3, 3), rngs=rngs), MHCConv(8, 8, (3, 3), rngs=rngs)
        >>> x = jnp.ones((2, 16, 16, 3))
        >>> first(x).shape
        (2, 16, 16, 8)
        >>> states = second.advance(first.advance((x,)))         # second mixes x, projected by first, and first(x)
        >>> len(states), states[-1].shape
        (3, (2, 16, 16, 8))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int = 1,
        max_history: int | None = None,
        *,
        padding: str | int = "SAME",
        use_bias: bool = True,
        config: MHCConfig | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        config = resolve(DEFAULTS, config, max_history=max_history, **options)
        self.conv = nnx.Conv(
            in_features, out_features, kernel_size, strides, padding=padding, use_bias=use_bias, rngs=rngs
        )
        ones = (1,) * len(kernel_size)
        self.projection = (
            nnx.Conv(in_features, out_features, ones, strides, use_bias=False, rngs=rngs)
            if in_features != out_features or strides != 1
            else None
        )
        self.skip = MHCSkip(config=config, implementation=implementation, rngs=rngs)

    def __call__(self, x: Image) -> Output:
        """The layer alone: the window holds `x` only."""
        return self.advance((x,))[-1]

    def advance(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        """The layer in a model: past states, oldest first, the input last -> the same with the output.

        At most `max_history + 1` states come back, all of the output's shape.

        Raises:
            ValueError: a state has not the shape of the output and there is no projection, or it does not fit.
        """
        window = fit(states[-self.skip.config.max_history :], self.projection)
        return (*window, self.skip(self.conv(states[-1]), window))
