"""The three maps of streams, from the streams of the same token by one product of all their entries.

    logits = alpha * (RMSNorm(vec X) phi) + bias,    H_pre = sigmoid,  H_post = 2 sigmoid,  H_res = a constraint's

What public models do otherwise, `StreamConfig` says. Maps are float32 whatever the dtype of the streams (float64 for
float64 streams), also under autocast.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mhc_torch.following import followed, full_precision
from mhc_torch.history.mixing import check_arithmetic
from mhc_torch.streams.config import StreamConfig
from mhc_torch.streams.constraints import CONSTRAINTS
from mhc_torch.streams.norm import NORMS, normalizer
from mhc_torch.streams.starts import STARTS


class Maps(NamedTuple):
    pre: Float[Tensor, "*tokens n"]
    post: Float[Tensor, "*tokens n"]
    res: Float[Tensor, "*tokens n n"]


def initial_bias(config: StreamConfig, layer_index: int = 0) -> Float[Tensor, " m"]:
    """The bias with which, for phi = 0, a network of streams computes what the plain residual network does.

    H_pre reads half of its input from stream `layer_index` mod n and the other half evenly from all: the weights sum
    to 1, so equal streams are read as one, and as they differ the streams get different gradients and part. H_post
    is 1 (or near the most that `config.post_scale` allows), and the rows of H_res sum to 1: how near it is to the
    identity, `config.start` says ("none": it is the identity). In float64.
    """
    n = config.streams
    # In float64, so that the weights of a float64 model sum to 1 as exactly as it computes.
    pre = torch.full((n,), 1 / (2 * n), dtype=torch.float64)
    pre[layer_index % n] += 1 / 2
    post = torch.ones_like(pre)
    constraint = CONSTRAINTS[config.constraint]
    res = constraint.identity(n)
    if constraint.bounded:
        # One stream is read with weight sigmoid(16) = 1 - 1e-7: the logit of exactly 1 does not exist.
        shares = pre, post / config.post_scale
        pre, post = (torch.logit(share.clamp(max=1)).clamp(max=16) for share in shares)
        res = res * STARTS[config.start].residual
    return torch.cat([pre, post, res])


def maps(
    phi: Float[Tensor, "nC m"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " m"],
    streams: Float[Tensor, "*tokens n C"],
    config: StreamConfig,
) -> Maps:
    """H_pre, H_post and H_res of every token, in float32 (float64 for float64 streams).

    Raises:
        ValueError: if `streams` has not n streams, or its width is not that of phi.
        TypeError: if `streams` is not of a floating dtype.
    """
    check_params(phi, bias, streams, config)
    with full_precision(streams):
        dtype = torch.promote_types(streams.dtype, torch.float32)
        if phi is None or alpha is None:
            pre, post, res = _maps_from_logits(bias.to(dtype), config)
            lead = streams.shape[:-2]
            return Maps(pre.expand(*lead, -1), post.expand(*lead, -1), res.expand(*lead, -1, -1))
        return maps_from_normalized(normalized_logits(streams, phi, config), alpha, bias, config)


def maps_from_normalized(
    normalized: Float[Tensor, "*tokens m"],
    alpha: Float[Tensor, "3"],
    bias: Float[Tensor, " m"],
    config: StreamConfig,
) -> Maps:
    """The maps of what `normalized_logits` gives, in its dtype."""
    dynamic = normalized if CONSTRAINTS[config.constraint].bounded else torch.tanh(normalized)
    n, dtype = config.streams, normalized.dtype
    gates = torch.cat([alpha[:1].expand(n), alpha[1:2].expand(n), alpha[2:].expand(config.residual_logits)])
    return _maps_from_logits(gates.to(dtype) * dynamic + bias.to(dtype), config)


def _maps_from_logits(logits: Tensor, config: StreamConfig) -> Maps:
    n = config.streams
    pre, post, res = logits.split([n, n, config.residual_logits], dim=-1)
    constraint = CONSTRAINTS[config.constraint]
    if constraint.bounded:
        pre, post = read_weights(pre, config), config.post_scale * torch.sigmoid(post) + config.post_epsilon
    return Maps(pre, post, constraint.residual(res, config))


def read_weights(logits: Float[Tensor, "*tokens n"], config: StreamConfig) -> Float[Tensor, "*tokens n"]:
    """H_pre of its logits, where maps are bounded, and the weights of a head."""
    return torch.sigmoid(logits) + config.read_epsilon


def normalized_logits(
    streams: Float[Tensor, "*tokens n C"], phi: Float[Tensor, "nC m"], config: StreamConfig
) -> Float[Tensor, "*tokens m"]:
    """RMSNorm(vec X) phi, or what `config.norm` has in place of RMSNorm; in float32 (float64 for float64 streams)."""
    x = streams.flatten(-2)
    if config.norm != "rms" or followed(x):
        wide = streams.to(torch.promote_types(x.dtype, torch.float32))
        normed = NORMS[config.norm](wide, config.norm_epsilon).flatten(-2)
        return normed @ phi.to(normed.dtype)
    result: Tensor = _Project.apply(x.reshape(-1, x.shape[-1]), phi, config.norm_epsilon)
    return result.reshape(*x.shape[:-1], phi.shape[-1])


class _Project(torch.autograd.Function):
    """RMSNorm(x) phi for x (T, nC); keeps x in its own dtype, and neither a wide nor a normalized copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phi: Tensor, epsilon: float) -> Tensor:
        wide, inverse_rms, _ = normalizer(x, torch.promote_types(x.dtype, torch.float32), epsilon)
        result = wide @ phi.to(wide.dtype) * inverse_rms
        ctx.save_for_backward(x, phi, result)
        ctx.epsilon = epsilon
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None]:
        x, phi, result = ctx.saved_tensors
        wide, inverse_rms, scale = normalizer(x, cotangent.dtype, ctx.epsilon)
        d_raw = cotangent * inverse_rms
        radial = (cotangent * result).sum(-1, keepdim=True) * inverse_rms.square() / phi.shape[0]
        # Transposed on the way: the tall result (nC, m) directly is the slow side of a CPU's matrix product.
        d_phi = (d_raw.T @ wide).T
        d_x = (wide * radial).addmm_(d_raw, phi.to(d_raw.dtype).T, beta=-1)
        return (d_x if scale is None else d_x * scale).to(x.dtype), d_phi.to(phi.dtype), None


