"""HyperConnections: n residual streams around a branch, as `mhc_torch.streams` defines them."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch import _private
from mhc_torch.following import full_precision
from mhc_torch.kernels.choice import Implementation, check_implementation
from mhc_torch.monitoring.connection import entropy, shares, whole
from mhc_torch.options import resolve
from mhc_torch.streams import (
    Connected,
    Maps,
    StreamConfig,
    apply_branches,
    check_streams,
    collapse,
    expand,
    initial_bias,
    maps,
    normalized_logits,
    read,
    reduce,
    write,
)
from mhc_torch.streams.config import DEFAULTS
from mhc_torch.streams.connect import check_single_pass
from mhc_torch.streams.constraints import CONSTRAINTS
from mhc_torch.streams.conventions import Parameters, check_assigned, convention_named
from mhc_torch.streams.depth import check_block_length
from mhc_torch.streams.maps import read_weights
from mhc_torch.streams.starts import STARTS


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


class ConnectionMaps(nn.Module):
    """The three maps of one branch: their parameters, and what these tell of themselves.

    Args:
        width: features C of one stream.
        config: all options of the maps.
        layer_index: which branch of the network this is, counted from 0.
        branch_names: of the modules beside this one that make up the branch, for the norm of its gradient.
        implementation: as of `mhc_torch.streams.read` and `write`.
        **factory: dtype and device of the parameters.
    """

    phi: nn.Parameter | None
    alpha: nn.Parameter | None
    bias: nn.Parameter

    def __init__(
        self,
        width: int,
        config: StreamConfig,
        layer_index: int,
        branch_names: tuple[str, ...] = (),
        implementation: Implementation = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        _check_width(width)
        check_implementation(implementation)
        self.implementation = implementation
        self.config = config
        self.layer_index = layer_index
        self.branch_names = branch_names
        shapes = {"phi": (config.streams * width, config.logits), "alpha": (3,), "bias": (config.logits,)}
        for name, shape in shapes.items():
            exists = config.dynamic or name == "bias"
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)) if exists else None)
        self.reset_parameters()

    def start_values(self) -> dict[str, Tensor | float]:
        """What each parameter starts as, by name."""
        bias = initial_bias(self.config, self.layer_index)
        alpha = STARTS[self.config.start].gates
        return {"phi": 0.0, "alpha": alpha, "bias": bias} if self.config.dynamic else {"bias": bias}

    @torch.no_grad()
    def reset_parameters(self, which: Callable[[nn.Parameter], bool] = lambda _: True) -> None:
        """Start anew, with those of the parameters that `which` is true of."""
        for name, value in self.start_values().items():
            if which(parameter := self.get_parameter(name)):
                parameter.copy_(torch.as_tensor(value))

    def load_from(self, convention: str, tensors: Mapping[str, Any]) -> None:
        """Take the parameters of a public model's branch, by the names that they have there.

        Args:
            convention: a name in `mhc_torch.streams.CONVENTIONS`, whose options `config` has.
            tensors: tensors, or what `np.asarray` makes arrays of.

        Raises:
            ValueError: there is no such convention, or `config` is of another; a tensor is missing, not expected, or
                has the shape of another number of streams or width. Nothing has changed then.
        """
        _assign(self, convention_named(convention).load(_arrays(tensors), self.config))

    def store_as(self, convention: str) -> dict[str, np.ndarray]:
        """The parameters as a public model has them, by the names that they have there.

        Raises:
            ValueError: there is no such convention, `config` is of another, or it cannot hold the parameters.
        """
        return convention_named(convention).store(_own(self), self.config)

    def token_maps(self, streams: Float[Tensor, "*tokens n C"]) -> Maps:
        """H_pre, H_post and H_res of every token."""
        return maps(self.phi, self.alpha, self.bias, streams, self.config)

    def around(
        self, branch: Callable[..., Tensor], streams: Float[Tensor, "*tokens n C"], *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*tokens n C"]:
        """H_res X + H_post^T branch(H_pre X) of the streams X. Further arguments reach the branch."""
        x, post, res = self.read(streams)
        return write(streams, branch(x, *args, **kwargs), post, res, implementation=self.implementation)

    def read(
        self, streams: Float[Tensor, "*tokens n C"]
    ) -> tuple[Float[Tensor, "*tokens C"], Float[Tensor, "*tokens n"], Float[Tensor, "*tokens n n"] | None]:
        """What the branch reads, and H_post and H_res; None is an H_res that mixes nothing."""
        return read(self.phi, self.alpha, self.bias, streams, self.config, implementation=self.implementation)

    def connecting(self, branch: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Connected:
        """What `around` does, for `streams.apply_branches`."""
        parameters = self.phi, self.alpha, self.bias
        return Connected(lambda x: branch(x, *args, **kwargs), *parameters, self.config, self.implementation)

    def single_pass(
        self,
        branch: Callable[..., Tensor],
        streams: Float[Tensor, "*tokens n C"],
        pre: Float[Tensor, "*tokens n"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "*tokens n C"], Float[Tensor, "*tokens n"]]:
        """As `around`, where `config.single_pass`: the branch reads by `pre`, the H_pre of the branch before.

        Returns:
            The streams, and H_pre for the branch after. `streams.first_read` is that of the first, `streams.collapse`
            by that of the last ends the network.

        Raises:
            ValueError: `config.single_pass` is not set.

        Source: DeepSeek-V4.1, as Megatron-LM has it under `mhc_single_pass`.
        """
        check_single_pass(self.config, True)
        following, post, res = self.token_maps(streams)
        mixing = res if CONSTRAINTS[self.config.constraint].mixes else None
        output = branch(collapse(pre, streams), *args, **kwargs)
        return write(streams, output, post, mixing, implementation=self.implementation), following

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
        """The parameters of the maps."""
        return {"maps_grad_norm": self.parameters(recurse=False)}

    def extra_repr(self) -> str:
        return f"config={self.config}"


class HyperConnections(ConnectionMaps):
    """X -> H_res X + H_post^T branch(H_pre X) on streams X of shape (..., n, width).

    Wraps any branch that keeps the shape and dtype of its input. Between networks of one stream and these layers,
    `expand` once before the first and `reduce` (or a `StreamHead`) once after the last. A new network of these layers
    computes what the plain residual network x + branch(x) does.

    Args:
        branch: the wrapped module; further arguments of the call reach it.
        width: features C of one stream.
        config: all options in one value; keywords, the fields of `StreamConfig`, change single ones.
        layer_index: which wrapped branch of the network this is, counted from 0: sets the stream it reads most.
        implementation: as of `mhc_torch.streams.read` and `write`.

    Attributes:
        phi: (n * width, m) parameter, m = config.logits columns: those of H_pre, H_post, H_res. None if not dynamic.
        alpha: (3,) parameter, the gates of H_pre, H_post, H_res; starts as `config.start` says. None if not dynamic.
        bias: (m,) parameter.

    Raises:
        TypeError, ValueError: as StreamConfig; width is below 1; there is no such implementation.
    """

    def __init__(
        self,
        branch: nn.Module,
        width: int,
        *,
        config: StreamConfig | None = None,
        layer_index: int = 0,
        implementation: Implementation = None,
        **options: Any,
    ) -> None:
        super().__init__(width, resolve(DEFAULTS, config, **options), layer_index, implementation=implementation)
        self.branch = branch

    def forward(self, streams: Float[Tensor, "*tokens n C"], *args: Any, **kwargs: Any) -> Float[Tensor, "*tokens n C"]:
        return self.around(self.branch, streams, *args, **kwargs)

    def connected(self, *args: Any, **kwargs: Any) -> list[Connected]:
        """The branches that a call with these further arguments is a chain of: its own."""
        return [self.connecting(self.branch, *args, **kwargs)]

    def mixed_states(self, streams: Tensor, *_: Any, **__: Any) -> list[Tensor]:
        """The states that a call mixes."""
        return [streams]

    def gradient_groups(self) -> dict[str, Iterable[nn.Parameter]]:
        """The parameters of the maps, and those of the branch."""
        return super().gradient_groups() | {"grad_norm": self.branch.parameters()}


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

    def load_from(self, convention: str, tensors: Mapping[str, Any]) -> None:
        """Take the parameters of a public model's head; as `HyperConnections.load_from`."""
        _assign(self, convention_named(convention).load(_arrays(tensors), self.config, head=True))

    def store_as(self, convention: str) -> dict[str, np.ndarray]:
        """The parameters as a public model's head has them; as `HyperConnections.store_as`."""
        return convention_named(convention).store(_own(self), self.config, head=True)

    def forward(self, streams: Float[Tensor, "*tokens n C"]) -> Float[Tensor, "*tokens C"]:
        check_streams(self.phi, streams, self.config, self.config.streams)
        with full_precision(streams):
            dynamic = normalized_logits(streams, self.phi, self.config)
            pre = read_weights(self.alpha * dynamic + self.bias, self.config)
        return collapse(pre, streams)


