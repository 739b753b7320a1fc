"""HyperConnections: n residual streams around a branch, as `mhc_jax.streams` defines them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax import streams as functional
from mhc_jax.kernels.choice import check_implementation
from mhc_jax.monitoring.connection import Shown
from mhc_jax.monitoring.figures import composite_gain, entropy, shares, sum_errors
from mhc_jax.nn.errors import noted
from mhc_jax.nn.merged import CARRIED, GIVEN, Carries, Merged, MergedBranches, drawn_streams, keep, stacked
from mhc_jax.nn.parameters import ConnectionParam
from mhc_jax.nn.stack import unstacked
from mhc_jax.options import resolve
from mhc_jax.placement import gather
from mhc_jax.streams import Connected, HeadParams, Implementation, Maps, StreamConfig, StreamParams, maps
from mhc_jax.streams.config import DEFAULTS
from mhc_jax.streams.conventions import Parameters, check_assigned, convention_named


class ConnectionMaps(nnx.Module):
    """`HyperConnections` of a branch that is held elsewhere, and given to `around`; all else as there.

    Args:
        branch_names: of the modules beside this one that make up the branch, for the norm of its gradient.
        param_dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        *,
        config: StreamConfig | None = None,
        layer_index: int | Array = 0,
        implementation: Implementation = None,
        branch_names: tuple[str, ...] = (),
        param_dtype: Any = jnp.float32,
        **options: Any,
    ) -> None:
        self.branch_names = branch_names
        self.config = resolve(DEFAULTS, config, **options)
        check_implementation(implementation)
        self.implementation = implementation
        phi, alpha, bias = functional.init_params(self.config, width, layer_index, param_dtype)
        self.phi = nnx.data(None if phi is None else ConnectionParam(phi))
        self.alpha = nnx.data(None if alpha is None else ConnectionParam(alpha))
        self.bias = ConnectionParam(bias)

    def params(self) -> StreamParams:
        """The parameters of the maps, for the functions of `mhc_jax.streams`."""
        if self.phi is None or self.alpha is None:
            return StreamParams(None, None, self.bias[...])
        return StreamParams(gather(self.phi[...]), self.alpha[...], self.bias[...])

    def load_from(self, convention: str, tensors: Mapping[str, Any]) -> None:
        """Take the parameters of a public model's branch, by the names that they have there.

        Args:
            convention: a name in `mhc_jax.streams.CONVENTIONS`, whose options `config` has.
            tensors: what `np.asarray` makes arrays of.

        Raises:
            ValueError: there is no such convention, or `config` is of another; a tensor is missing, not expected, or
                has the shape of another number of streams or width. Nothing has changed then.
        """
        _assign(self, convention_named(convention).load(tensors, self.config))

    def store_as(self, convention: str) -> dict[str, np.ndarray]:
        """The parameters as a public model has them, by the names that they have there.

        Raises:
            ValueError: there is no such convention, `config` is of another, or it cannot hold the parameters.
        """
        return convention_named(convention).store(_arrays(self), self.config)

    def around(
        self, branch: Callable[..., Array], streams: Float[Array, "*tokens n C"], *args: Any, **kwargs: Any
    ) -> Float[Array, "*tokens n C"]:
        """H_res X + H_post^T branch(H_pre X) of the streams X. Further arguments reach the branch."""
        connected = functional.wrap(branch, self.config, implementation=self.implementation)
        return connected(self.params(), streams, *args, **kwargs)

    def single_pass(
        self,
        branch: Callable[..., Array],
        streams: Float[Array, "*tokens n C"],
        pre: Float[Array, "*tokens n"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Array, "*tokens n C"], Float[Array, "*tokens n"]]:
        """As `around`, where `config.single_pass`: the branch reads by `pre`, the H_pre of the branch before.

        Returns:
            The streams, and H_pre for the branch after. `streams.first_read` is that of the first, `streams.collapse`
            by that of the last ends the network.
        """
        connected = functional.single_pass(branch, self.config, implementation=self.implementation)
        return connected(self.params(), streams, pre, *args, **kwargs)

    def branch_gradients(self, own: Mapping[str, Any], beside: Mapping[str, Any]) -> Any:
        """Those of the branch, out of the gradients of this module and of the one that holds it."""
        return [beside.get(name, {}) for name in self.branch_names]

    def connecting(self, branch: Callable[..., Array], *args: Any, **kwargs: Any) -> Connected:
        """What `around` does, for `streams.apply_branches`."""
        return Connected(lambda x: branch(x, *args, **kwargs), self.params(), self.config, self.implementation)


