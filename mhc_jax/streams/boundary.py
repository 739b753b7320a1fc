"""The boundary between two branches of n streams: the write of one and the read of the next, in one pass.

    X' = res X + post y        with the maps of the branch whose output is y      arXiv 2512.24880, equation 3
    maps' = maps(X')           of the branch that comes next                      equations 7 to 9
    x' = pre' X'               its input

`write` followed by `read` moves (4n + 2) C numbers a token forward. Done together while a tile of tokens is on the
chip they move (2n + 2) C, and (3n + 3) C backward: X' is built again from X and y, and what arrives at the streams
from the branch, the norm, the projection and the streams behind is summed before it is stored.

A network is a chain of boundaries: `read` before its first branch, `write` after its last. The kernels want streams
flat, (..., n * C): to part n from C is a copy on a TPU, so whoever carries streams through kernels carries them flat.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mhc_jax.kernels import stream_boundary as kernels
from mhc_jax.kernels import stream_boundary_gpu as gpu_kernels
from mhc_jax.kernels.choice import Implementation, apart, check_implementation, implemented
from mhc_jax.meshes import Axes, alike, feature_axes, on_parts
from mhc_jax.streams import forms, norm
from mhc_jax.streams.config import StreamConfig
from mhc_jax.streams.connect import (
    check_single_pass,
    collapse,
    expand,
    first_read,
    fitted,
    maps_alone,
    read,
    reduce,
    wrap,
    write,
)
from mhc_jax.streams.constraints import CONSTRAINTS
from mhc_jax.streams.depth import depth_of, scan_any
from mhc_jax.streams.maps import (
    Maps,
    StreamParams,
    check_norm,
    check_params,
    maps,
    maps_from_normalized,
    read_weights,
)


def boundary(
    params: StreamParams,
    streams: Float[Array, "*tokens n C"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"] | None,
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> tuple[
    Float[Array, "*tokens n C"],
    Float[Array, "*tokens C"],
    Float[Array, "*tokens n"],
    Float[Array, "*tokens n n"] | None,
]:
    """`write(streams, output, post, res)`, and `read(params, .)` of what that gives.

    Kept for backward: the streams, the output, and the few numbers of the maps.

    Args:
        params: of the maps of the branch that comes next.
        streams, output, post, res: as of `write`: what the branch before read, its output and its maps. A res of None
            is the identity.
        config: of the maps.
        implementation: "pallas" for the kernels of `mhc_jax.kernels.stream_boundary`, for streams whose squares sum
            up to what float32 holds (below about 1e19); "xla" for what XLA fuses, at any size;
            None for the choice of `mhc_jax.kernels.choice`.

    Returns:
        The streams X', the input x' of the next branch, and its H_post and H_res, None where it mixes nothing.

    Raises:
        ValueError: if the shapes do not fit each other or `params`; "pallas" for a size or a norm that the kernels
            can't do.
        TypeError: if the streams are not of a floating dtype, or cannot hold the output's; "pallas" for float64.

    Source: arXiv 2512.24880, section 4.3.1 fuses parts of it.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.streams import StreamConfig, expand, init_params, read
        >>> config = StreamConfig(4)
        >>> first, second = (init_params(config, 8, layer) for layer in range(2))
        >>> streams = expand(jnp.ones((2, 8)), 4)
        >>> x, post, res = read(first, streams, config)
        >>> streams, x, post, res = boundary(second, streams, 2 * x, post, res, config)
        >>> streams.shape, x.shape, post.shape, res.shape
        ((2, 4, 8), (2, 8), (2, 4), (2, 4, 4))
    """
    check_params(params, streams, config)
    output = _written(streams, output, post, res)
    if feature_axes(streams):
        # A token lies on several devices, and they have to add up its projection before any of them can read it.
        new = write(streams, output, post, res, implementation=implementation)
        return new, *read(params, new, config, implementation=implementation)
    return _checked(params, streams, output, post, res, config, implementation)


def flat_boundary(
    params: StreamParams,
    streams: Float[Array, "*tokens nC"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"] | None,
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> tuple[
    Float[Array, "*tokens nC"], Float[Array, "*tokens C"], Float[Array, "*tokens n"], Float[Array, "*tokens n n"] | None
]:
    """`boundary` of streams that lie side by side in one axis, (..., n * C), stream 0 first."""
    n = config.streams
    if streams.shape[-1] % n:
        raise ValueError(f"streams must have the width of {n} streams, a multiple of {n}, got {streams.shape}")
    parted = streams.reshape(*streams.shape[:-1], n, streams.shape[-1] // n)
    check_params(params, parted, config)
    output = _written(parted, output, post, res)
    return _checked(params, streams, output, post, res, config, implementation)


def _written(streams: Array, output: Array, post: Array, res: Array | None) -> Array:
    """The output of the branch in the dtype of the streams, all shapes being right."""
    *lead, n, width = streams.shape
    if output.shape != (*lead, width):
        raise ValueError(
            f"the branch must keep the shape of its input: for streams of {n} that is {(*lead, width)}, "
            f"its output has {output.shape}"
        )
    if post.shape != (*lead, n) or (res is not None and res.shape != (*lead, n, n)):
        raise ValueError(
            f"post and res must have shapes {(*lead, n)} and {(*lead, n, n)}, got {post.shape} and "
            f"{None if res is None else res.shape}"
        )
    return fitted(output, streams.dtype)


# Below, streams are as the caller has them, flat or not. Kernels work on flat ones, XLA on (..., n, C).


def _parted(streams: Array, like: Array, n: int) -> Array:
    return streams.reshape(*like.shape[:-1], n, like.shape[-1])


def _flat(streams: Array, like: Array) -> Array:
    return streams.reshape(*like.shape[:-1], -1)


def _checked(
    params: StreamParams,
    streams: Array,
    output: Array,
    post: Array,
    res: Array | None,
    config: StreamConfig,
    implementation: Implementation,
) -> tuple[Array, Array, Array, Array | None]:
    check_single_pass(config, False)
    check_implementation(implementation)
    if config.norm != "rms" and params.phi is not None:
        check_norm(config, implementation)

    def of_part(
        phi: Array | None, alpha: Array | None, bias: Array, *arrays: Array | None, over: Axes
    ) -> tuple[Array, ...]:
        if config.norm == "rms" or phi is None:
            params, *arrays = alike(StreamParams(phi, alpha, bias), *arrays)
            return _boundary(params, *arrays, config, implementation)
        return _boundary_plainly(StreamParams(phi, alpha, bias), *arrays, config)

    streams_and_phi = ("...f", "fm") if streams.ndim == output.ndim else ("...nc", "nc,m")
    layout = "{1} a m {0} ...c ...n ...nn -> {0} ...c ...n ...nn".format(*streams_and_phi)
    arrays = *params, streams, output, post, res
    new, x, next_post, next_res = on_parts(of_part, layout, *arrays, implementation=implementation)
    return new, x, next_post, next_res if CONSTRAINTS[config.constraint].mixes else None


@partial(jax.checkpoint, static_argnums=5)
def _boundary_plainly(
    params: StreamParams, streams: Array, output: Array, post: Array, res: Array | None, config: StreamConfig
) -> tuple[Array, ...]:
    """Of any norm, with the derivatives that JAX finds; nothing is kept but the arguments."""
    new = forms.merged(_parted(streams, output, config.streams), output, post, res)
    following = maps(params, new, config)
    return new.reshape(streams.shape), _collapsed(following.pre, new), following.post, following.res


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _boundary(
    params: StreamParams,
    flat: Array,
    output: Array,
    post: Array,
    res: Array | None,
    config: StreamConfig,
    implementation: Implementation,
) -> tuple[Array, Array, Array, Array]:
    return _forward(params, flat, output, post, res, config, implementation)[0]


def _forward(
    params: StreamParams,
    streams: Array,
    output: Array,
    post: Array,
    res: Array | None,
    config: StreamConfig,
    implementation: Implementation,
) -> tuple[tuple[Array, Array, Array, Array], tuple[Any, ...]]:
    phi, alpha, bias = params
    if phi is None or alpha is None:
        static = _static_maps(bias, output, config)
        new = forms.merged(_parted(streams, output, config.streams), output, post, res)
        x = _collapsed(static.pre, new)
        return (new.reshape(streams.shape), x, static.post, static.res), (params, streams, output, post, res, ())
    gate = jnp.broadcast_to(alpha[0], config.streams).astype(post.dtype)
    arguments = streams, output, post, res, phi.astype(post.dtype), gate, bias[: config.streams].astype(post.dtype)
    form = implemented("stream_boundary", implementation, _forward_by_kernel, _forward_by_xla)
    new, x, raw, inverse_rms = form(*arguments, config=config)
    # By `jax.vjp`, which puts the forward pass of `sinkhorn` in its place: a Hessian needs derivatives of both modes.
    maps_of = partial(maps_from_normalized, config=config, implementation=implementation)
    (_, next_post, next_res), _ = jax.vjp(maps_of, raw * inverse_rms, alpha, bias)
    return (new, x, next_post, next_res), (params, streams, output, post, res, (raw, inverse_rms))


def _backward(
    config: StreamConfig,
    implementation: Implementation,
    saved: tuple[Any, ...],
    cotangents: tuple[Array, Array, Array, Array],
) -> tuple[Any, ...]:
    (phi, alpha, bias), streams, output, post, res, projected = saved
    d_new, d_input, d_post, d_res = cotangents
    n, dtype = config.streams, post.dtype
    if phi is None or alpha is None:
        static, static_pullback = jax.vjp(partial(_static_maps, output=output, config=config), bias)
        *gradients, d_pre = _backward_by_xla(streams, output, post, res, static.pre, d_new, d_input)
        (d_bias,) = static_pullback(Maps(d_pre, d_post, d_res))
        return StreamParams(None, None, d_bias), *gradients

    raw, inverse_rms = projected
    normalized, size = raw * inverse_rms, phi.shape[0]
    # H_post and H_res first: what arrives at H_pre is known only once X' is built again.
    maps_again = partial(maps_from_normalized, config=config, implementation=implementation)
    next_maps, pullback = jax.vjp(maps_again, normalized, alpha, bias)
    d_normalized, d_alpha, d_bias = pullback(Maps(jnp.zeros_like(next_maps.pre), d_post, d_res))
    own = normalized[..., :n]
    pre, pre_pullback = jax.vjp(partial(_pre, config), own, alpha[0], bias[:n])
    slope = pre_pullback(jnp.ones_like(pre))[0] * inverse_rms
    # Through 1 / rms X' gets radial * (X' / rms). No factor here is the square of a stream, or of 1 / rms.
    radial = -jnp.sum(d_normalized * normalized, axis=-1, keepdims=True) * inverse_rms / size
    arguments = streams, output, post, res, pre, d_new, d_input
    more = phi.astype(dtype), slope, -own / size, d_normalized * inverse_rms, radial, inverse_rms
    form = implemented("stream_boundary", implementation, _backward_by_kernel, _backward_by_xla)
    *gradients, d_pre, d_phi = form(*arguments, *more)
    _, d_gate, d_own_bias = pre_pullback(d_pre)
    d_params = StreamParams(d_phi.astype(phi.dtype), d_alpha.at[0].add(d_gate), d_bias.at[:n].add(d_own_bias))
    return d_params, *gradients


_boundary.defvjp(_forward, _backward)


def _static_maps(bias: Array, output: Array, config: StreamConfig) -> Maps:
    shape = (*output.shape[:-1], config.streams, output.shape[-1])
    return maps(StreamParams(None, None, bias), jnp.zeros(shape, output.dtype), config)


def _pre(config: StreamConfig, normalized: Array, gate: Array, bias: Array) -> Array:
    """H_pre of its normalized logits."""
    if CONSTRAINTS[config.constraint].bounded:
        return read_weights(gate * normalized + bias, config)
    return gate * jnp.tanh(normalized) + bias


def _collapsed(pre: Array, streams: Array) -> Array:
    return jnp.einsum("...n,...nc->...c", pre, streams.astype(pre.dtype)).astype(streams.dtype)


def _forward_by_xla(
    streams: Array,
    output: Array,
    post: Array,
    res: Array | None,
    phi: Array,
    gate: Array,
    bias: Array,
    *,
    config: StreamConfig,
) -> tuple[Array, Array, Array, Array]:
    """X', x', vec(X') phi and 1 / rms(vec X')."""
    new = forms.merged(_parted(streams, output, config.streams), output, post, res)
    wide = new.astype(post.dtype)
    raw, inverse_rms = forms.projected(wide, phi), norm.inverse_rms(forms.flattened(wide), config.norm_epsilon)
    pre = _pre(config, raw[..., : config.streams] * inverse_rms, gate, bias)
    return new.reshape(streams.shape), _collapsed(pre, new), raw, inverse_rms


def _forward_by_kernel(
    streams: Array, output: Array, post: Array, res: Array | None, *maps: Array, config: StreamConfig
) -> tuple[Array, ...]:
    options: Any = {"pre": partial(_pre, config), "norm_epsilon": config.norm_epsilon}
    tpu, gpu = (partial(forward, **options) for forward in (kernels.forward, gpu_kernels.forward))
    arguments = _flat(streams, output), output, post, forms.mixing(res, post), *maps
    new, *rest = kernels.on_every_platform(tpu, gpu, *arguments)
    return new.reshape(streams.shape), *rest


def _backward_by_kernel(
    streams: Array, output: Array, post: Array, res: Array | None, pre: Array, d_new: Array, *others: Array
) -> tuple[Array | None, ...]:
    flat, d_flat = (_flat(array, output) for array in (streams, d_new))
    arguments = flat, output, post, forms.mixing(res, post), pre, d_flat, *others
    gradients = kernels.on_every_platform(kernels.backward, gpu_kernels.backward, *arguments)
    d_streams, d_output, d_post, d_res, *rest = gradients
    return d_streams.reshape(streams.shape), d_output, d_post, None if res is None else d_res, *rest


def _backward_by_xla(
    streams: Array,
    output: Array,
    post: Array,
    res: Array | None,
    pre: Array,
    d_new: Array,
    d_input: Array,
    *dynamic: Array,
) -> tuple[Any, ...]:
    """What arrives at streams, output, post, res and the next H_pre, and at phi if maps are dynamic.

    Arguments are those of `kernels.backward`.
    """
    n, dtype = post.shape[-1], post.dtype
    old, d_new, d_input = _parted(streams, output, n), _parted(d_new, output, n).astype(dtype), d_input.astype(dtype)
    new = forms.merged(old, output, post, res).astype(dtype)
    d_pre = jnp.einsum("...c,...nc->...n", d_input, new)
    # All that arrives at the new streams, summed before it is rounded.
    total = d_new + pre[..., None] * d_input[..., None, :]
    d_phis = []
    if dynamic:
        phi, slope, pull, d_raw, radial, inverse_rms = dynamic
        d_own = d_pre * slope
        d_raw = d_raw.at[..., :n].add(d_own)
        radial += jnp.sum(d_own * pull, axis=-1, keepdims=True)
        through_phi, d_phi = forms.projected_back(new, phi, d_raw)
        total += through_phi + radial[..., None] * (new * inverse_rms[..., None])
        d_phis = [d_phi]
    total = forms.in_memory(total)
    d_streams = forms.mixed_back(res, total).astype(streams.dtype).reshape(streams.shape)
    d_output = jnp.einsum("...n,...nc->...c", post, total)
    d_post = jnp.einsum("...nc,...c->...n", total, output.astype(dtype))
    d_res = None if res is None else jnp.einsum("...ic,...jc->...ij", total, old.astype(dtype))
    return d_streams, d_output.astype(output.dtype), d_post, d_res, d_pre, *d_phis


class Connected(NamedTuple):
    """A branch and its connection to the streams."""

    branch: Callable[[Array], Array]
    params: StreamParams
    config: StreamConfig
    implementation: Implementation = None


def apply_branches(
    layer: Callable[[Any], Iterable[Connected]],
    params: Any,
    x: Float[Array, "*tokens C"],
    streams: int,
    *,
    block_length: int = 1,
    policy: Callable[..., bool] | None = None,
) -> Float[Array, "*tokens C"]:
    """A network of equal layers on n streams, as a scan over boundaries.

    Expands x, runs the branches of every layer one after another, and takes the mean of the streams: what
    `scan_layers` does of layers that `wrap`, and on a CPU it is that, unless an implementation is asked for
    (`mhc_jax.kernels.choice.apart`). Else the scan carries streams (flat, for kernels), a branch's output and its
    maps, so that nothing reads what the step before has just written. Of a single pass (`config.single_pass`) the scan
    carries the H_pre of the branch before, too, by which the branch reads and, after the last, the network ends.

    Args:
        layer: from the parameters of one layer, its branches in their order. A branch keeps the shape of x, and x can
            hold its dtype.
        params: a pytree whose leaves have a leading axis of length L, the depth.
        streams: n, as in the configs of all branches.
        block_length, policy: as of `scan_layers`: of how many layers the streams are kept once, and what else is.

    Raises:
        ValueError: if block_length does not divide L; branches of a single pass beside others; as `boundary`.
        TypeError: as `boundary`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mhc_jax.streams import StreamConfig, init_params
        >>> config = StreamConfig(4)
        >>> maps = jax.vmap(lambda layer: init_params(config, 8, layer))(jnp.arange(6))
        >>> def layer(params):
        ...     maps, kernel = params
        ...     return [Connected(lambda x: x @ kernel, maps, config)]
        >>> apply_branches(layer, (maps, jnp.ones((6, 8, 8))), jnp.ones((2, 8)), 4).shape
        (2, 8)
    """
    lead, dtype = x.shape[:-1], jnp.promote_types(x.dtype, jnp.float32)
    branches = _branches(layer, params)
    single_pass = {config.single_pass for config, _ in branches}
    if len(single_pass) > 1:
        raise ValueError("config.single_pass must be the same of all branches: H_pre goes from each to the next")
    once = single_pass == {True}
    if not once and all(apart(implementation) for _, implementation in branches):
        return reduce(_apply_apart(layer, params, expand(x, streams), block_length, policy))
    by_kernels = not once and any(implementation == "pallas" for _, implementation in branches)
    flat = by_kernels and not feature_axes(x)
    mixes = any(CONSTRAINTS[config.constraint].mixes for config, _ in branches[-1:])
    # The first boundary passes the streams on: H_res is 1, and no branch has written.
    no_post = jnp.zeros((*lead, streams), dtype)
    first: tuple[Any, ...] = (
        _flat(expand(x, streams), x) if flat else expand(x, streams),
        jnp.zeros_like(x),
        no_post,
        forms.mixing(None, no_post) if mixes else None,
        first_read(expand(x, streams)) if once else None,
    )

    def step(params: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        new, output, post, res, pre = carry
        for connected in layer(params):
            _, maps_params, config, implementation = connected
            if once:
                arguments = maps_params, new, output, post, res, pre
                new, h, pre, post, res = _single_pass_boundary(*arguments, config, implementation)
            else:
                between = boundary if new.ndim > output.ndim else flat_boundary
                new, h, post, res = between(maps_params, new, output, post, res, config, implementation=implementation)
            output = fitted(connected.branch(h), new.dtype)
        return new, output, post, res, pre

    # In the one form in which they are carried: what a branch has inside may well have the shape of the other.
    wide = (first[0].shape,)
    new, output, post, res, pre = scan_any(step, params, first, block_length, wide, source=layer, policy=policy)
    new = write(_parted(new, output, streams), output, post, res)
    return reduce(new) if pre is None else collapse(pre, new)


def _apply_apart(
    layer: Callable[[Any], Iterable[Connected]],
    params: Any,
    streams: Array,
    block_length: int,
    policy: Callable[..., bool] | None,
) -> Array:
    """The streams after all layers, each branch with a read before it and a write after it."""

    def step(params: Any, streams: Array) -> Array:
        for branch, maps_params, config, implementation in layer(params):
            streams = wrap(branch, config, implementation=implementation)(maps_params, streams)
        return streams

    result: Array = scan_any(step, params, streams, block_length, (streams.shape,), source=layer, policy=policy)
    return result


@partial(jax.checkpoint, static_argnums=(6, 7))  # kept are the arguments, as of `boundary`
def _single_pass_boundary(
    params: StreamParams,
    streams: Array,
    output: Array,
    post: Array,
    res: Array | None,
    pre: Array,
    config: StreamConfig,
    implementation: Implementation,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """X', x' = pre X' by the H_pre of the branch before, and the maps of X'."""
    check_params(params, streams, config)
    new = write(streams, _written(streams, output, post, res), post, res, implementation=implementation)
    return new, collapse(pre, new, implementation=implementation), *maps_alone(params, new, config, implementation)


def _branches(layer: Callable[[Any], Iterable[Connected]], params: Any) -> list[tuple[StreamConfig, Implementation]]:
    """How the branches of a layer are connected, in their order; none of no layers."""
    asked: list[tuple[StreamConfig, Implementation]] = []

    def ask(params: Any) -> None:
        first = jax.tree.map(lambda leaf: lax.index_in_dim(leaf, 0, keepdims=False), params)
        asked.extend((connected.config, connected.implementation) for connected in layer(first))

    if depth_of(params):
        jax.eval_shape(ask, params)
    return asked