def _arrays(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _array(value) if isinstance(value, Tensor) else value for name, value in tensors.items()}


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16; float32 holds every one of them.
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _own(module: ConnectionMaps | StreamHead) -> Parameters:
    """What a convention stores; maps that are static have no convention, and are refused there."""
    leaves = module.phi, module.alpha, module.bias
    arrays: Any = (None if leaf is None else _array(whole(leaf)) for leaf in leaves)
    return Parameters(*arrays)


@torch.no_grad()
def _assign(module: ConnectionMaps | StreamHead, parameters: Parameters) -> None:
    check_assigned(_own(module), parameters)
    for name, values in parameters._asdict().items():
        module.get_parameter(name).copy_(torch.from_numpy(np.ascontiguousarray(values)))


@runtime_checkable
class Chained(Protocol):
    """A layer that is nothing but a chain of branches, each connected to the streams."""

    def connected(self, *args: Any, **kwargs: Any) -> list[Connected]:
        """The branches that a call with these further arguments is a chain of."""


class StreamStack(nn.Module):
    """A network of n streams: expands its input, runs layers of `HyperConnections` in turn, and takes the mean.

    Between two layers that are `Chained`, as `HyperConnections` are, the write of one and the read of the next are one
    `boundary`. Layers of any other kind are called, and so are those whose call is more than their forward: those with
    hooks, or of a subclass with a forward of its own.

    Args:
        layers: map streams to streams.
        streams: number n of streams, 4 by default.
        config: of the layers, in place of `streams`.
        block_length: of how many chained layers the streams are kept once for the backward pass; see
            `streams.apply_branches`.

    Raises:
        TypeError, ValueError: as StreamConfig; block_length is below 1.

    Example:
        >>> import torch
        >>> from mhc_torch import HyperConnections, StreamStack
        >>> stack = StreamStack(HyperConnections(torch.nn.Linear(8, 8), 8, layer_index=i) for i in range(12))
        >>> stack(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        streams: int | None = None,
        *,
        config: StreamConfig | None = None,
        block_length: int = 1,
    ) -> None:
        super().__init__()
        check_block_length(block_length)
        self.layers = nn.ModuleList(layers)
        self.streams = resolve(DEFAULTS, config, streams=streams).streams
        self.block_length = block_length

    def residual_maps(self) -> Float[Tensor, "L n n"]:
        """H_res at rest of every branch in turn; float64."""
        branches = [module for module in self.layers.modules() if isinstance(module, ConnectionMaps)]
        maps = [branch.resting_maps().res.double() for branch in branches]
        return torch.stack(maps) if maps else torch.empty(0, self.streams, self.streams, dtype=torch.float64)

    def forward(self, x: Float[Tensor, "*tokens C"], *args: Any, **kwargs: Any) -> Float[Tensor, "*tokens C"]:
        """The mean of the streams after the last layer. Further arguments reach every layer, the same for all."""
        return reduce(through(self.layers, expand(x, self.streams), *args, block_length=self.block_length, **kwargs))


def through(
    layers: Iterable[nn.Module],
    streams: Float[Tensor, "*tokens n C"],
    *args: Any,
    block_length: int,
    **kwargs: Any,
) -> Float[Tensor, "*tokens n C"]:
    """The streams after all layers, by boundaries where layers in turn are chains; the others are called."""
    chain: list[list[Connected]] = []
    for layer in layers:
        if _is_chain(type(layer)) and not _private.calls_more_than_forward(layer):
            chain.append(cast(Chained, layer).connected(*args, **kwargs))
            continue
        streams = apply_branches(chain, streams, block_length=block_length)
        chain = []
        streams = layer(streams, *args, **kwargs)
    return apply_branches(chain, streams, block_length=block_length)


def _is_chain(layer: type) -> bool:
    """Whether `connected` tells all that a call does: a subclass with a forward of its own has to tell that anew."""
    telling, calling = (
        next((kind for kind in layer.__mro__ if name in vars(kind)), None) for name in ("connected", "forward")
    )
    return telling is not None and telling is calling
