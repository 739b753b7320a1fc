"""The three maps of streams, from the streams of the same token by one product of all their entries.

    logits = alpha * (RMSNorm(vec X) phi) + bias,    H_pre = sigmoid,  H_post = 2 sigmoid,  H_res = a constraint's

What public models do otherwise, `StreamConfig` says. Maps are float32 whatever the dtype of the streams (float64 for
float64 streams).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.kernels import stream_read as read_kernels
from mhc_jax.kernels.choice import Implementation, implemented, refuse_kernels
from mhc_jax.meshes import Axes, total
from mhc_jax.streams import forms, norm
from mhc_jax.streams.config import StreamConfig
from mhc_jax.streams.constraints import CONSTRAINTS
from mhc_jax.streams.norm import NORMS
from mhc_jax.streams.starts import STARTS


class StreamParams(NamedTuple):
    """Parameters of one layer's maps; `phi` and `alpha` are None for static maps. m = `config.logits`."""

    phi: Float[Array, "nC m"] | None
    alpha: Float[Array, "3"] | None
    bias: Float[Array, " m"]


class HeadParams(NamedTuple):
    """Parameters of `head`."""

    phi: Float[Array, "nC n"]
    alpha: Float[Array, "1"]
    bias: Float[Array, " n"]


class Maps(NamedTuple):
    pre: Float[Array, "*tokens n"]
    post: Float[Array, "*tokens n"]
    res: Float[Array, "*tokens n n"]


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


def init_params(
    config: StreamConfig, width: int, layer_index: int | Array = 0, dtype: Any = jnp.float32
) -> StreamParams:
    """Parameters with which a network of streams computes what the plain residual network does.

    phi is 0. H_pre reads half of its input from stream `layer_index` mod n and the other half evenly from all: the
    weights sum to 1, so equal streams are read as one, and as they differ the streams get different gradients and part.
    H_post is 1 (or near the most that `config.post_scale` allows), and the rows of H_res sum to 1: how near it is to
    the identity ("none": it is the identity), and the gates alpha, `config.start` says.

    Args:
        width: features C of one stream.
        layer_index: which wrapped branch of the network this is, counted from 0; may be traced.
    """
    _check_width(width)
    n = config.streams
    constraint, start = CONSTRAINTS[config.constraint], STARTS[config.start]
    res = constraint.identity(n)
    pre, post = 1 / (2 * n) + jnp.where(jnp.arange(n) == layer_index % n, 1 / 2, 0), jnp.ones(n)
    if constraint.bounded:
        # One stream is read with weight sigmoid(16) = 1 - 1e-7: the logit of exactly 1 does not exist.
        shares = pre, post / config.post_scale
        pre, post = (jnp.minimum(jax.scipy.special.logit(jnp.minimum(share, 1)), 16) for share in shares)
        res = res * start.residual
    bias = jnp.concatenate([pre, post, res]).astype(dtype)
    if not config.dynamic:
        return StreamParams(None, None, bias)
    return StreamParams(jnp.zeros((n * width, config.logits), dtype), jnp.full(3, start.gates, dtype), bias)


def maps(
    params: StreamParams,
    streams: Float[Array, "*tokens n C"],
    config: StreamConfig,
    over: Axes = (),
    implementation: Implementation = None,
) -> Maps:
    """H_pre, H_post and H_res of every token, in float32 (float64 for float64 streams).

    Args:
        over: as of `raw_logits`.
    """
    check_params(params, streams, config)
    lead = streams.shape[:-2]
    dtype = jnp.promote_types(streams.dtype, jnp.float32)
    if params.phi is None or params.alpha is None:
        static = _maps_from_logits(params.bias.astype(dtype), config)
        return Maps(*(jnp.broadcast_to(m, lead + m.shape) for m in static))
    normalized = normalized_logits(params.phi, streams, config, implementation, over)
    return maps_from_normalized(normalized, params.alpha, params.bias, config, implementation)


def normalized_logits(
    phi: Array, streams: Array, config: StreamConfig, implementation: Implementation = None, over: Axes = ()
) -> Array:
    """RMSNorm(vec X) phi, or what `config.norm` has in place of RMSNorm.

    Args:
        over: as of `raw_logits`.

    Raises:
        ValueError: "pallas" for a norm that the kernels have not.
    """
    if config.norm == "rms":
        raw, inverse_rms = raw_logits(phi, streams, config, implementation, over)
        return raw * inverse_rms
    check_norm(config, implementation)
    wide = streams.astype(jnp.promote_types(streams.dtype, jnp.float32))
    normed = NORMS[config.norm](wide, config.norm_epsilon, over)
    return total(forms.projected(normed, phi.astype(wide.dtype)), over)


