"""The boundary between two branches of n streams: the write of one and the read of the next, in one pass.

    X' = res X + post y        with the maps of the branch whose output is y      arXiv 2512.24880, equation 3
    maps' = maps(X')           of the branch that comes next                      equations 7 to 9
    x' = pre' X'               its input

`write` followed by `read` moves (4n + 2) C numbers a token forward. Done together while a tile of tokens is on the
chip they move (2n + 2) C, and (3n + 3) C backward: X' is built again from X and y, and what arrives at the streams
from the branch, the norm, the projection and the streams behind is summed before it is stored.

A network is a chain of boundaries: `read` before its first branch, `write` after its last. Streams are flat here,
(..., n * C): to part n from C is a copy on a TPU, so whoever carries streams through many boundaries carries them flat.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.kernels import stream_boundary as kernels
from mhc_jax.streams import (
    Implementation,
    Maps,
    StreamConfig,
    StreamParams,
    _check,
    _check_implementation,
    _collapse,
    _maps_from_logits,
    _maps_from_raw,
    _write,
    reduce,
)


def boundary(
    params: StreamParams,
    streams: Float[Array, "*tokens n C"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"],
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> tuple[
    Float[Array, "*tokens n C"], Float[Array, "*tokens C"], Float[Array, "*tokens n"], Float[Array, "*tokens n n"]
]:
    """`write(streams, output, post, res)`, and `read(params, .)` of what that gives.

    Kept for backward: the streams, the output, and the few numbers of the maps.

    Args:
        params: of the maps of the branch that comes next.
        streams, output, post, res: as of `write`: what the branch before read, its output and its maps.
        config: of the maps.
        implementation: "pallas" for the kernels of `mhc_jax.kernels.stream_boundary`, "xla" or None for what XLA fuses.

    Returns:
        The streams X', the input x' of the next branch, and its H_post and H_res.

    Raises:
        ValueError: if the shapes do not fit each other or `params`; "pallas" for a size that the kernels can't do.
        TypeError: if the streams are not of a floating dtype, or the output has another; "pallas" for float64.

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
    _check(params, streams, config)
    flat = streams.reshape(*streams.shape[:-2], config.streams * streams.shape[-1])
    flat, x, post, res = flat_boundary(params, flat, output, post, res, config, implementation=implementation)
    return flat.reshape(streams.shape), x, post, res


