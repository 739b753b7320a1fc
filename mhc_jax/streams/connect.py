"""A branch connected to streams: read its input from them, write its output back; and the two ends of a network."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mhc_jax.kernels import stream_read as read_kernels
from mhc_jax.kernels import stream_write as write_kernels
from mhc_jax.kernels.choice import Implementation, check_implementation, implemented
from mhc_jax.meshes import Axes, alike, on_parts, total, vary, varying, whole_size, without
from mhc_jax.streams import forms
from mhc_jax.streams.config import StreamConfig
from mhc_jax.streams.constraints import CONSTRAINTS
from mhc_jax.streams.maps import (
    HeadParams,
    Maps,
    StreamParams,
    check_norm,
    check_params,
    check_streams,
    maps,
    maps_from_normalized,
    normalized_logits,
    raw_logits,
    read_weights,
)


def read(
    params: StreamParams,
    streams: Float[Array, "*tokens n C"],
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*tokens C"], Float[Array, "*tokens n"], Float[Array, "*tokens n n"] | None]:
    """The branch's input H_pre X, and the maps H_post and H_res for `write`; None is an H_res that mixes nothing.

    Kept for backward: the streams themselves and `config.logits` + 1 numbers a token; the maps are computed again.
    With a norm other than "rms" those numbers, too.

    Args:
        implementation: "pallas" for the kernels of `mhc_jax.kernels.stream_read` and `mhc_jax.kernels.sinkhorn`, "xla"
            for what XLA fuses, None for the choice of `mhc_jax.kernels.choice`. Static maps are small and always
            XLA's.

    Raises:
        ValueError: if `streams` has not n streams, or its width is not that of `params`; "pallas" for a norm that the
            kernels have not.
        TypeError: if `streams` is not of a floating dtype.
    """
    check_params(params, streams, config)
    check_single_pass(config, False)
    check_implementation(implementation)
    if params.phi is not None and config.norm != "rms":
        check_norm(config, implementation)

    def of_part(phi: Array | None, alpha: Array | None, bias: Array, streams: Array, over: Axes) -> tuple[Array, ...]:
        if phi is None or alpha is None:
            return _read_plainly(StreamParams(phi, alpha, bias), streams, config, over)
        if config.norm != "rms":
            plainly = jax.checkpoint(_read_plainly, static_argnums=(2, 3))
            return plainly(StreamParams(phi, alpha, bias), streams, config, over)
        phi, streams = alike(phi, streams)
        few = without(varying(streams), over)
        return _read(phi, *vary(few, (alpha, bias)), streams, config, implementation, over)

    x, post, res = on_parts(
        of_part, "nc,m a m ...nc -> ...c ...n ...nn", *params, streams, implementation=implementation
    )
    return x, post, res if CONSTRAINTS[config.constraint].mixes else None


def _read_plainly(params: StreamParams, streams: Array, config: StreamConfig, over: Axes) -> tuple[Array, Array, Array]:
    pre, post, res = maps(params, streams, config, over)
    return _collapse(pre, streams, None), post, res


def collapse(
    pre: Float[Array, "*tokens n"], streams: Float[Array, "*tokens n C"], *, implementation: Implementation = None
) -> Float[Array, "*tokens C"]:
    """The branch's input H_pre X, in the dtype of the streams."""

    def of_part(streams: Array, pre: Array, over: Axes) -> Array:
        return _collapse(pre, streams, implementation)

    return on_parts(of_part, "...nc ...n -> ...c", streams, pre, implementation=implementation)


def _collapse(pre: Array, streams: Array, implementation: Implementation) -> Array:
    return implemented("stream_read", implementation, read_kernels.collapse, _collapse_by_xla)(pre, streams)


def _collapse_by_xla(pre: Array, streams: Array) -> Array:
    return jnp.einsum("...n,...nc->...c", pre, streams.astype(pre.dtype)).astype(streams.dtype)


def _collapse_weights_by_xla(d_input: Array, streams: Array, *, dtype: Any) -> Array:
    return jnp.einsum("...c,...nc->...n", d_input.astype(dtype), streams.astype(dtype))


