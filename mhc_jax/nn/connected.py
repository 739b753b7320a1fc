"""How the branches of a retrofitted model are connected: by streams, or by a window of its history.

Between its blocks such a model carries states side by side, (..., n, C): n streams, or the last n states. A block
computes `h = h + branch(h)` as it did. Its branch reads one state out of them, and what it puts out is turned into
what the block has to add to all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from mhc_jax import streams as functional
from mhc_jax.history import MHCConfig, mixing_weights
from mhc_jax.monitoring.connection import Shown, show_history
from mhc_jax.monitoring.figures import history_figures
from mhc_jax.nn.hyper_connections import ConnectionMaps, show_streams, stream_figures
from mhc_jax.nn.merged import stacked
from mhc_jax.nn.parameters import ConnectionParam, Place
from mhc_jax.nn.skip import MHCSkip
from mhc_jax.streams import StreamConfig
from mhc_jax.streams.connect import fitted

States = Float[Array, "*tokens n C"]
State = Float[Array, "*tokens C"]


@runtime_checkable
class Kind(Protocol):
    """A way to connect branches, with its options: a hashable value."""

    @property
    def states(self) -> int:
        """How many states stand side by side."""

    def branch(self, width: int, index: int | Array, dtype: Any) -> Any:
        """The connection of the branch that is number `index` of its stack.

        A call with the states gives what the branch reads, and what `added(states, output, ...)` takes as well. Its
        parameters called `tells` tell whether it has learned: as they start, the model keeps its function.
        """

    def expand(self, state: State) -> States:
        """What stands in the place of the first state."""

    def reduce(self, states: States) -> State:
        """What the network goes on with after its last block."""

    def figures(self, branches: "BlockConnections", grads: nnx.State) -> dict[str, Array]:
        """What `diagnose` reports of the branches of blocks, whose variables have a leading axis of depth."""

    def shown(self, figures: Mapping[str, np.ndarray], names: list[str]) -> Shown:
        """What the dashboard shows of these figures."""


class BlockConnections(nnx.Module):
    """The connections of the branches of one block, under the names of these; of a stacked block, of all its layers.

    Args:
        kind: how they are connected.
        branches: the names, in the order of the sums.
        width: features C of a state.
        dtype: of the parameters.
        first: the number of the first branch in its stack.
        depth: how many layers a stacked block has; None if this is one block.
        layer: which of these layers this is; may be traced.
    """

    reports_alone = True

    def __init__(
        self,
        kind: Kind,
        branches: tuple[str, ...],
        width: int,
        dtype: Any,
        first: int,
        depth: int | None,
        layer: int | Array = 0,
    ) -> None:
        self.kind, self.branches = kind, branches
        self.width, self.dtype = width, jnp.dtype(dtype)
        self.first, self.depth = first, depth
        for place, name in enumerate(branches):
            setattr(self, name, kind.branch(width, first + layer * len(branches) + place, dtype))

    def learned(self) -> list[str]:
        """The branches whose sums no longer are those that the model was retrofitted with."""
        new = connect(self.kind, self.branches, self.width, self.dtype, self.first, self.depth)

        def moved(name: str) -> bool:
            ours, theirs = getattr(self, name), getattr(new, name)
            leaves = [(getattr(ours, leaf), getattr(theirs, leaf)) for leaf in ours.tells]
            return any(bool((one[...] != other[...]).any()) for one, other in leaves if one is not None)

        return [name for name in self.branches if moved(name)]

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        if self.depth is not None:
            return self.kind.figures(self, grads)
        graph, state = nnx.split(self)
        single = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[None], state))
        return self.kind.figures(single, jax.tree.map(lambda leaf: leaf[None], grads))

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        layers = [""] if self.depth is None else [f"{layer}." for layer in range(self.depth)]
        return self.kind.shown(figures, [layer + name for layer in layers for name in self.branches])


def connect(
    kind: Kind, branches: tuple[str, ...], width: int, dtype: Any, first: int, depth: int | None
) -> BlockConnections:
    """New connections of a block, or of all layers of a stacked one; arguments as `BlockConnections`."""
    if depth is None:
        return BlockConnections(kind, branches, width, dtype, first, depth)
    made: BlockConnections = stacked(
        lambda layer: BlockConnections(kind, branches, width, dtype, first, depth, layer), depth, jnp.arange(depth)
    )
    return made


# Streams --------------------------------------------------------------------------------------------------------------


class BranchMaps(ConnectionMaps):
    """The maps of a branch whose modules stand elsewhere in the block."""

    tells = ("phi", "bias")

    def __call__(self, streams: States) -> tuple[State, Array, Array | None]:
        """What the branch reads, and H_post and H_res, as `streams.read`."""
        return functional.read(self.params(), streams, self.config, implementation=self.implementation)

    def added(self, streams: States, output: State, post: Array, res: Array | None) -> States:
        """(H_res - 1) X + H_post^T y: what the block adds to the streams X in place of the output y."""
        if res is None:
            output = fitted(output, streams.dtype).astype(post.dtype)
            return (post[..., None] * output[..., None, :]).astype(streams.dtype)
        mixing = res - jnp.eye(self.config.streams, dtype=res.dtype)
        return functional.write(streams, output, post, mixing, implementation=self.implementation)


@dataclass(frozen=True)
class AroundStreams:
    """Parallel streams: arXiv 2512.24880, equation 3."""

    config: StreamConfig

    @property
    def states(self) -> int:
        return self.config.streams

    def branch(self, width: int, index: int | Array, dtype: Any) -> BranchMaps:
        return BranchMaps(width, config=self.config, layer_index=index, param_dtype=dtype)

    def expand(self, state: State) -> States:
        return functional.expand(state, self.config.streams)

    def reduce(self, states: States) -> State:
        return functional.reduce(states)

    def figures(self, branches: BlockConnections, grads: nnx.State) -> dict[str, Array]:
        figures = stream_figures(branches, grads)
        del figures["grad_norm"]  # the branches are held elsewhere
        return figures

    def shown(self, figures: Mapping[str, np.ndarray], names: list[str]) -> Shown:
        return show_streams(figures, names)


# History --------------------------------------------------------------------------------------------------------------


class BranchHistory(MHCSkip):
    """The skip of a branch in a block that adds its input itself: `x + y + gain * sum_k alpha_k x_k`.

    Attributes:
        gain: (1,) parameter, which starts at 0, so that the model starts as the function it was (ReZero, arXiv
            2003.04887); gradients reach the logits as soon as it has moved.
        place: the number of the branch, from 0: how many states there are before it.
    """

    tells = ("gain",)

    def __init__(self, config: MHCConfig, index: int | Array, dtype: Any) -> None:
        super().__init__(config=config)
        self.mixing_logits = ConnectionParam(self.mixing_logits[...].astype(dtype))
        self.gain = ConnectionParam(jnp.zeros(1, dtype))
        self.place = Place(jnp.asarray(index, dtype))

    def __call__(self, window: States) -> tuple[State]:  # type: ignore[override]
        """What the branch reads: the latest state."""
        return (window[..., -1, :],)

    def recorded(self, window: States, *_: Any) -> Any:
        """What a call depends on."""
        return (window,)

    def live_weights(self) -> Float[Array, "*layers H"]:
        """alpha, the latest state last, 0 where there is none yet; with a leading axis in a stacked block."""
        live = jnp.minimum(self.place[...].astype(int) + 1, self.config.max_history)
        return mixing_weights(self.mixing_logits[...], self.config, live=live)

    def added(self, window: States, output: State) -> States:
        """What the block adds to the window in place of the output: the next window, but for this one."""
        wide = jnp.promote_types(window.dtype, jnp.float32)
        states = window.astype(wide)
        weights = self.gain[...].astype(wide) * self.live_weights().astype(wide)
        past = lax.stop_gradient(states) if self.config.detach_history else states
        mixed = jnp.einsum("k,...kc->...c", weights, past)
        latest = states[..., -1, :] + fitted(output, window.dtype).astype(wide) + mixed
        following = jnp.concatenate([states[..., 1:, :], latest[..., None, :]], -2)
        return (following - states).astype(window.dtype)


@dataclass(frozen=True)
class AroundHistory:
    """The last states of the network, mixed into each sum beside the latest one."""

    config: MHCConfig

    @property
    def states(self) -> int:
        return self.config.max_history

    def branch(self, width: int, index: int | Array, dtype: Any) -> BranchHistory:
        return BranchHistory(self.config, index, dtype)

    def expand(self, state: State) -> States:
        # States that do not exist yet have no weight.
        return functional.expand(state, self.config.max_history)

    def reduce(self, states: States) -> State:
        return states[..., -1, :]

    def figures(self, branches: BlockConnections, grads: nnx.State) -> dict[str, Array]:
        skips = [getattr(branches, name) for name in branches.branches]
        weights = [jax.vmap(lambda skip: skip.live_weights())(skip) for skip in skips]
        gated = [
            skip.gain[...] * alpha + jnp.eye(alpha.shape[-1])[-1] for skip, alpha in zip(skips, weights, strict=True)
        ]
        norms = [jax.vmap(optax.tree.norm)(grads[name]["mixing_logits"]) for name in branches.branches]
        merged = (jnp.stack(rows, 1).reshape(-1, *rows[0].shape[1:]) for rows in (weights, gated, norms))
        weights_of_all, gated_of_all, norms_of_all = merged
        return history_figures(weights_of_all, gated_of_all) | {"logits_grad_norm": norms_of_all}

    def shown(self, figures: Mapping[str, np.ndarray], names: list[str]) -> Shown:
        live = np.count_nonzero(figures["weights"], axis=-1)
        return show_history(figures, dict(zip(names, map(int, live), strict=True)), container=True)
