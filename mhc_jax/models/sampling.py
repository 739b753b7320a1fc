"""Drawing the next tokens from a decoder, one after another, in one compiled program."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key


def check_sampling(steps: int, temperature: float, top_k: int | None, key: Any, vocabulary: int) -> None:
    """A ValueError if one of these is out of its range."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be in 1..{vocabulary}, got {top_k}")
    if temperature > 0 and key is None:
        raise ValueError("key must be given to draw tokens, which temperature above 0 asks for")


@partial(jax.jit, static_argnames=("graphdef", "steps", "top_k", "greedy"))
def generate(
    graphdef: nnx.GraphDef,
    state: Any,
    tokens: Int[Array, "B T"],
    key: Key[Array, ""] | None,
    temperature: float | Array,
    *,
    steps: int,
    top_k: int | None,
    greedy: bool,
) -> Int[Array, "B T+{steps}"]:
    """As `Decoder.generate`, of a decoder that `nnx.split` took apart."""
    model: Any = nnx.merge(graphdef, state)
    cache = model.init_cache(len(tokens), tokens.shape[1] + steps)

    def draw(logits: Array, step: Array | int) -> Array:
        if greedy or key is None:
            return jnp.argmax(logits, axis=-1)
        return sample(logits / temperature, top_k, jax.random.fold_in(key, step))

    def advance(carry: tuple[Any, Array], step: Array) -> tuple[tuple[Any, Array], Array]:
        cache, latest = carry
        logits, cache = model(latest[:, None], cache)
        following = draw(logits[:, -1], step).astype(tokens.dtype)
        return (cache, following), latest

    hidden, cache = model.hidden(tokens, cache)
    latest = draw(model.logits(hidden[:, -1:])[:, 0], 0).astype(tokens.dtype)
    (_, last), drawn = jax.lax.scan(advance, (cache, latest), jnp.arange(1, steps))
    return jnp.concatenate([tokens, drawn.T, last[:, None]], axis=1)


def sample(logits: Float[Array, "B V"], top_k: int | None, key: Key[Array, ""]) -> Int[Array, " B"]:
    """One token of each row, out of its `top_k` likeliest; None is all."""
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
