"""Keys and values of the tokens so far, so that the next one costs one token."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The keys and values of all layers, an immutable value of fixed size.

    Attributes:
        keys, values: (L, B, S, K, D), of which the first `length` positions are in use.
        length: an int32 scalar.
    """

    keys: Float[Array, "L B S K D"]
    values: Float[Array, "L B S K D"]
    length: Int[Array, ""]

    @classmethod
    def create(cls, depth: int, batch: int, size: int, heads: int, width: int, dtype: Any) -> "KVCache":
        """An empty one for `size` positions; a ValueError if that is below 1."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        empty = jnp.zeros((depth, batch, size, heads, width), dtype)
        return cls(empty, empty, jnp.int32(0))


class LayerCache:
    """What one layer sees of a cache while it runs: it adds its new keys and values, and gets all of them back."""

    def __init__(self, keys: Array, values: Array, length: Array, layer: Array) -> None:
        self.keys, self.values, self.length, self.layer = keys, values, length, layer

    def append(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]
    ) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K D"], Bool[Array, "1 T S"]]:
        """All keys and values of the layer, and which of them each of the new tokens sees."""
        zero = jnp.zeros_like(self.length)  # of its type, whatever that of a Python number is
        start = (self.layer.astype(self.length.dtype), zero, self.length, zero, zero)
        self.keys = jax.lax.dynamic_update_slice(self.keys, k[None].astype(self.keys.dtype), start)
        self.values = jax.lax.dynamic_update_slice(self.values, v[None].astype(self.values.dtype), start)
        every = (jax.lax.dynamic_index_in_dim(rows, self.layer, keepdims=False) for rows in (self.keys, self.values))
        seen = jnp.arange(self.keys.shape[2]) <= self.length + jnp.arange(k.shape[1])[:, None]
        return *every, seen[None]
