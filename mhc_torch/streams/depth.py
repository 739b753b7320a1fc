"""Depth: the branches of many layers in turn, by boundaries, and which streams the backward pass keeps of them."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mhc_torch import _private
from mhc_torch.kernels.choice import Implementation
from mhc_torch.streams.boundary import boundary
from mhc_torch.streams.config import StreamConfig
from mhc_torch.streams.connect import fitted, read, write


class Connected(NamedTuple):
    """A branch and its connection to the streams: the parameters of its maps, their options, and as of `boundary`."""

    branch: Callable[[Tensor], Tensor]
    phi: Tensor | None
    alpha: Tensor | None
    bias: Tensor
    config: StreamConfig
    implementation: Implementation = None


def apply_branches(
    layers: Sequence[Sequence[Connected]], streams: Float[Tensor, "*tokens n C"], *, block_length: int = 1
) -> Float[Tensor, "*tokens n C"]:
    """The streams after the branches of all layers: a read, a boundary between every two of them, and a write.

    Args:
        layers: of each its branches, in their order. A branch keeps the shape of one stream.
        streams: before the first.
        block_length: of how many layers the streams are kept once for the backward pass. With 1 they are kept for every
            branch. With more, those inside a block are written again out of what its branches put out, which is
            kept: no branch runs twice. `optimal_block_length` needs the least memory. The last block may be shorter.
            Under torch.compile, for a norm other than "rms" and for a class of tensors of its own (DTensor), blocks are
            computed again as a whole, branches included. Transforms of torch.func keep what they need.

    Raises:
        ValueError: as `check_block_length` and `boundary`.
        TypeError: as `boundary`.

    Source: arXiv 2512.24880, section 4.3.2.

    Example:
        >>> import torch
        >>> from mhc_torch import HyperConnections
        >>> from mhc_torch.streams import apply_branches, expand, reduce
        >>> layers = [HyperConnections(torch.nn.Linear(8, 8), 8, layer_index=i) for i in range(6)]
        >>> wide = apply_branches([layer.connected() for layer in layers], expand(torch.ones(2, 8), 4), block_length=2)
        >>> reduce(wide).shape
        torch.Size([2, 8])
    """
    check_block_length(block_length)
    # Transforms of torch.func know neither hooks nor checkpoints.
    followed = _private.transforms_are_active() or _private.dual_numbers_exist()
    if block_length == 1 or not torch.is_grad_enabled() or followed:
        return _chain(_in_turn(layers), streams)
    for start in range(0, len(layers), block_length):
        branches = _in_turn(layers[start : start + block_length])
        plain = all(connected.phi is None or connected.config.norm == "rms" for connected in branches)
        if plain and not torch.compiler.is_compiling() and not _private.holds_tensors(streams):
            streams = _chain(branches, streams, _Block(streams))
        else:
            # A function of tensors alone, as a compiler wants it.
            streams = checkpoint(partial(_chain, branches), streams, use_reentrant=False)
    return streams


def check_block_length(block_length: int) -> None:
    """Raises a ValueError if it is below 1."""
    if block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")


def optimal_block_length(streams: int, depth: int) -> int:
    """The divisor of `depth` nearest to sqrt(n L / (n + 2)), where keeping the streams of L layers costs least.

    Source: arXiv 2512.24880, equation 20.

    Example:
        >>> from mhc_torch.streams import optimal_block_length
        >>> optimal_block_length(4, 24)
        4
    """
    best = math.sqrt(streams * depth / (streams + 2))
    return min((d for d in range(1, depth + 1) if depth % d == 0), key=lambda d: abs(d - best))


class _Block:
    """Streams in turn, of which the backward pass keeps the first; it writes the others again as it needs them."""

    def __init__(self, first: Tensor) -> None:
        self._first = first.detach()
        self._written: list[tuple[Tensor, Tensor, Tensor | None, Implementation]] = []
        self._again: dict[int, Tensor] = {}

    def keeping(self, latest: Tensor) -> AbstractContextManager[Any]:
        """Of what is saved for the backward pass inside, no streams are kept: `latest`, those after all writes, and new
        ones, those after one more.
        """
        index, pointer = len(self._written), latest.data_ptr()
        n, width = latest.shape[-2:]
        shape, dtype = (latest.numel() // max(1, n * width), n, width), latest.dtype

        def number(tensor: Tensor) -> int:
            """Which streams these are; 0 for what is kept, the first of the block and whatever else is saved."""
            if tensor.shape != shape or tensor.dtype != dtype:
                return 0
            if tensor.data_ptr() == pointer:
                return index
            return index + 1 if n != width else 0  # H_res may have the shape of n streams of width n

        def pack(tensor: Tensor) -> Any:
            # Of a result of the operation that saves it, the graph would be kept, and with it this hook.
            return number(tensor) or tensor.detach()

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._streams(kept).view(shape)

        return saved_tensors_hooks(pack, unpack)

    def wrote(self, output: Tensor, post: Tensor, res: Tensor | None, implementation: Implementation) -> None:
        """What `write` has been given. It is kept for the backward pass anyway, without its graph here."""
        numbers = output.detach(), post.detach(), None if res is None else res.detach()
        self._written.append((*numbers, implementation))

    @torch.no_grad()
    def _streams(self, index: int) -> Tensor:
        # The last are asked for first. Those before them are made on the way, and wait for their turn. Kernels ask for
        # the streams on both sides of a boundary.
        if index not in self._again:
            streams = self._first
            for number, (output, post, res, form) in enumerate(self._written[:index], 1):
                self._again[number] = streams = write(streams, output, post, res, implementation=form)
        self._again = {number: streams for number, streams in self._again.items() if number <= index + 1}
        return self._again[index]


def _in_turn(layers: Sequence[Sequence[Connected]]) -> list[Connected]:
    return [connected for layer in layers for connected in layer]


def _chain(branches: Sequence[Connected], streams: Tensor, block: _Block | None = None) -> Tensor:
    output = post = res = form = None
    for branch, phi, alpha, bias, config, form in branches:
        if output is None or post is None:
            x, post, res = read(phi, alpha, bias, streams, config, implementation=form)
        else:
            written = output, post, res, form
            with _keeping(block, streams):
                arguments = streams, output, post, res, config
                streams, x, post, res = boundary(phi, alpha, bias, *arguments, implementation=form)
            if block is not None:
                block.wrote(*written)
        output = fitted(branch(x), streams)
    if output is None or post is None:
        return streams
    with _keeping(block, streams):
        return write(streams, output, post, res, implementation=form)


def _keeping(block: _Block | None, latest: Tensor) -> AbstractContextManager[Any]:
    return nullcontext() if block is None else block.keeping(latest)