# Where features are split, phi and the streams vary `over` axes of the mesh, over which all else is the same.


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _read(
    phi: Array,
    alpha: Array,
    bias: Array,
    streams: Array,
    config: StreamConfig,
    implementation: Implementation,
    over: Axes,
) -> tuple[Array, Array, Array]:
    raw, inverse_rms = raw_logits(phi, streams, config, implementation, over)
    pre, post, res = maps_from_normalized(raw * inverse_rms, alpha, bias, config, implementation)
    return _collapse(pre, streams, implementation), post, res


def _read_fwd(
    phi: Array,
    alpha: Array,
    bias: Array,
    streams: Array,
    config: StreamConfig,
    implementation: Implementation,
    over: Axes,
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    raw, inverse_rms = raw_logits(phi, streams, config, implementation, over)
    # By `jax.vjp`, which puts the forward pass of `sinkhorn` in its place: a Hessian needs derivatives of both modes.
    maps_of = partial(maps_from_normalized, config=config, implementation=implementation)
    (pre, post, res), _ = jax.vjp(maps_of, raw * inverse_rms, alpha, bias)
    return (_collapse(pre, streams, implementation), post, res), (
        phi,
        alpha,
        bias,
        streams,
        raw,
        inverse_rms,
    )


def _read_bwd(
    config: StreamConfig,
    implementation: Implementation,
    over: Axes,
    saved: tuple[Array, ...],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
    phi, alpha, bias, streams, raw, inverse_rms = saved
    d_input, d_post, d_res = cotangents
    dtype = raw.dtype
    normalized = raw * inverse_rms
    maps_again = partial(maps_from_normalized, config=config, implementation=implementation)
    (pre, _, _), pullback = jax.vjp(maps_again, normalized, alpha, bias)
    weights = implemented("stream_read", implementation, read_kernels.collapse_weights, _collapse_weights_by_xla)
    d_pre = total(weights(d_input, streams, dtype=dtype), over)
    d_normalized, d_alpha, d_bias = pullback(Maps(d_pre, d_post, d_res))
    # Through 1 / rms, vec(X) gets radial * (vec(X) / rms). No factor here is the square of a stream, or of 1 / rms.
    d_raw = d_normalized * inverse_rms
    size = whole_size(phi.shape[0], over)
    radial = -jnp.sum(d_normalized * normalized, axis=-1, keepdims=True) * inverse_rms / size
    backward = implemented("stream_read", implementation, read_kernels.backward, _backward_by_xla)
    d_streams, d_phi = backward(streams, phi.astype(dtype), pre, d_input, d_raw, radial, inverse_rms)
    return d_phi.astype(phi.dtype), d_alpha, d_bias, d_streams


def _backward_by_xla(
    streams: Array, phi: Array, pre: Array, d_input: Array, d_raw: Array, radial: Array, inverse_rms: Array
) -> tuple[Array, Array]:
    dtype = phi.dtype
    wide = streams.astype(dtype)
    through_phi, d_phi = forms.projected_back(wide, phi, d_raw)
    through_norm = radial[..., None] * (wide * inverse_rms[..., None])
    d_streams = through_phi + through_norm + pre[..., None] * d_input.astype(dtype)[..., None, :]
    return d_streams.astype(streams.dtype), d_phi


_read.defvjp(_read_fwd, _read_bwd)


def write(
    streams: Float[Array, "*tokens n C"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"] | None,
    *,
    implementation: Implementation = None,
) -> Float[Array, "*tokens n C"]:
    """H_res X + H_post^T y: the streams after a branch whose output is y.

    Args:
        res: H_res; None is the identity, which costs nothing.
        implementation: "pallas" for the kernels of `mhc_jax.kernels.stream_write`, "xla" for what XLA fuses, None for
            the choice of `mhc_jax.kernels.choice`.

    Raises:
        ValueError: if the output has not the shape of one stream.
        TypeError: if the streams cannot hold the dtype of the output, as bfloat16 cannot float32.
    """
    expected = (*streams.shape[:-2], streams.shape[-1])
    if jnp.shape(output) != expected:
        raise ValueError(f"the branch must keep the shape of its input {expected}, its output has {jnp.shape(output)}")
    check_implementation(implementation)

    def of_part(*arrays: Array | None, over: Axes) -> Array:
        return _write(*alike(*arrays), implementation)

    layout = "...nc ...c ...n ...nn -> ...nc"
    arrays = streams, fitted(output, streams.dtype), post, res
    return on_parts(of_part, layout, *arrays, implementation=implementation)


def fitted(output: Float[Array, "*tokens C"], dtype: Any) -> Float[Array, "*tokens C"]:
    """The output of a branch in the dtype of the streams, which must hold it exactly."""
    if jnp.promote_types(output.dtype, dtype) != dtype:
        raise TypeError(f"the output of the branch must fit into the streams, {dtype}, and has {output.dtype}")
    return output.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _write(streams: Array, output: Array, post: Array, res: Array | None, implementation: Implementation) -> Array:
    return implemented("stream_write", implementation, _write_by_kernel, forms.merged)(streams, output, post, res)


def _write_by_kernel(streams: Array, output: Array, post: Array, res: Array | None) -> Array:
    return write_kernels.write(streams, output, post, forms.mixing(res, post))


def _write_fwd(
    streams: Array, output: Array, post: Array, res: Array | None, implementation: Implementation
) -> tuple[Array, tuple[Array | None, ...]]:
    merged = implemented("stream_write", implementation, _write_by_kernel, forms.merged)(streams, output, post, res)
    return merged, (streams, output, post, res)


def _write_bwd(
    implementation: Implementation, saved: tuple[Array | None, ...], cotangent: Array
) -> tuple[Array | None, ...]:
    return implemented("stream_write", implementation, _write_backward_by_kernel, _write_backward_by_xla)(
        cotangent, *saved
    )


def _write_backward_by_kernel(
    cotangent: Array, streams: Array, output: Array, post: Array, res: Array | None
) -> tuple[Array | None, ...]:
    mixing = forms.mixing(res, post)
    *gradients, d_res = write_kernels.write_backward(cotangent, streams, output, post, mixing)
    return *gradients, None if res is None else d_res


def _write_backward_by_xla(
    cotangent: Array, streams: Array, output: Array, post: Array, res: Array | None
) -> tuple[Array | None, ...]:
    d = cotangent.astype(post.dtype)
    d_streams = forms.mixed_back(res, d)
    d_output = jnp.einsum("...n,...nc->...c", post, d)
    d_post = jnp.einsum("...nc,...c->...n", d, output.astype(post.dtype))
    d_res = None if res is None else jnp.einsum("...ic,...jc->...ij", d, streams.astype(post.dtype))
    return d_streams.astype(streams.dtype), d_output.astype(output.dtype), d_post, d_res


_write.defvjp(_write_fwd, _write_bwd)


def check_single_pass(config: StreamConfig, asked: bool) -> None:
    """A ValueError where a branch is to read by the H_pre of another branch than `config` says."""
    if config.single_pass != asked:
        other = "`single_pass`, which carries H_pre" if config.single_pass else "`read`, `wrap` or `boundary`"
        raise ValueError(f"config.single_pass must be {asked} here, got {config.single_pass}: use {other}")


def single_pass(
    branch: Callable[..., Array], config: StreamConfig, *, implementation: Implementation = None
) -> Callable[..., tuple[Array, Array]]:
    """As `wrap`, of a branch that reads by the H_pre of the branch before: `config.single_pass`.

    `connected(params, streams, pre, *args, **kwargs)` gives the streams, and H_pre for the branch after. The first
    branch reads the first stream (`first_read`); by what the last one gives, `collapse` ends the network. So the maps
    of a branch can be found while it runs.

    Args:
        implementation: as of `read` and `write`; derivatives of the maps are XLA's.

    Raises:
        ValueError: `config.single_pass` is not set; as `read`.
        TypeError: as `read`.

    Source: DeepSeek-V4.1, as Megatron-LM has it under `mhc_single_pass`.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.streams import collapse, expand, first_read, init_params
        >>> config = StreamConfig(4, single_pass=True)
        >>> streams = expand(jnp.ones((2, 8)), 4)
        >>> pre = first_read(streams)
        >>> for layer in range(3):
        ...     streams, pre = single_pass(jnp.tanh, config)(init_params(config, 8, layer), streams, pre)
        >>> collapse(pre, streams).shape
        (2, 8)
    """
    check_single_pass(config, True)
    check_implementation(implementation)

    def connected(params: StreamParams, streams: Array, pre: Array, *args: Any, **kwargs: Any) -> tuple[Array, Array]:
        check_params(params, streams, config)
        following, post, res = maps_alone(params, streams, config, implementation)
        output = branch(collapse(pre, streams, implementation=implementation), *args, **kwargs)
        return write(streams, output, post, res, implementation=implementation), following

    return connected


@partial(jax.checkpoint, static_argnums=(2, 3))  # of the maps nothing is kept but the streams
def maps_alone(
    params: StreamParams, streams: Array, config: StreamConfig, implementation: Implementation
) -> tuple[Array, Array, Array | None]:
    """H_pre, H_post and H_res, None where it mixes nothing, of streams that are read by other maps."""

    def of_part(phi: Array | None, alpha: Array | None, bias: Array, streams: Array, over: Axes) -> tuple[Array, ...]:
        return tuple(maps(StreamParams(phi, alpha, bias), streams, config, over, implementation))

    pre, post, res = on_parts(
        of_part, "nc,m a m ...nc -> ...n ...n ...nn", *params, streams, implementation=implementation
    )
    return pre, post, res if CONSTRAINTS[config.constraint].mixes else None


def first_read(streams: Float[Array, "*tokens n C"]) -> Float[Array, "*tokens n"]:
    """The H_pre by which the first branch of a single pass reads: the first stream, and no other."""
    first = jnp.zeros(streams.shape[-2], jnp.promote_types(streams.dtype, jnp.float32)).at[0].set(1)
    return jnp.broadcast_to(first, streams.shape[:-1])


def wrap(
    branch: Callable[..., Array], config: StreamConfig, *, implementation: Implementation = None
) -> Callable[..., Array]:
    """`branch(x, *args, **kwargs)` on one stream becomes `connected(params, streams, *args, **kwargs)` on n of them.

    Args:
        implementation: as of `read` and `write`.
    """

    def connected(params: StreamParams, streams: Array, *args: Any, **kwargs: Any) -> Array:
        x, post, res = read(params, streams, config, implementation=implementation)
        return write(streams, branch(x, *args, **kwargs), post, res, implementation=implementation)

    return connected


def expand(x: Float[Array, "*tokens C"], streams: int) -> Float[Array, "*tokens n C"]:
    """n copies of x. Once, before the first layer. A ValueError if `streams`, n, is below 1."""
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], streams, x.shape[-1]))


