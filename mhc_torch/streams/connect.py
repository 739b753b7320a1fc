"""A branch connected to streams: read its input from them, write its output back; and the two ends of a network."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mhc_torch.following import followed, full_precision
from mhc_torch.history.mixing import autocasts
from mhc_torch.kernels import stream_boundary as kernels
from mhc_torch.kernels.choice import Implementation
from mhc_torch.streams import forms
from mhc_torch.streams.config import StreamConfig
from mhc_torch.streams.constraints import CONSTRAINTS
from mhc_torch.streams.maps import check_params, maps


class _Collapse(torch.autograd.Function):
    """pre (T, n), streams (T, n, C) -> (T, C), in the streams' dtype."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, streams: Tensor) -> Tensor:
        ctx.save_for_backward(pre, streams)
        return forms.weighted(pre, streams.to(pre.dtype)).to(streams.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        pre, streams = ctx.saved_tensors
        d = cotangent.to(pre.dtype)
        return forms.inner(d, streams.to(pre.dtype)), (pre[..., None] * d[:, None]).to(streams.dtype)


class _Write(torch.autograd.Function):
    """streams (T, n, C), output (T, C), post (T, n), res (T, n, n) or None -> streams (T, n, C)."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, output: Tensor, post: Tensor, res: Tensor | None) -> Tensor:
        ctx.save_for_backward(None if res is None else streams, output, post, res)
        return forms.merged(streams, output, post, res)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        streams, output, post, res = ctx.saved_tensors
        d = cotangent.to(post.dtype).contiguous()
        d_output, d_post = forms.weighted(post, d).to(output.dtype), forms.inner(output.to(post.dtype), d)
        if res is None:
            return cotangent, d_output, d_post, None
        d_streams = forms.mixed_back(res, d).to(streams.dtype)
        return d_streams, d_output, d_post, torch.bmm(d, streams.to(res.dtype).mT)


def read(
    phi: Float[Tensor, "nC m"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " m"],
    streams: Float[Tensor, "*tokens n C"],
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> tuple[Float[Tensor, "*tokens C"], Float[Tensor, "*tokens n"], Float[Tensor, "*tokens n n"] | None]:
    """The branch's input H_pre X, and the maps H_post and H_res for `write`; None is an H_res that mixes nothing.

    Args:
        implementation: "triton" for the kernels of `mhc_torch.kernels.stream_boundary`, for streams whose squares sum
            up to what float32 holds (below about 1e19); "torch" for operations of torch, of any size; None for the
            kernels wherever they can run, which is on a GPU.

    Raises:
        ValueError: if `config.single_pass` is set; "triton" where the kernels cannot run; as `maps`.
        TypeError: as `maps`.
    """
    check_single_pass(config, False)
    check_params(phi, bias, streams, config)
    if kernels.reads(implementation, phi, alpha, bias, streams, config):
        assert phi is not None
        assert alpha is not None
        return kernels.read(phi, alpha, bias, streams, config)
    pre, post, res = maps(phi, alpha, bias, streams, config)
    return collapse(pre, streams), post, res if CONSTRAINTS[config.constraint].mixes else None


def collapse(pre: Float[Tensor, "*tokens n"], streams: Float[Tensor, "*tokens n C"]) -> Float[Tensor, "*tokens C"]:
    """The branch's input H_pre X, in the dtype of the streams."""
    with full_precision(streams):
        if followed(streams):
            return (pre[..., None] * streams.to(pre.dtype)).sum(-2).to(streams.dtype)
        result: Tensor = _Collapse.apply(pre.reshape(-1, pre.shape[-1]), streams.reshape(-1, *streams.shape[-2:]))
    return result.reshape(*streams.shape[:-2], streams.shape[-1])


def write(
    streams: Float[Tensor, "*tokens n C"],
    output: Float[Tensor, "*tokens C"],
    post: Float[Tensor, "*tokens n"],
    res: Float[Tensor, "*tokens n n"] | None,
    *,
    implementation: Implementation = None,
) -> Float[Tensor, "*tokens n C"]:
    """H_res X + H_post^T y: the streams after a branch whose output is y.

    Args:
        res: H_res; None is the identity, which costs nothing.
        implementation: as of `read`.

    Raises:
        ValueError: if the output has not the shape of one stream; "triton" where the kernels cannot run.
        TypeError: if the streams cannot hold the dtype of the output, as bfloat16 cannot float32; autocast casts it.
    """
    output = fitted(output, streams)
    if kernels.writes(implementation, streams, output, post, res):
        return kernels.write(streams, output, post, res)
    n, width = streams.shape[-2:]
    with full_precision(streams):
        if followed(streams):
            old = streams.to(post.dtype)
            mixed = (old if res is None else res @ old) + post[..., None] * output.to(post.dtype)[..., None, :]
            return mixed.to(streams.dtype)
        mixing = None if res is None else res.reshape(-1, n, n)
        result: Tensor = _Write.apply(
            streams.reshape(-1, n, width), output.reshape(-1, width), post.reshape(-1, n), mixing
        )
    return result.reshape(streams.shape)


def fitted(output: Tensor, streams: Float[Tensor, "*tokens n C"]) -> Float[Tensor, "*tokens C"]:
    """The output of a branch in the dtype of the streams. Raises as `write`."""
    expected = (*streams.shape[:-2], streams.shape[-1])
    if output.shape != expected:
        raise ValueError(
            f"the branch must keep the shape of its input {expected}, its output has {tuple(output.shape)}"
        )
    if output.dtype == streams.dtype:
        return output
    if torch.promote_types(output.dtype, streams.dtype) != streams.dtype and not autocasts(streams.device.type):
        raise TypeError(f"the output of the branch must fit into the streams, {streams.dtype}, and has {output.dtype}")
    return output.to(streams.dtype)


def check_single_pass(config: StreamConfig, asked: bool) -> None:
    """A ValueError where a branch is to read by the H_pre of another branch than `config` says."""
    if config.single_pass != asked:
        other = "`single_pass`, which carries H_pre" if config.single_pass else "`around` or a call"
        raise ValueError(f"config.single_pass must be {asked} here, got {config.single_pass}: use {other}")


def first_read(streams: Float[Tensor, "*tokens n C"]) -> Float[Tensor, "*tokens n"]:
    """The H_pre by which the first branch of a single pass reads: the first stream, and no other."""
    first = torch.zeros(streams.shape[-2], dtype=torch.promote_types(streams.dtype, torch.float32))
    first[0] = 1
    return first.to(streams.device).expand(*streams.shape[:-1])


def expand(x: Float[Tensor, "*tokens C"], streams: int) -> Float[Tensor, "*tokens n C"]:
    """n copies of x. Once, before the first layer. A ValueError if `streams`, n, is below 1."""
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    # Copies and not views of one: products of batches run one by one for matrices whose rows share their memory.
    return x[..., None, :].expand(*x.shape[:-1], streams, x.shape[-1]).contiguous()


def reduce(streams: Float[Tensor, "*tokens n C"], how: Literal["mean", "sum"] = "mean") -> Float[Tensor, "*tokens C"]:
    """The mean or the sum of the streams. Once, after the last layer. `StreamHead` is the learned way."""
    if how not in ("mean", "sum"):
        raise ValueError(f"how must be 'mean' or 'sum', got {how!r}")
    return streams.mean(-2) if how == "mean" else streams.sum(-2)