def check_params(phi: Tensor | None, bias: Tensor, streams: Tensor, config: StreamConfig) -> None:
    """That the parameters of maps fit `streams`. Raises as `maps`."""
    check_streams(phi, streams, config, config.logits)
    if bias.shape != (config.logits,):
        raise ValueError(f"bias must have shape {(config.logits,)}, got {tuple(bias.shape)}")


def check_streams(phi: Tensor | None, streams: Tensor, config: StreamConfig, columns: int) -> None:
    """That `streams` are n floating-point ones, and `phi` a projection of them to so many columns.

    Raises:
        ValueError: if `streams` has not n streams, or its width is not that of phi.
        TypeError: if `streams` is no tensor, or not of a floating dtype of 16 bits or more.
    """
    if not isinstance(streams, Tensor):
        raise TypeError(f"streams must be a tensor, got {type(streams).__name__}")
    if not streams.is_floating_point():
        raise TypeError(f"streams must have a floating dtype, got {streams.dtype}")
    check_arithmetic(streams, "streams")
    if streams.ndim < 2 or streams.shape[-2] != config.streams:
        raise ValueError(
            f"streams must have shape (..., {config.streams}, width), got {tuple(streams.shape)}; "
            "expand the network's input once, before the first layer"
        )
    features = config.streams * streams.shape[-1]
    if phi is not None and phi.shape != (features, columns):
        raise ValueError(
            f"phi must have shape {(features, columns)} for streams of width {streams.shape[-1]}, "
            f"got {tuple(phi.shape)}: it was made for width {phi.shape[0] // config.streams}"
        )
