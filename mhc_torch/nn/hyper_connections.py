"""HyperConnections: n residual streams around a branch, as `mhc_torch.streams` defines them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.following import full_precision
from mhc_torch.monitoring.connection import entropy, shares, whole
from mhc_torch.options import resolve
from mhc_torch.streams import (
    Maps,
    StreamConfig,
    check_streams,
    collapse,
    expand,
    initial_bias,
    maps,
    normalized_logits,
    reduce,
    write,
)
from mhc_torch.streams.config import DEFAULTS


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


class HyperConnections(nn.Module):
    """X -> H_res X + H_post^T branch(H_pre X) on streams X of shape (..., n, width).

    Wraps any branch that keeps the shape and dtype of its input. Between networks of one stream and these layers,
    `expand` once before the first and `reduce` (or a `StreamHead`) once after the last. A new network of these layers
    computes what the plain residual network x + branch(x) does.

    Args:
        branch: the wrapped module; further arguments of the call reach it. None for a layer that keeps its branch under
            another name, and gives it to `around`.
        width: features C of one stream.
        config: all options in one value; keywords, the fields of `StreamConfig`, change single ones.
        layer_index: which wrapped branch of the network this is, counted from 0: sets the stream it reads most.

    Attributes:
        phi: (n * width, m) parameter, m = config.logits columns: those of H_pre, H_post, H_res. None if not dynamic.
        alpha: (3,) parameter, the gates of H_pre, H_post, H_res; starts at 0.01. None if not dynamic.
        bias: (m,) parameter.

    Raises:
        TypeError, ValueError: as StreamConfig; width is below 1.
    """

    def __init__(
        self,
        branch: nn.Module | None,
        width: int,
        *,
        config: StreamConfig | None = None,
        layer_index: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_width(width)
        self.config = resolve(DEFAULTS, config, **options)
        self.layer_index = layer_index
        self.branch = branch
        dynamic = self.config.dynamic
        self.phi = nn.Parameter(torch.empty(self.config.streams * width, self.config.logits)) if dynamic else None
        self.alpha = nn.Parameter(torch.empty(3)) if dynamic else None
        self.bias = nn.Parameter(torch.empty(self.config.logits))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.phi is not None and self.alpha is not None:
                self.phi.zero_()
                self.alpha.fill_(0.01)
            self.bias.copy_(initial_bias(self.config, self.layer_index))

    def forward(self, streams: Float[Tensor, "*tokens n C"], *args: Any, **kwargs: Any) -> Float[Tensor, "*tokens n C"]:
        if self.branch is None:
            raise ValueError("branch is None: call around(branch, streams) instead")
        return self.around(self.branch, streams, *args, **kwargs)

    def around(
        self, branch: Callable[..., Tensor], streams: Float[Tensor, "*tokens n C"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*tokens n C"]:
        """The call, with a branch that is held elsewhere."""
        pre, post, res = maps(self.phi, self.alpha, self.bias, streams, self.config)
        return write(streams, branch(collapse(pre, streams), *args, **kwargs), post, res)

    def resting_maps(self) -> Maps:
        """The maps of the bias alone, around which those of the tokens lie: (n,), (n,) and (n, n)."""
        bias = whole(self.bias)
        return maps(None, None, bias, bias.new_zeros(self.config.streams, 1), self.config)

    def weight_rows(self) -> dict[str, Tensor]:
        """H_pre, H_post and the rows of H_res at rest, for the dashboard."""
        pre, post, res = self.resting_maps()
        return {"pre": pre, "post": post} | {f"res.{i}": row for i, row in enumerate(res)}

    def row_figures(self) -> dict[str, dict[str, float]]:
        """How far H_res is from the identity, and how evenly each new stream mixes the old ones."""
        res = self.resting_maps().res
        distance = (res - torch.eye(len(res), device=res.device)).abs().max().item()
        entropies = {f"res.{i}": {"entropy": value} for i, value in enumerate(entropy(shares(res)).tolist())}
        return {"": {"identity_distance": distance}} | entropies

    def gradient_groups(self) -> dict[str, Iterable[nn.Parameter]]:
        """The parameters of the maps, and those of the branch, if it is held here."""
        branch = {} if self.branch is None else {"grad_norm": self.branch.parameters()}
        return {"maps_grad_norm": self.parameters(recurse=False), **branch}

    def mixed_states(self, streams: Tensor, *_: Any, **__: Any) -> list[Tensor]:
        """The states that a call mixes."""
        return [streams]

    def extra_repr(self) -> str:
        return f"config={self.config}"


class StreamHead(nn.Module):
    """Learned reduction of n streams by a map like H_pre, as DeepSeek-V4 ends (`DeepseekV4HyperHead`).

    Starts as the mean of the streams.

    Args:
        width: features C of one stream.
        config: all options in one value; keywords, the fields of `StreamConfig`, change single ones.

    Attributes:
        phi: (n * width, n) parameter.
        alpha: (1,) parameter.
        bias: (n,) parameter.

    Raises:
        TypeError, ValueError: as StreamConfig; width is below 1.
    """

    def __init__(self, width: int, *, config: StreamConfig | None = None, **options: Any) -> None:
        super().__init__()
        _check_width(width)
        self.config = resolve(DEFAULTS, config, **options)
        n = self.config.streams
        self.phi = nn.Parameter(torch.zeros(n * width, n))
        self.alpha = nn.Parameter(torch.full((1,), 0.01))
        self.bias = nn.Parameter(torch.full((n,), 16.0 if n == 1 else -math.log(n - 1)))

    def forward(self, streams: Float[Tensor, "*tokens n C"]) -> Float[Tensor, "*tokens C"]:
        check_streams(self.phi, streams, self.config, self.config.streams)
        with full_precision(streams):
            dynamic = normalized_logits(streams, self.phi, self.config.norm_epsilon)
            pre = torch.sigmoid(self.alpha * dynamic + self.bias) + self.config.epsilon
        return collapse(pre, streams)


class StreamStack(nn.Module):
    """A network of n streams: expands its input, runs layers of `HyperConnections` in turn, and takes the mean.

    Args:
        layers: map streams to streams.
        streams: number n of streams, 4 by default.
        config: of the layers, in place of `streams`.

    Raises:
        TypeError, ValueError: as StreamConfig.
    """

    def __init__(
        self, layers: Iterable[nn.Module], streams: int | None = None, *, config: StreamConfig | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.streams = resolve(DEFAULTS, config, streams=streams).streams

    def residual_maps(self) -> Float[Tensor, "L n n"]:
        """H_res at rest of every branch in turn; float64."""
        branches = [module for module in self.layers.modules() if isinstance(module, HyperConnections)]
        maps = [branch.resting_maps().res.double() for branch in branches]
        return torch.stack(maps) if maps else torch.empty(0, self.streams, self.streams, dtype=torch.float64)

    def forward(self, x: Float[Tensor, "*tokens C"]) -> Float[Tensor, "*tokens C"]:
        wide = expand(x, self.streams)
        for layer in self.layers:
            wide = layer(wide)
        return reduce(wide)