class HyperConnections(ConnectionMaps):
    """X -> H_res X + H_post^T branch(H_pre X) on streams X of shape (..., n, width).

    Wraps any branch that keeps the shape and dtype of its input. Between networks of one stream and these layers,
    `expand` once before the first and `reduce` (or a `StreamHead`) once after the last. A new network of these layers
    computes what the plain residual network x + branch(x) does.

    Args:
        branch: a module or function; further arguments of the call reach it.
        width: features C of one stream.
        config: all options in one value; keywords, the fields of `StreamConfig`, change single ones.
        layer_index: which wrapped branch of the network this is, counted from 0: sets the stream it reads most.
        implementation: as of `mhc_jax.streams.read` and `write`; in a `StreamStack`, of `boundary`.

    Attributes:
        phi: (n * width, m) parameter, m = config.logits columns: those of H_pre, H_post, H_res. None if not dynamic.
        alpha: (3,) parameter, the gates of H_pre, H_post, H_res; starts as `config.start` says. None if not dynamic.
        bias: (m,) parameter.

    Raises:
        TypeError, ValueError: as StreamConfig; width is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import HyperConnections
        >>> from mhc_jax.streams import expand, reduce
        >>> layer = HyperConnections(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), 8, streams=4)
        >>> reduce(layer(expand(jnp.ones((2, 8)), 4))).shape
        (2, 8)
    """

    def __init__(
        self,
        branch: Callable[..., Array],
        width: int,
        *,
        config: StreamConfig | None = None,
        layer_index: int | Array = 0,
        implementation: Implementation = None,
        **options: Any,
    ) -> None:
        super().__init__(width, config=config, layer_index=layer_index, implementation=implementation, **options)
        self.branch = branch

    def __call__(self, streams: Float[Array, "*tokens n C"], *args: Any, **kwargs: Any) -> Float[Array, "*tokens n C"]:
        return self.around(self.branch, streams, *args, **kwargs)

    def branch_gradients(self, own: Mapping[str, Any], beside: Mapping[str, Any]) -> Any:
        """Those of the branch, out of the gradients of this module."""
        return own.get("branch", {})

    def connected(self, *args: Any, **kwargs: Any) -> list[Connected]:
        """The branches that a call with these further arguments is a chain of: its own."""
        return [self.connecting(self.branch, *args, **kwargs)]

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        graph, state = nnx.split(self)
        single = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[None], state))
        return stream_figures(single, jax.tree.map(lambda leaf: leaf[None], grads))

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        return show_streams(figures, [""])._replace(whole={})


class StreamHead(nnx.Module):
    """Learned reduction of n streams by a map like H_pre, as DeepSeek-V4 ends (`DeepseekV4HyperHead`).

    Starts as the mean of the streams.

    Args:
        width: features C of one stream.
        config: all options in one value; keywords, the fields of `StreamConfig`, change single ones.
        implementation: as of `mhc_jax.streams.head`.

    Attributes:
        phi: (n * width, n) parameter.
        alpha: (1,) parameter.
        bias: (n,) parameter.

    Raises:
        TypeError, ValueError: as StreamConfig; width is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.nn import StreamHead
        >>> StreamHead(8)(jnp.ones((2, 4, 8))).shape
        (2, 8)
    """

    def __init__(
        self,
        width: int,
        *,
        config: StreamConfig | None = None,
        implementation: Implementation = None,
        **options: Any,
    ) -> None:
        self.config = resolve(DEFAULTS, config, **options)
        check_implementation(implementation)
        self.implementation = implementation
        phi, alpha, bias = functional.init_head_params(self.config, width)
        self.phi = ConnectionParam(phi)
        self.alpha = ConnectionParam(alpha)
        self.bias = ConnectionParam(bias)

    def load_from(self, convention: str, tensors: Mapping[str, Any]) -> None:
        """Take the parameters of a public model's head; as `HyperConnections.load_from`."""
        _assign(self, convention_named(convention).load(tensors, self.config, head=True))

    def store_as(self, convention: str) -> dict[str, np.ndarray]:
        """The parameters as a public model's head has them; as `HyperConnections.store_as`."""
        return convention_named(convention).store(_arrays(self), self.config, head=True)

    def __call__(self, streams: Float[Array, "*tokens n C"]) -> Float[Array, "*tokens C"]:
        params = HeadParams(gather(self.phi[...]), self.alpha[...], self.bias[...])
        return functional.head(params, streams, self.config, implementation=self.implementation)


