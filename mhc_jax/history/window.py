"""The window of past states as an immutable value, to be carried through a scan or from layer to layer."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

State = Any
"""A pytree of floating-point arrays."""


def empty_slots(x: State, slots: int) -> State:
    """Zeros for so many states, which on a mesh are split as those of x, and vary over the same axes."""

    def of_leaf(leaf: Array) -> Array:
        zero = jnp.where(False, leaf, jnp.zeros((), leaf.dtype))
        return jnp.broadcast_to(zero, (slots, *leaf.shape))

    return jax.tree.map(of_leaf, x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The last ``max_history`` states, stacked on a leading axis, oldest first and the latest last.

    A pytree of fixed shape: jit, vmap, scan and checkpoint it like any array. Rows that no state has reached yet
    are zero and come first; ``count`` tells how many rows at the end are live.

    Attributes:
        window: Like one state, each leaf with a leading axis of length ``max_history``.
        count: Number of live states, an int32 scalar.
    """

    window: State
    count: Int[Array, ""] | Any  # jax.vmap and jax.tree.map make histories of other things, too

    @classmethod
    def create(cls, x: State, max_history: int) -> "History":
        """A history that holds ``x_0 = x`` alone.

        Raises:
            ValueError: If ``max_history`` is less than 1.
        """
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1, got {max_history!r}")
        empty = empty_slots(x, max_history - 1)
        window = jax.tree.map(lambda rows, leaf: jnp.concatenate([rows, leaf[None]]), empty, x)
        return cls(window, jnp.int32(1))

    @property
    def max_history(self) -> int:
        """Window size H."""
        return jax.tree.leaves(self.window)[0].shape[0]

    def push(self, x: State) -> "History":
        """This history with ``x`` as its latest state; the oldest one drops out of a full window.

        Raises:
            ValueError: If ``x`` differs from the states held in structure or shape.
        """
        held = jax.tree.map(lambda leaf: leaf.shape[1:], self.window)
        given = jax.tree.map(jnp.shape, x)
        if held != given:
            raise ValueError(f"x must have the shape of the states held, {held}, got {given}")
        window = jax.tree.map(
            lambda rows, leaf: jnp.concatenate([rows[1:], leaf[None].astype(rows.dtype)]), self.window, x
        )
        return History(window, lax.min(self.count + 1, jnp.int32(self.max_history)))
