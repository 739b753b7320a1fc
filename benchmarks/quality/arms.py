"""The arms of the study: what is connected how, and what it costs."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.quality.protocol import HELD_OUT, Sizes, windows
from mhc_jax.history import MHCConfig
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.streams import StreamConfig


@dataclass(frozen=True)
class Arm:
    """One way to connect the same branches.

    Attributes:
        connection: as of `Decoder`.
        alpha: what the gates of the maps are set to; None leaves them as the start has them.
        maps_rate: what the learning rate of the connection's parameters is multiplied by.
        width, layers, steps: what the sizes of the study are multiplied by.
    """

    connection: Any = "residual"
    alpha: float | None = None
    maps_rate: float = 1.0
    width: float = 1.0
    layers: float = 1.0
    steps: float = 1.0

    def sized(self, sizes: Sizes) -> Sizes:
        """Whole heads of even width, whole layers, whole stretches."""

        def rounded(size: float, unit: int) -> int:
            return unit * round(size / unit)

        return replace(
            sizes,
            width=rounded(self.width * sizes.width, 2 * sizes.heads),
            layers=rounded(self.layers * sizes.layers, 1),
            steps=rounded(self.steps * sizes.steps, sizes.every),
        )


def _streams(constraint: str, start: str = "identity", n: int = 4, **options: Any) -> Arm:
    return Arm(StreamConfig(n, constraint, start=start), **options)


def _history(constraint: str, init: str) -> Arm:
    return Arm(MHCConfig(constraint=constraint, init=init))


# In the order in which they run: what is cut off at the end matters least.
FIRST = {
    "residual": Arm(),
    "mHC": _streams("sinkhorn"),
    "mHC, mixed": _streams("sinkhorn", "mixed"),
    "identity, mixed": _streams("identity", "mixed"),
    "residual, wider": Arm(width=7 / 6),
    "residual, longer": Arm(steps=1.7),
    "HC": _streams("none"),
    "mHC, alpha = 1": _streams("sinkhorn", alpha=1.0),
    "mHC, maps at 10 times the rate": _streams("sinkhorn", maps_rate=10.0),
    "HC, mixed": _streams("none", "mixed"),
    "history, uniform": _history("simplex", "uniform"),
}
FURTHER = {
    "identity": _streams("identity"),
    "history, mixed": _history("simplex", "mixed"),
    "residual, deeper": Arm(layers=1.25),
    "KromHC, mixed": _streams("kronecker", "mixed"),
    "mHC-lite, mixed": _streams("permutations", "mixed"),
    "history, residual": _history("simplex", "identity"),
    "history, sparse, uniform": _history("sparse", "uniform"),
    "history, sparse, residual": _history("sparse", "identity"),
}
FEWER = {
    "one stream with gates": _streams("identity", "mixed", 1),
    "mHC, n = 2": _streams("sinkhorn", n=2),
    "mHC, mixed, n = 2": _streams("sinkhorn", "mixed", 2),
    "identity, mixed, n = 2": _streams("identity", "mixed", 2),
    "HC, n = 2": _streams("none", n=2),
    "mHC, maps at 10 times the rate, n = 2": _streams("sinkhorn", n=2, maps_rate=10.0),
}
DEEP_ONLY = {"residual, 1.5 times as wide": Arm(width=1.5)}
ARMS = FIRST | FURTHER | FEWER | DEEP_ONLY
DEEP = ("residual", "HC", "mHC", "mHC, mixed", "history, uniform")
CONFIRMED = (
    "residual",
    "mHC",
    "residual, wider",
    "identity, mixed",
    "mHC, mixed",
    "HC",
    "residual, longer",
    "one stream with gates",
)
COMPARED = {
    "long": ("residual", "mHC, mixed", "identity, mixed", "residual, wider", "one stream with gates", "mHC", "HC"),
    "deep": (
        "residual",
        "one stream with gates",
        "residual, 1.5 times as wide",
        "mHC",
        "identity, mixed",
        "mHC, mixed",
        "history, uniform",
        "HC",
    ),
}


def network(arm: Arm, sizes: Sizes, seed: int) -> Decoder:
    """The decoder over bytes of sizes that are the arm's already."""
    config = DecoderConfig(
        256,
        sizes.width,
        mlp_features=8 * sizes.width // 3,
        depth=sizes.layers,
        num_heads=sizes.heads,
        tied=True,
    )
    model = Decoder(config, arm.connection, rngs=nnx.Rngs(seed))
    if arm.alpha is not None:
        layers: Any = model.stack.layers
        for maps in (layers.attn_hc, layers.ffn_hc):
            maps.alpha[...] = jnp.full_like(maps.alpha[...], arm.alpha)
    return model


def cost(arm: Arm, sizes: Sizes) -> dict[str, float]:
    """Parameters, and what XLA counts in one gradient, times the factor of the steps: computation, and bytes moved."""
    connection = arm.connection
    if isinstance(connection, StreamConfig):  # a start changes nothing in it, and is not compiled for
        connection = replace(connection, start="identity")
    if isinstance(connection, MHCConfig):
        connection = replace(connection, init="identity")
    found = _counted(connection, replace(arm.sized(sizes), steps=sizes.steps))
    return found | {name: arm.steps * found[name] for name in ("MFLOP", "MB")}


@cache
def _counted(connection: Any, sizes: Sizes) -> dict[str, float]:
    """Of the layers one after another, since XLA counts the body of a loop over layers once."""
    model: Any = network(Arm(connection), sizes, 0)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    model.stack = model.stack.unrolled()
    graphdef, params, *others = nnx.split(model, nnx.Param, ...)
    rest: Any = others[0]

    def gradient(params: Any, tokens: jax.Array) -> Any:
        return jax.grad(lambda params: nnx.merge(graphdef, params, rest).loss(tokens))(params)

    tokens = windows(HELD_OUT, 0, sizes.length, sizes.batch)
    found: Any = jax.jit(gradient).lower(params, tokens).compile().cost_analysis()
    return {"parameters": count, "MFLOP": found["flops"] / 1e6, "MB": found["bytes accessed"] / 1e6}