def _arrays(module: ConnectionMaps | StreamHead) -> Parameters:
    """What a convention stores; maps that are static have no convention, and are refused there."""
    arrays: Any = (None if leaf is None else np.asarray(leaf[...]) for leaf in _leaves(module))
    return Parameters(*arrays)


def _assign(module: ConnectionMaps | StreamHead, parameters: Parameters) -> None:
    check_assigned(_arrays(module), parameters)
    for leaf, values in zip(_leaves(module), parameters, strict=True):
        leaf[...] = jnp.asarray(values, leaf[...].dtype)


def _leaves(module: ConnectionMaps | StreamHead) -> tuple[Any, Any, Any]:
    return module.phi, module.alpha, module.bias


class StreamStack(nnx.Module):
    """A network of n streams: expands its input, runs `depth` equal layers as one scan, and takes the mean.

    Args:
        make_layer: makes one layer, (rngs, index) -> module, of `HyperConnections`: it maps streams to streams. The
            index is traced. A layer may use dropout, keep batch statistics or a cache, and sow. Where it writes
            nothing while it runs, and is nothing but a chain of them, and says so by a method `connected` beside its
            call, as they do, the write of one and the read of the next are one `boundary`;
            such layers alone may be of a single pass (`StreamConfig.single_pass`).
        depth: number of layers L.
        streams: number n of streams, 4 by default.
        config: of the layers, in place of `streams`.
        block_length: of how many layers the streams are kept once for the backward pass; see `streams.scan_layers`.
        policy: what else of a layer to keep (`jax.checkpoint_policies`); the default is all its derivative needs.
        rngs: for the layers; one with dropout draws from the stream `dropout`.

    Attributes:
        layers: one module of the layer's type, whose variables have a leading axis of length L.
        deterministic: no layer draws; set by `model.eval()` and `model.train()`.

    Raises:
        ValueError: depth is below 1; as StreamConfig.
        TypeError: as StreamConfig.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import HyperConnections, StreamStack
        >>> def make_layer(rngs, index):
        ...     return HyperConnections(nnx.Linear(8, 8, rngs=rngs), 8, layer_index=index)
        >>> stack = StreamStack(make_layer, depth=12, rngs=nnx.Rngs(0))
        >>> stack(jnp.ones((2, 8))).shape, stack.layers.branch.kernel.shape
        ((2, 8), (12, 8, 8))
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs, Array], nnx.Module],
        depth: int,
        streams: int | None = None,
        *,
        config: StreamConfig | None = None,
        block_length: int = 1,
        policy: Callable[..., bool] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.streams = resolve(DEFAULTS, config, streams=streams).streams
        self.block_length = block_length
        self.policy = policy
        self.layers = stacked(make_layer, depth, rngs.split(depth), jnp.arange(depth))
        self.deterministic = False

    def __call__(self, x: Float[Array, "*tokens C"], *args: Any, **kwargs: Any) -> Float[Array, "*tokens C"]:
        """The mean of the streams after the last layer, of a single pass what its H_pre reads.

        Further arguments reach every layer, the same for all.

        Raises:
            TypeError: a layer writes its parameters.
        """
        graphdef = nnx.graphdef(self.layers)
        params, carried = nnx.state(self.layers, GIVEN, CARRIED)
        variables = nnx.merge_state(params, drawn_streams(self.layers, self.deterministic))
        options: dict[str, Any] = {"block_length": self.block_length, "policy": self.policy}
        with noted(f"in the layers of StreamStack ({type(self.layers).__name__})"):
            if _is_chain(type(self.layers)) and not nnx.to_flat_state(carried):
                try:
                    branches = MergedBranches(graphdef, args, kwargs)
                    return functional.apply_branches(branches, variables, x, self.streams, **options)
                except Carries:
                    pass
            layer = Merged(graphdef, args, kwargs, carries=True)
            variables, wide = nnx.merge_state(variables, carried), functional.expand(x, self.streams)
            wide, carried = functional.scan_layers(layer, variables, wide, carries=True, **options)
        keep(self.layers, carried)
        return functional.reduce(wide)

    def unrolled(self) -> "StreamChain":
        """The same function as a chain of single layers, each of which can be watched and run alone."""
        return StreamChain(unstacked(self.layers), self.streams)

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        return stream_figures(self.layers, grads["layers"])

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        branches = [".".join(map(str, path)) for path, _ in _branches(self.layers)]
        depth = len(figures["pre"]) // len(branches)
        names = [f"layers.{layer}.{branch}".rstrip(".") for layer in range(depth) for branch in branches]
        return show_streams(figures, names)


def _is_chain(layer: type) -> bool:
    """Whether `connected` tells all that a call does: a subclass with a call of its own has to tell that anew."""
    telling, calling = (
        next((kind for kind in layer.__mro__ if name in vars(kind)), None) for name in ("connected", "__call__")
    )
    return telling is not None and telling is calling


class StreamChain(nnx.Module):
    """The layers of a `StreamStack`, one after another."""

    def __init__(self, layers: list[nnx.Module], streams: int) -> None:
        self.layers = nnx.List(layers)
        self.streams = streams

    def __call__(self, x: Float[Array, "*tokens C"], *args: Any, **kwargs: Any) -> Float[Array, "*tokens C"]:
        wide = functional.expand(x, self.streams)
        for layer in self.layers:
            wide = layer(wide, *args, **kwargs)
        return functional.reduce(wide)


def stream_figures(layers: nnx.Module, grads: nnx.State) -> dict[str, Array]:
    """The figures of all hyper-connections of a layer whose variables have a leading axis of depth."""
    figures = []
    for path, connection in _branches(layers):
        *_, beside, own = {}, *accumulate(path, lambda tree, key: tree[key], initial=grads)
        learned = {name: own[name] for name in ("phi", "alpha", "bias") if name in own}
        found = jax.vmap(partial(_bias_maps, connection.config))(connection.bias[...])._asdict()
        if connection.alpha is not None:
            found["alpha"] = connection.alpha[...]
        found["maps_grad_norm"] = jax.vmap(optax.tree.norm)(learned)
        # The zeros stand for a branch without parameters.
        branch = connection.branch_gradients(own, beside)
        found["grad_norm"] = jax.vmap(optax.tree.norm)((branch, jnp.zeros_like(found["pre"])))
        figures.append(found)
    # All branches of the first layer, then those of the second.
    merged = {name: jnp.stack([found[name] for found in figures], 1) for name in figures[0]}
    merged = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in merged.items()}
    res = merged["res"]
    merged["entropy"] = entropy(shares(res))
    merged["identity_distance"] = abs(res - jnp.eye(res.shape[-1])).max((-2, -1))
    merged["row_sum_error"], merged["column_sum_error"] = sum_errors(res)
    merged["gain_forward"], merged["gain_backward"] = composite_gain(res)
    return merged


def _bias_maps(config: StreamConfig, bias: Float[Array, " m"]) -> Maps:
    return maps(StreamParams(None, None, bias), jnp.zeros((config.streams, 1), bias.dtype), config)


def _branches(module: nnx.Module) -> list[tuple[tuple[Any, ...], ConnectionMaps]]:
    """The outermost hyper-connections of a module in the order in which it holds them, and their paths."""
    if isinstance(module, ConnectionMaps):
        return [((), module)]
    children = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    return [
        ((name, *path), connection)
        for name, child in children
        if isinstance(child, nnx.Module)
        for path, connection in _branches(child)
    ]


def show_streams(figures: Mapping[str, np.ndarray], names: Sequence[str]) -> Shown:
    """What the dashboard shows of branches. H_pre, H_post and each row of H_res are vectors of weights."""
    layers: dict[str, dict[str, float]] = {}
    weights = {}
    for branch, name in enumerate(names):
        keys = ("identity_distance", "maps_grad_norm", "grad_norm")
        layers[name] = {key: float(figures[key][branch]) for key in keys if key in figures}
        inside = f"{name}." if name else ""
        rows = {"pre": figures["pre"][branch], "post": figures["post"][branch]}
        rows |= {f"res.{i}": row for i, row in enumerate(figures["res"][branch])}
        for row, values in rows.items():
            weights[inside + row] = values
        for i, value in enumerate(figures["entropy"][branch]):
            layers[f"{inside}res.{i}"] = {"entropy": float(value)}
    return Shown(layers, {key: float(figures[key]) for key in ("gain_forward", "gain_backward")}, weights)