def check_norm(config: StreamConfig, implementation: Implementation) -> None:
    """The kernels norm as the paper; a ValueError where they are asked for, and the norm is another."""
    if config.norm != "rms":
        refuse_kernels(implementation, "norm", config.norm, "'rms'")


def raw_logits(
    phi: Array, streams: Array, config: StreamConfig, implementation: Implementation = None, over: Axes = ()
) -> tuple[Array, Array]:
    """vec(X) phi, and 1 / rms(vec X): normalizing after the projection spares a normalized copy of the streams.

    Of the norm "rms" alone, as are the derivatives of `read` and `boundary` that use it.

    Args:
        over: axes of the mesh that features are split over: one sum over them makes both.
    """
    phi = phi.astype(jnp.promote_types(streams.dtype, jnp.float32))
    project = implemented("stream_read", implementation, read_kernels.project, _project_by_xla)
    raw, squares = project(streams, phi, epsilon=config.norm_epsilon)
    if over:
        raw, squares = jnp.split(total(jnp.concatenate([raw, squares], -1), over), [raw.shape[-1]], -1)
    return raw, norm.inverse_rms_of(forms.flattened(streams).astype(phi.dtype), squares, config.norm_epsilon, over)


def _project_by_xla(streams: Array, phi: Array, *, epsilon: float) -> tuple[Array, Array]:
    wide = streams.astype(phi.dtype)
    return forms.projected(wide, phi), norm.squares(forms.flattened(wide), epsilon)


def maps_from_normalized(
    normalized: Array,
    alpha: Array,
    bias: Array,
    config: StreamConfig,
    implementation: Implementation = None,
) -> Maps:
    sizes = np.array([config.streams, config.streams, config.residual_logits])
    gates = jnp.repeat(alpha.astype(normalized.dtype), sizes, total_repeat_length=config.logits)
    dynamic = normalized if CONSTRAINTS[config.constraint].bounded else jnp.tanh(normalized)
    return _maps_from_logits(gates * dynamic + bias.astype(normalized.dtype), config, implementation)


def _maps_from_logits(logits: Array, config: StreamConfig, implementation: Implementation = None) -> Maps:
    n = config.streams
    pre, post, res = jnp.split(logits, [n, 2 * n], axis=-1)
    constraint = CONSTRAINTS[config.constraint]
    if constraint.bounded:
        pre, post = read_weights(pre, config), config.post_scale * jax.nn.sigmoid(post) + config.post_epsilon
    return Maps(pre, post, constraint.residual(res, config, implementation))


def read_weights(logits: Float[Array, "*tokens n"], config: StreamConfig) -> Float[Array, "*tokens n"]:
    """H_pre of its logits, where maps are bounded, and the weights of a head."""
    return jax.nn.sigmoid(logits) + config.read_epsilon


def init_head_params(config: StreamConfig, width: int, dtype: Any = jnp.float32) -> HeadParams:
    """Parameters of `head` with which it starts as the mean of the streams.

    Raises:
        ValueError: width is below 1.
    """
    _check_width(width)
    n = config.streams
    bias = jnp.full(n, 16 if n == 1 else -math.log(n - 1), dtype)
    return HeadParams(jnp.zeros((n * width, n), dtype), jnp.full(1, 0.01, dtype), bias)


def check_params(params: StreamParams, streams: Array, config: StreamConfig) -> None:
    check_streams(params.phi, streams, config, config.logits)
    if params.bias.shape != (config.logits,):
        raise ValueError(f"bias must have shape {(config.logits,)}, got {params.bias.shape}")


def check_streams(phi: Array | None, streams: Array, config: StreamConfig, columns: int) -> None:
    if not jnp.issubdtype(streams.dtype, jnp.floating) or streams.dtype.itemsize < 2:
        raise TypeError(f"streams must have a floating dtype, got {streams.dtype}: 16 bits at least")
    if streams.ndim < 2 or streams.shape[-2] != config.streams:
        raise ValueError(
            f"streams must have shape (..., {config.streams}, width), got {streams.shape}; "
            "expand the network's input once, before the first layer"
        )
    features = config.streams * streams.shape[-1]
    if phi is not None and phi.shape != (features, columns):
        raise ValueError(
            f"phi must have shape {(features, columns)} for streams of width {streams.shape[-1]}, got {phi.shape}: "
            f"it was made for width {phi.shape[0] // config.streams}"
        )