def reduce(streams: Float[Array, "*tokens n C"], how: Literal["mean", "sum"] = "mean") -> Float[Array, "*tokens C"]:
    """The mean or the sum of the streams. Once, after the last layer. `head` is the learned way."""
    if how not in ("mean", "sum"):
        raise ValueError(f"how must be 'mean' or 'sum', got {how!r}")
    total = jnp.sum(streams, axis=-2, dtype=jnp.promote_types(streams.dtype, jnp.float32))
    return (total / streams.shape[-2] if how == "mean" else total).astype(streams.dtype)


def head(
    params: HeadParams,
    streams: Float[Array, "*tokens n C"],
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> Float[Array, "*tokens C"]:
    """Learned reduction of the streams by a map like H_pre, as DeepSeek-V4 ends (`DeepseekV4HyperHead`).

    Args:
        implementation: as of `read`; derivatives are XLA's.

    Raises:
        ValueError, TypeError: as `read`.
    """
    check_streams(params.phi, streams, config, config.streams)
    check_implementation(implementation)

    def of_part(phi: Array, alpha: Array, bias: Array, streams: Array, over: Axes) -> Array:
        normalized = normalized_logits(phi, streams, config, implementation, over)
        return _collapse(read_weights(alpha * normalized + bias, config), streams, implementation)

    return on_parts(of_part, "nc,m a m ...nc -> ...c", *params, streams, implementation=implementation)
