"""Cross-entropy of a language model, in chunks of positions: the logits of all tokens are never in memory at once."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(
    hidden: Float[Tensor, "B T C"],
    weight: Float[Tensor, "V C"],
    targets: Int[Tensor, "B T"],
    *,
    chunk: int = 512,
) -> Float[Tensor, ""]:
    """Mean of -log softmax(hidden weight^T)[target], in nats, over the targets that count.

    The gradients of `hidden` and `weight` are taken in the forward pass, chunk by chunk, while the logits of the chunk
    are there: three matrix products in all, as if the logits had been kept, and none of them is.

    Args:
        hidden: what the output layer reads.
        weight: of the output layer; it is cast to the dtype of `hidden`, its gradient is summed in float32 at least.
        targets: the right tokens; negative ones do not count, as padding.
        chunk: positions of every sequence whose logits live at a time, (B, chunk, V) in float32.

    Returns:
        The mean in float32 (float64 for float64); 0 if no target counts, NaN if one is V or more.

    Raises:
        ValueError: shapes do not fit, or chunk is below 1.

    Source: for the gradients in the forward pass, Hsu et al. 2024, arXiv 2410.10989, section 3.2.
    """
    if hidden.ndim != 3 or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape {tuple(hidden.shape[:-1])} of hidden's tokens, got {tuple(targets.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    total: Tensor = _CrossEntropy.apply(hidden, weight, targets, chunk)
    return total / (targets >= 0).sum().clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    """The sum over the targets that count."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        cast = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[1], chunk):
            part = slice(start, start + chunk)
            rows, right = hidden[:, part].flatten(0, 1), targets[:, part].flatten()
            logits = (rows @ cast.T).to(wide)
            counts = right >= 0
            index = right.clamp(0, weight.shape[0] - 1)[:, None]
            log_sum = logits.logsumexp(-1)
            losses = torch.where(counts, log_sum - logits.gather(1, index)[:, 0], 0)
            total += torch.where(right < weight.shape[0], losses, torch.nan).sum()
            # What the logits become in place is their derivative.
            logits.sub_(log_sum[:, None]).exp_().scatter_add_(1, index, -torch.ones_like(log_sum)[:, None])
            d_logits = logits.mul_(counts[:, None]).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[:, part] = (d_logits @ cast).unflatten(0, (len(hidden), -1))
            if d_weight is not None:
                d_weight += d_logits.T @ rows
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        given = (None if saved is None else (saved * cotangent).to(saved.dtype) for saved in ctx.saved_tensors)
        return *given, None, None
