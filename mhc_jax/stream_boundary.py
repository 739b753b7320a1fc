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

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    _project,
    _write,
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
    flat = streams.reshape(*streams.shape[:-2], -1)
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
    return _boundary(params, streams, output, post, res, config, implementation)


def _parted(flat: Array, n: int) -> Array:
    return flat.reshape(*flat.shape[:-1], n, -1)


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
) -> tuple[tuple[Array, Array, Array, Array], tuple]:
    new = _write(_parted(flat, config.streams), output, post, res, implementation)
    projected = () if params.phi is None else _project(params.phi, new, config)
    maps = _next_maps(params, projected, new.shape[:-2], new.dtype, config)
    saved = params, flat, output, post, res, projected
    return (new.reshape(flat.shape), _collapse(maps.pre, new), maps.post, maps.res), saved


def _next_maps(
    params: StreamParams, projected: tuple[Array, ...], lead: tuple[int, ...], dtype: jnp.dtype, config: StreamConfig
) -> Maps:
    """Maps of the next branch from vec(X') phi and 1 / rms(vec X'), or from the bias alone."""
    if projected:
        return _maps_from_raw(*projected, params.alpha, params.bias, config)
    static = _maps_from_logits(params.bias.astype(jnp.promote_types(dtype, jnp.float32)), config)
    return Maps(*(jnp.broadcast_to(m, lead + m.shape) for m in static))


def _backward(
    config: StreamConfig, implementation: Implementation, saved: tuple, cotangents: tuple[Array, Array, Array, Array]
) -> tuple:
    params, flat, output, post, res, projected = saved
    d_new, d_input, d_post, d_res = cotangents
    n, dtype = config.streams, res.dtype
    streams, d_new = _parted(flat, n), _parted(d_new, n).astype(dtype)
    new = _write(streams, output, post, res, implementation).astype(dtype)
    next_maps = partial(_next_maps, lead=new.shape[:-2], dtype=flat.dtype, config=config)
    (pre, _, _), pullback = jax.vjp(next_maps, params, projected)
    d_pre = jnp.einsum("...c,...nc->...n", d_input.astype(dtype), new)
    d_params, d_projected = pullback(Maps(d_pre, d_post, d_res))
    # All that arrives at the new streams, summed before it is rounded.
    total = d_new + pre[..., None] * d_input.astype(dtype)[..., None, :]
    if projected:
        (d_raw, d_inverse_rms), (_, inverse_rms) = d_projected, projected
        phi, flat_new, tokens = params.phi, new.reshape(flat.shape), tuple(range(d_raw.ndim - 1))
        radial = -d_inverse_rms * inverse_rms**3 / phi.shape[0]
        total += _parted(jnp.matmul(d_raw, phi.astype(dtype).T) + radial * flat_new, n)
        # Transposed on the way: the tall result (nC, m) directly is the slow side of a CPU's matrix product.
        d_phi = jnp.tensordot(d_raw, flat_new, (tokens, tokens)).T.astype(phi.dtype)
        d_params = d_params._replace(phi=d_phi)
    d_streams = jnp.zeros_like(total)
    for i in range(n):
        d_streams += res[..., i, :, None] * total[..., i, None, :]
    d_output = jnp.einsum("...n,...nc->...c", post, total)
    d_post = jnp.einsum("...nc,...c->...n", total, output.astype(dtype))
    d_res = jnp.einsum("...ic,...jc->...ij", total, streams.astype(dtype))
    return d_params, d_streams.reshape(flat.shape).astype(flat.dtype), d_output.astype(output.dtype), d_post, d_res


_boundary.defvjp(_forward, _backward)
