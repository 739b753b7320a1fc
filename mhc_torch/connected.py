"""How the branches of a retrofitted model are connected: by streams, or by a window of its history.

Between its blocks such a model carries states side by side, (..., n, C): n streams, or the last n states. A block
computes `h = h + branch(h)` as it did. Its branch reads one state out of them, and what it puts out is turned into
what the block has to add to all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.history.config import MHCConfig
from mhc_torch.nn.hyper_connections import ConnectionMaps
from mhc_torch.nn.skip import MHCSkip
from mhc_torch.streams import StreamConfig, expand, reduce, write

States = Float[Tensor, "*tokens n C"]
State = Float[Tensor, "*tokens C"]


@runtime_checkable
class Kind(Protocol):
    """A way to connect branches, with its options."""

    @property
    def states(self) -> int:
        """How many states stand side by side."""

    def branch(self, width: int, index: int, **factory: Any) -> Any:
        """The connection of the branch that is number `index` of its stack.

        A call with the states gives what the branch reads, and what `added(states, output, ...)` takes as well.
        """

    def expand(self, state: State) -> States:
        """What stands in the place of the first state."""

    def reduce(self, states: States) -> State:
        """What the network goes on with after its last block."""


# Streams --------------------------------------------------------------------------------------------------------------


class BranchMaps(ConnectionMaps):
    """The maps of a branch whose modules stand elsewhere in the block."""

    def forward(self, streams: States) -> tuple[State, Tensor, Tensor | None]:
        """What the branch reads, and H_post and H_res; None is an H_res that mixes nothing."""
        return self.read(streams)

    def added(self, streams: States, output: State, post: Tensor, res: Tensor | None) -> States:
        """(H_res - 1) X + H_post^T y: what the block adds to the streams X in place of the output y."""
        if res is None:
            return (post[..., None] * output[..., None, :].to(post.dtype)).to(streams.dtype)
        return write(streams, output, post, res - torch.eye(self.config.streams, dtype=res.dtype, device=res.device))

    def mixed_states(self, streams: Tensor) -> list[Tensor]:
        """The states that a call mixes."""
        return [streams]

    def have_learned(self) -> bool:
        """Whether the maps are others than those that they started as, for some token."""
        start = self.start_values()
        return any(
            bool((self.get_parameter(name) != torch.as_tensor(start[name]).to(self.bias)).any())
            for name in start.keys() - {"alpha"}
        )


@dataclass(frozen=True)
class AroundStreams:
    """Parallel streams: arXiv 2512.24880, equation 3."""

    config: StreamConfig

    @property
    def states(self) -> int:
        return self.config.streams

    def branch(self, width: int, index: int, **factory: Any) -> BranchMaps:
        return BranchMaps(width, self.config, index, **factory)

    def expand(self, state: State) -> States:
        return expand(state, self.config.streams)

    def reduce(self, states: States) -> State:
        return reduce(states)


# History --------------------------------------------------------------------------------------------------------------


class BranchHistory(MHCSkip):
    """The skip of a branch in a block that adds its input itself: `x + y + gain * sum_k alpha_k x_k`.

    Args:
        config: the options of the history.
        index: the number of the branch, from 0: how many states there are before it.
        **factory: dtype and device of the parameters.

    Attributes:
        gain: (1,) parameter, which starts at 0, so that the model starts as the function it was (ReZero, arXiv
            2003.04887); gradients reach the logits as soon as it has moved.
    """

    def __init__(self, config: MHCConfig, index: int, **factory: Any) -> None:
        super().__init__(config=config)
        self.gain = nn.Parameter(torch.zeros(1))
        self.live = min(index + 1, config.max_history)
        self.to(**factory)

    def reset_parameters(self, which: Callable[[nn.Parameter], bool] = lambda _: True) -> None:
        """Start anew, with those of the parameters that `which` is true of."""
        kept = {name: p.detach().clone() for name, p in self.named_parameters(recurse=False) if not which(p)}
        super().reset_parameters()
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name in kept:
                    parameter.copy_(kept[name])
                elif name == "gain":
                    parameter.zero_()

    def forward(self, window: States) -> tuple[State]:  # type: ignore[override]
        """What the branch reads: the latest state."""
        return (window[..., -1, :],)

    def added(self, window: States, output: State) -> States:
        """What the block adds to the window in place of the output: the next window, but for this one."""
        states = window.to(torch.promote_types(window.dtype, torch.float32))
        past = states[..., -self.live :, :]
        past = past.detach() if self.config.detach_history else past
        weights = self.gain * self.coefficients(self.mixing_logits[-self.live :], None)
        mixed = (weights.to(states.dtype)[:, None] * past).sum(-2)
        latest = states[..., -1, :] + output.to(states.dtype) + mixed
        following = torch.cat([states[..., 1:, :], latest[..., None, :]], -2)
        return (following - states).to(window.dtype)

    def mixed_states(self, window: Tensor, *_: Any) -> list[Tensor]:
        """The states that a call mixes."""
        return list(window[..., -self.live :, :].unbind(-2))

    def recorded(self, window: Tensor, *_: Any) -> Any:
        """What a call depends on."""
        return (window,)

    def have_learned(self) -> bool:
        """Whether the block adds another history than the latest state."""
        return bool((self.gain != 0).any())


@dataclass(frozen=True)
class AroundHistory:
    """The last states of the network, mixed into each sum beside the latest one."""

    config: MHCConfig

    @property
    def states(self) -> int:
        return self.config.max_history

    def branch(self, width: int, index: int, **factory: Any) -> BranchHistory:
        return BranchHistory(self.config, index, **factory)

    def expand(self, state: State) -> States:
        # States that do not exist yet have no weight.
        return expand(state, self.config.max_history)

    def reduce(self, states: States) -> State:
        return states[..., -1, :]
