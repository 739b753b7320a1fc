"""The boundary between two branches of n streams: the write of one and the read of the next, in one pass.

    X' = res X + post y        with the maps of the branch whose output is y      arXiv 2512.24880, equation 3
    maps' = maps(X')           of the branch that comes next                      equations 7 to 9
    x' = pre' X'               its input

Backward, X' is built again from X and y, and what arrives at the streams from the branch, the norm, the projection and
the streams behind is summed in the dtype of the maps before it is stored.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mhc_torch.following import followed, full_precision
from mhc_torch.kernels import stream_boundary as kernels
from mhc_torch.kernels.choice import Implementation
from mhc_torch.streams import forms, norm
from mhc_torch.streams.config import StreamConfig
from mhc_torch.streams.connect import check_single_pass, collapse, fitted, read, write
from mhc_torch.streams.constraints import CONSTRAINTS
from mhc_torch.streams.maps import check_params, maps, maps_from_normalized, normalized_logits, read_weights

Boundary = tuple[
    Float[Tensor, "*tokens n C"],
    Float[Tensor, "*tokens C"],
    Float[Tensor, "*tokens n"],
    Float[Tensor, "*tokens n n"] | None,
]
"""The streams, the input of the next branch, and its H_post and H_res."""


def boundary(
    phi: Float[Tensor, "nC m"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " m"],
    streams: Float[Tensor, "*tokens n C"],
    output: Float[Tensor, "*tokens C"],
    post: Float[Tensor, "*tokens n"],
    res: Float[Tensor, "*tokens n n"] | None,
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> Boundary:
    """`write(streams, output, post, res)`, and `read(phi, alpha, bias, .)` of what that gives.

    Kept for backward: the streams, the output, and the few numbers of the maps. Second derivatives, and whoever
    follows each operation (see `mhc_torch.following`), go by `write` and `read` themselves.

    Args:
        phi, alpha, bias: of the maps of the branch that comes next; of static maps the first two are None.
        streams, output, post, res: as of `write`: what the branch before read, its output and its maps. A res of None
            is the identity.
        config: of the maps.
        implementation: as of `read`.

    Returns:
        The streams X', the input x' of the next branch, and its H_post and H_res, None where it mixes nothing.

    Raises:
        ValueError: if the shapes do not fit each other or the parameters, `config.single_pass` is set, or "triton"
            asked for where the kernels cannot run.
        TypeError: if the streams are not of a floating dtype, or cannot hold the output's.

    Source: arXiv 2512.24880, section 4.3.1 fuses parts of it.

    Example:
        >>> import torch
        >>> from mhc_torch import HyperConnections
        >>> from mhc_torch.streams import boundary, expand, read
        >>> first, second = (HyperConnections(torch.nn.Identity(), 8, layer_index=i) for i in range(2))
        >>> streams = expand(torch.ones(2, 8), 4)
        >>> x, post, res = read(first.phi, first.alpha, first.bias, streams, first.config)
        >>> maps = second.phi, second.alpha, second.bias
        >>> streams, x, post, res = boundary(*maps, streams, 2 * x, post, res, second.config)
        >>> streams.shape, x.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 8]))
    """
    check_single_pass(config, False)
    check_params(phi, bias, streams, config)
    output = fitted(output, streams)
    *lead, n, width = streams.shape
    if post.shape != (*lead, n) or (res is not None and res.shape != (*lead, n, n)):
        raise ValueError(
            f"post and res must have shapes {(*lead, n)} and {(*lead, n, n)}, got {tuple(post.shape)} and "
            f"{None if res is None else tuple(res.shape)}"
        )
    if kernels.reads(implementation, phi, alpha, bias, streams, config, output, post, res):
        assert phi is not None
        assert alpha is not None
        return kernels.boundary(phi, alpha, bias, streams, output, post, res, config)
    arguments = phi, alpha, bias, streams, output, post, res, config
    if followed(streams):
        return _written_and_read(*arguments)
    if phi is not None and config.norm != "rms":
        # Nothing is kept but the arguments.
        found: Boundary = checkpoint(_written_and_read, *arguments, use_reentrant=False, preserve_rng_state=False)
        return found
    with full_precision(streams):
        old = streams.reshape(-1, n, width), output.reshape(-1, width), post.reshape(-1, n)
        mixing = None if res is None else res.reshape(-1, n, n)
        if phi is None or alpha is None:
            static = maps(phi, alpha, bias, streams, config)
            new, x = _StaticBoundary.apply(*old, mixing, static.pre.reshape(-1, n))
            _, following, next_res = static
        else:
            gate, own_bias = alpha[:1].expand(n).to(post.dtype), bias[:n].to(post.dtype)
            new, x, normalized = _Boundary.apply(*old, mixing, phi, gate, own_bias, config)
            _, following, next_res = maps_from_normalized(normalized, alpha, bias, config)
            following, next_res = following.reshape(*lead, n), next_res.reshape(*lead, n, n)
    mixes = CONSTRAINTS[config.constraint].mixes
    return new.reshape(streams.shape), x.reshape(output.shape), following, next_res if mixes else None


def _written_and_read(
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    streams: Tensor,
    output: Tensor,
    post: Tensor,
    res: Tensor | None,
    config: StreamConfig,
) -> Boundary:
    new = write(streams, output, post, res, implementation="torch")
    return new, *read(phi, alpha, bias, new, config, implementation="torch")


class _Boundary(torch.autograd.Function):
    """streams (T, n, C), output (T, C), post (T, n), res (T, n, n) or None, and what the next H_pre is made of.

    Gives X', x', and the normalized logits (T, m), of which the other maps are made behind it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        output: Tensor,
        post: Tensor,
        res: Tensor | None,
        phi: Tensor,
        gate: Tensor,
        bias: Tensor,
        config: StreamConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = streams, output, post, res, phi.to(post.dtype), gate, bias
        new, x, raw, inverse_rms = _forward_by_torch(*arguments, config=config)
        normalized = raw * inverse_rms
        ctx.config = config
        ctx.save_for_backward(streams, output, post, res, phi, gate, bias, normalized, inverse_rms)
        return new, x, normalized

    @staticmethod
    def backward(ctx: Any, d_new: Tensor, d_input: Tensor, d_normalized: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, normalized, inverse_rms = ctx.saved_tensors
        if _differentiated_again():
            return *_derived(_dynamic, inputs, ctx.config, (d_new, d_input, d_normalized)), None
        streams, output, post, res, phi, gate, bias = inputs
        n, size = gate.shape[0], phi.shape[0]
        with full_precision(d_new):
            own = normalized[:, :n]
            pre, (slope, by_gate, by_bias) = _pre(ctx.config, own, gate, bias), _slopes(ctx.config, own, gate, bias)
            # Through 1 / rms X' gets radial * (X' / rms). No factor here is the square of a stream, or of 1 / rms. What
            # arrives through H_pre is known only once X' is built again: the rest of d_raw and radial comes with it.
            radial = -(d_normalized * normalized).sum(-1, keepdim=True) * inverse_rms / size
            projected = phi.to(post.dtype), slope * inverse_rms, -own / size, d_normalized * inverse_rms, radial
            *gradients, d_pre, d_phi = _backward_by_torch(
                streams, output, post, res, pre, d_new, d_input, *projected, inverse_rms
            )
            return *gradients, d_phi.to(phi.dtype), (d_pre * by_gate).sum(0), (d_pre * by_bias).sum(0), None


class _StaticBoundary(torch.autograd.Function):
    """As `_Boundary`, by an H_pre (T, n) that the streams have no part in."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, output: Tensor, post: Tensor, res: Tensor | None, pre: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(streams, output, post, res, pre)
        new = forms.merged(streams, output, post, res)
        return new, forms.weighted(pre, new.to(pre.dtype)).to(new.dtype)

    @staticmethod
    def backward(ctx: Any, d_new: Tensor, d_input: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if _differentiated_again():
            return _derived(_static, inputs, None, (d_new, d_input))
        with full_precision(d_new):
            return _backward_by_torch(*inputs, d_new, d_input)


def _forward_by_torch(
    streams: Tensor,
    output: Tensor,
    post: Tensor,
    res: Tensor | None,
    phi: Tensor,
    gate: Tensor,
    bias: Tensor,
    *,
    config: StreamConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X', x', vec(X') phi and 1 / rms(vec X')."""
    new = forms.merged(streams, output, post, res)
    wide = new.to(post.dtype)
    raw, inverse_rms = wide.flatten(1) @ phi, norm.inverse_rms(wide.flatten(1), config.norm_epsilon)
    pre = _pre(config, raw[:, : config.streams] * inverse_rms, gate, bias)
    return new, forms.weighted(pre, wide).to(new.dtype), raw, inverse_rms


def _backward_by_torch(
    streams: Tensor,
    output: Tensor,
    post: Tensor,
    res: Tensor | None,
    pre: Tensor,
    d_new: Tensor,
    d_input: Tensor,
    *dynamic: Tensor,
) -> tuple[Any, ...]:
    """What arrives at streams, output, post, res and the next H_pre, and at phi if maps are dynamic."""
    n, dtype = post.shape[-1], post.dtype
    new, d_input = forms.merged(streams, output, post, res).to(dtype), d_input.to(dtype)
    d_pre = forms.inner(d_input, new)
    # All that arrives at the new streams, summed before it is rounded.
    total = torch.addcmul(d_new.to(dtype).contiguous(), pre[..., None], d_input[:, None])
    d_phis = []
    if dynamic:
        phi, slope, pull, d_raw, radial, inverse_rms = dynamic
        d_own = d_pre * slope
        d_raw = torch.cat([d_raw[:, :n] + d_own, d_raw[:, n:]], -1)
        radial = radial + (d_own * pull).sum(-1, keepdim=True)
        # Transposed on the way: the tall result (nC, m) directly is the slow side of a CPU's matrix product.
        d_phis = [(d_raw.T @ new.flatten(1)).T]
        total = total.flatten(1).addmm_(d_raw, phi.T).view_as(total)
        total.addcmul_(radial[..., None], new * inverse_rms[..., None])
    d_streams = forms.mixed_back(res, total).to(streams.dtype)
    d_output, d_post = forms.weighted(post, total).to(output.dtype), forms.inner(output.to(dtype), total)
    d_res = None if res is None else torch.bmm(total, streams.to(dtype).mT)
    return d_streams, d_output, d_post, d_res, d_pre, *d_phis


def _pre(config: StreamConfig, normalized: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """H_pre of its normalized logits."""
    if CONSTRAINTS[config.constraint].bounded:
        return read_weights(gate * normalized + bias, config)
    return gate * torch.tanh(normalized) + bias


def _slopes(config: StreamConfig, normalized: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of `_pre` by its normalized logits, by the gate and by the bias."""
    if CONSTRAINTS[config.constraint].bounded:
        share = torch.sigmoid(gate * normalized + bias)
        slope = share * (1 - share)
        return slope * gate, slope * normalized, slope
    dynamic = torch.tanh(normalized)
    return (1 - dynamic * dynamic) * gate, dynamic, torch.ones_like(dynamic)


# Second derivatives are rarely asked for, and are those of the parts. -------------------------------------------------


def _differentiated_again() -> bool:
    """Whether the backward pass that runs has to be one that torch can differentiate; a compiler has no such pass."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


def _dynamic(config: StreamConfig, *inputs: Any) -> tuple[Tensor, ...]:
    *old, phi, gate, bias = inputs
    new = write(*old, implementation="torch")
    normalized = normalized_logits(new, phi, config)
    return new, collapse(_pre(config, normalized[:, : config.streams], gate, bias), new), normalized


def _static(_: None, *inputs: Any) -> tuple[Tensor, ...]:
    *old, pre = inputs
    new = write(*old, implementation="torch")
    return new, collapse(pre, new)


def _derived(
    parts: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], config: Any, cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The derivatives of `parts(config, *inputs)`, by operations that torch can differentiate."""
    with full_precision(cotangents[0]):
        # Each input by another name: one may depend on another.
        own = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        wanted = [tensor for tensor in own if tensor is not None and tensor.requires_grad]
        pairs = [pair for pair in zip(parts(config, *own), cotangents, strict=True) if pair[0].requires_grad]
        results, arrived = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(results, wanted, arrived, create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in own)
