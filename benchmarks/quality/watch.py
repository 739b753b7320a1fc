"""What connections do while a network trains: gains, movement of the maps, ranks of the streams, patterns."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax.monitoring.figures import composite_gain, window_matrices
from mhc_jax.nn import StreamStack
from mhc_jax.streams import Maps, expand, maps


def passed(model: Any, tokens: Array) -> tuple[Maps, Float[Array, "branches tokens n C"]]:
    """The maps of every branch in order and of every token, and the streams that they are of."""
    graphdef, params = nnx.split(model.stack.layers)

    def step(wide: Array, params: Any) -> tuple[Array, Any]:
        layer = nnx.merge(graphdef, params)
        found = []
        for connection, branch in ((layer.attn_hc, layer.attend), (layer.ffn_hc, layer.transform)):
            found.append((maps(connection.params(), wide, connection.config), wide))
            wide = connection.around(branch, wide)
        return wide, jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    found = jax.lax.scan(step, expand(model.embed_tokens(tokens), model.connection.streams), params)[1]
    flat: Any = jax.tree.map(lambda leaf: leaf.reshape(-1, tokens.size, *leaf.shape[4:]), found)
    return flat


def gains(model: Any, tokens: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The composite gain, forward or backward, whichever is larger: its mean and its largest over the tokens."""
    if isinstance(model.stack, StreamStack):
        forward, backward = jax.vmap(composite_gain, in_axes=1)(passed(model, tokens)[0].res)
    else:
        forward, backward = composite_gain(window_matrices(model.stack.mixing_weights(gated=True)))
    gain = jnp.maximum(forward, backward)
    return gain.mean(), gain.max()


def learned(before: Any, after: Any, tokens: Array) -> dict[str, Any]:
    """What training did to the connection of a model."""
    if not isinstance(after.stack, StreamStack):
        return {"weights": after.stack.mixing_weights(gated=True)}
    (old, _), (new, streams) = passed(before, tokens), passed(after, tokens)
    moved = {f"H_{part}": abs(one - other).mean() for part, one, other in zip(Maps._fields, old, new, strict=True)}
    identity = jnp.eye(streams.shape[-2])
    return {
        "moved": moved,
        "from identity": abs(new.res - identity).mean(),
        "rank": rank(streams).mean(-1),
        "similarity": similarity(streams).mean(-1),
        "patterns": {f"H_{part}": one.mean(1) for part, one in new._asdict().items()},
    }


def rank(streams: Float[Array, "*tokens n C"]) -> Float[Array, "*tokens"]:
    """The effective rank of n streams, 1 if they are equal up to a factor, n if orthogonal and of one size.

    exp of the entropy of the shares that the squared singular values have in their sum.
    """
    squares = jnp.linalg.eigvalsh(jnp.einsum("...ic,...jc->...ij", streams, streams)).clip(0)
    shares = squares / squares.sum(-1, keepdims=True)
    return jnp.exp(-jax.scipy.special.xlogy(shares, shares).sum(-1))


def similarity(streams: Float[Array, "*tokens n C"]) -> Float[Array, "*tokens"]:
    """The mean cosine between two of the streams."""
    unit = streams / jnp.linalg.norm(streams, axis=-1, keepdims=True)
    n = streams.shape[-2]
    return (jnp.square(unit.sum(-2)).sum(-1) - n) / (n * (n - 1))