def flat_boundary(
    params: StreamParams,
    streams: Float[Array, "*tokens nC"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"],
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> tuple[
    Float[Array, "*tokens nC"], Float[Array, "*tokens C"], Float[Array, "*tokens n"], Float[Array, "*tokens n n"]
]:
    """`boundary` of streams that lie side by side in one axis, (..., n * C), stream 0 first."""
    lead, n, width = output.shape[:-1], config.streams, output.shape[-1]
    if streams.shape != (*lead, n * width):
        raise ValueError(
            f"the branch must keep the shape of its input: for streams {streams.shape} of {n} that is "
            f"{(*streams.shape[:-1], streams.shape[-1] // n)}, its output has {output.shape}"
        )
    if output.dtype != streams.dtype:
        raise TypeError(f"the branch must keep the dtype of the streams {streams.dtype}, its output has {output.dtype}")
    if post.shape != (*lead, n) or res.shape != (*lead, n, n):
        raise ValueError(
            f"post and res must have shapes {(*lead, n)} and {(*lead, n, n)}, got {post.shape} and {res.shape}"
        )
    _check(params, _parted(streams, n), config)
    _check_implementation(implementation)
    if streams.size == 0:  # No numbers are no tile to work on.
        implementation = None
    return _boundary(params, streams, output, post, res, config, implementation)


def _parted(flat: Array, n: int) -> Array:
    return flat.reshape(*flat.shape[:-1], n, flat.shape[-1] // n)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _boundary(
    params: StreamParams,
    flat: Array,
    output: Array,
    post: Array,
    res: Array,
    config: StreamConfig,
    implementation: Implementation,
) -> tuple[Array, Array, Array, Array]:
    return _forward(params, flat, output, post, res, config, implementation)[0]


def _forward(
    params: StreamParams,
    flat: Array,
    output: Array,
    post: Array,
    res: Array,
    config: StreamConfig,
    implementation: Implementation,
) -> tuple[tuple[Array, Array, Array, Array], tuple[Any, ...]]:
    phi, alpha, bias = params
    if phi is None or alpha is None:
        static = _static_maps(bias, config, res.shape[:-2], res.dtype)
        new = _mixed(flat, output, post, res)
        return (new, _collapsed(static.pre, new), static.post, static.res), (params, flat, output, post, res, ())
    gate = jnp.broadcast_to(alpha[0], config.streams).astype(res.dtype)
    arguments = flat, output, post, res, phi.astype(res.dtype), gate, bias[: config.streams].astype(res.dtype)
    form = partial(_forward_by_xla, pre=partial(_pre, config), norm_epsilon=config.norm_epsilon)
    if implementation == "pallas":
        kernel = partial(kernels.forward, pre=partial(_pre, config), norm_epsilon=config.norm_epsilon)
        form = partial(kernels.on_tpu, kernel, form)
    new, x, raw, squares = form(*arguments)
    inverse_rms = jax.lax.rsqrt(squares / phi.shape[0] + config.norm_epsilon)
    _, next_post, next_res = _maps_from_raw(raw, inverse_rms, alpha, bias, config, implementation)
    return (new, x, next_post, next_res), (params, flat, output, post, res, (raw, inverse_rms))


def _backward(
    config: StreamConfig,
    implementation: Implementation,
    saved: tuple[Any, ...],
    cotangents: tuple[Array, Array, Array, Array],
) -> tuple[StreamParams, Array, Array, Array, Array]:
    (phi, alpha, bias), flat, output, post, res, projected = saved
    d_new, d_input, d_post, d_res = cotangents
    n, dtype = config.streams, res.dtype
    if phi is None or alpha is None:
        static_of = partial(_static_maps, config=config, lead=res.shape[:-2], dtype=dtype)
        static, static_pullback = jax.vjp(static_of, bias)
        *gradients, d_pre, _ = _backward_by_xla(flat, output, post, res, static.pre, d_new, d_input)
        (d_bias,) = static_pullback(Maps(d_pre, d_post, d_res))
        return StreamParams(None, None, d_bias), *gradients

    raw, inverse_rms = projected
    own, size = raw[..., :n], phi.shape[0]
    # H_post and H_res first: what arrives at H_pre is known only once X' is built again.
    maps_again = partial(_maps_from_raw, config=config, implementation=implementation)
    maps, pullback = jax.vjp(maps_again, raw, inverse_rms, alpha, bias)
    d_raw, _, d_alpha, d_bias = pullback(Maps(jnp.zeros_like(maps.pre), d_post, d_res))
    pre, pre_pullback = jax.vjp(partial(_pre, config), own * inverse_rms, alpha[0], bias[:n])
    slope = pre_pullback(jnp.ones_like(pre))[0] * inverse_rms
    # Through 1 / rms X' gets radial * (X' / rms): raw logits scale with X', maps do not.
    pull = -own * inverse_rms / size
    radial = -jnp.sum(d_raw * raw, axis=-1, keepdims=True) * inverse_rms / size
    arguments = flat, output, post, res, pre, d_new, d_input
    more = phi.astype(dtype), slope, pull, d_raw, radial, inverse_rms
    form: Any = _backward_by_xla
    if implementation == "pallas":
        form = partial(kernels.on_tpu, kernels.backward, form)
    *gradients, d_pre, d_phi = form(*arguments, *more)
    _, d_gate, d_own_bias = pre_pullback(d_pre)
    d_params = StreamParams(d_phi.astype(phi.dtype), d_alpha.at[0].add(d_gate), d_bias.at[:n].add(d_own_bias))
    return d_params, *gradients


_boundary.defvjp(_forward, _backward)


def _static_maps(bias: Array, config: StreamConfig, lead: tuple[int, ...], dtype: Any) -> Maps:
    static = _maps_from_logits(bias.astype(dtype), config)
    return Maps(*(jnp.broadcast_to(m, lead + m.shape) for m in static))


def _pre(config: StreamConfig, normalized: Array, gate: Array, bias: Array) -> Array:
    """H_pre of its normalized logits."""
    if config.constraint == "none":
        return gate * jnp.tanh(normalized) + bias
    return jax.nn.sigmoid(gate * normalized + bias) + config.epsilon


def _mixed(flat: Array, output: Array, post: Array, res: Array) -> Array:
    return _write(_parted(flat, post.shape[-1]), output, post, res, None).reshape(flat.shape)


def _collapsed(pre: Array, flat: Array) -> Array:
    return _collapse(pre, _parted(flat, pre.shape[-1]))


def _forward_by_xla(
    flat: Array,
    output: Array,
    post: Array,
    res: Array,
    phi: Array,
    gate: Array,
    bias: Array,
    *,
    pre: Callable[[Array, Array, Array], Array],
    norm_epsilon: float,
) -> tuple[Array, Array, Array, Array]:
    """X', x', vec(X') phi, and the sum of squares of vec(X')."""
    new = _mixed(flat, output, post, res)
    wide = new.astype(res.dtype)
    raw, squares = jnp.matmul(wide, phi), jnp.sum(wide * wide, axis=-1, keepdims=True)
    normalized = raw[..., : post.shape[-1]] * jax.lax.rsqrt(squares / phi.shape[0] + norm_epsilon)
    return new, _collapsed(pre(normalized, gate, bias), new), raw, squares


def _backward_by_xla(
    flat: Array,
    output: Array,
    post: Array,
    res: Array,
    pre: Array,
    d_new: Array,
    d_input: Array,
    phi: Array | None = None,
    slope: Array | None = None,
    pull: Array | None = None,
    d_raw: Array | None = None,
    radial: Array | None = None,
    inverse_rms: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array | None]:
    """What arrives at streams, output, post, res, the next H_pre and phi; arguments as of `kernels.backward`."""
    n, dtype = post.shape[-1], res.dtype
    streams, output_wide, d_input = _parted(flat, n).astype(dtype), output.astype(dtype), d_input.astype(dtype)
    new = _mixed(flat, output, post, res).astype(dtype)
    d_pre = jnp.einsum("...c,...nc->...n", d_input, _parted(new, n))
    # All that arrives at the new streams, summed before it is rounded.
    total = _parted(d_new, n).astype(dtype) + pre[..., None] * d_input[..., None, :]
    d_phi = None
    if phi is not None:
        d_own = d_pre * slope
        d_raw = d_raw.at[..., :n].add(d_own)
        radial = radial + jnp.sum(d_own * pull, axis=-1, keepdims=True)
        total += _parted(jnp.matmul(d_raw, phi.T) + radial * (new * inverse_rms), n)
        tokens = tuple(range(d_raw.ndim - 1))
        # Transposed on the way: the tall result (nC, m) directly is the slow side of a CPU's matrix product.
        d_phi = jnp.tensordot(d_raw, new, (tokens, tokens)).T
    d_streams = jnp.zeros_like(total)
    for i in range(n):
        d_streams += res[..., i, :, None] * total[..., i, None, :]
    d_output = jnp.einsum("...n,...nc->...c", post, total)
    d_post = jnp.einsum("...nc,...c->...n", total, output_wide)
    d_res = jnp.einsum("...ic,...jc->...ij", total, streams)
    d_flat = d_streams.reshape(flat.shape).astype(flat.dtype)
    return d_flat, d_output.astype(output.dtype), d_post, d_res, d_pre, d_phi


Branch = Callable[[Any, Array], Array]


def apply_branches(
    branches: Sequence[Branch],
    params: Sequence[tuple[StreamParams, Any]],
    x: Float[Array, "*tokens C"],
    config: StreamConfig,
    *,
    block_length: int = 1,
    implementation: Implementation = None,
) -> Float[Array, "*tokens C"]:
    """A network of L equal layers on n streams, as a scan over boundaries.

    Expands x, runs the branches of a layer one after another, L times, and takes the mean of the streams: what
    `streams.apply_layers` does of layers that `streams.wrap`. The scan carries flat streams, a branch's output and its
    maps, so that its steps are boundaries and no step reads what the one before has just written.

    Args:
        branches: of one layer, in their order: `branch(params, x)`, of the shape and dtype of x.
        params: for each branch those of its maps and its own; leaves have a leading axis of length L.
        config: of all maps.
        block_length: as of `streams.apply_layers`: of how many layers the streams are kept once.
        implementation: as of `boundary`.

    Raises:
        ValueError: if block_length does not divide L; as `boundary`.
        TypeError: as `boundary`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from mhc_jax.streams import StreamConfig, init_params
        >>> config = StreamConfig(4)
        >>> maps = jax.vmap(lambda layer: init_params(config, 8, layer))(jnp.arange(6))
        >>> apply_branches([lambda w, x: x @ w], [(maps, jnp.ones((6, 8, 8)))], jnp.ones((2, 8)), config).shape
        (2, 8)
    """
    depth = jax.tree.leaves(params)[0].shape[0]
    if block_length < 1 or depth % block_length:
        raise ValueError(f"block_length must divide the depth {depth}, got {block_length}")
    n, lead, dtype = config.streams, x.shape[:-1], jnp.promote_types(x.dtype, jnp.float32)
    flat_shape = (*lead, n * x.shape[-1])
    # The first boundary passes the streams on: H_res is 1, and no branch has written.
    first = (
        jnp.concatenate([x] * n, axis=-1),
        jnp.zeros_like(x),
        jnp.zeros((*lead, n), dtype),
        jnp.broadcast_to(jnp.eye(n, dtype=dtype), (*lead, n, n)),
    )

    def layer(carry: tuple[Array, ...], params: Any) -> tuple[tuple[Array, ...], None]:
        flat, output, post, res = carry
        for branch, (maps_params, branch_params) in zip(branches, params, strict=True):
            flat, h, post, res = flat_boundary(
                maps_params, flat, output, post, res, config, implementation=implementation
            )
            output = branch(branch_params, h)
        return (flat, output, post, res), None

    if block_length == 1:
        flat, output, post, res = jax.lax.scan(layer, first, params)[0]
    else:

        def keep(_: Any, *inputs: Any, **options: Any) -> bool:
            # Everything but what has the shape of the streams, which only boundaries handle.
            shapes = [value.shape for value in inputs] + [options.get("shape")]
            return flat_shape not in shapes and (*lead, n, x.shape[-1]) not in shapes

        block = jax.checkpoint(lambda carry, params: jax.lax.scan(layer, carry, params), policy=keep, prevent_cse=False)
        blocks = jax.tree.map(lambda p: p.reshape(-1, block_length, *p.shape[1:]), params)
        flat, output, post, res = jax.lax.scan(block, first, blocks)[0]
    return reduce(_parted(_mixed(flat, output, post, res), n))
