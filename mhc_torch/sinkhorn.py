"""Sinkhorn-Knopp in the log domain as operators of torch, with memory that does not grow with the iterations."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mhc_torch.following import followed


def sinkhorn(
    logits: Float[Tensor, "*batch n n"], iterations: int = 20, epsilon: float = 0.0
) -> Float[Tensor, "*batch n n"]:
    """exp(logits), then `iterations` times: columns divided by their sums, rows divided by their sums. Rows come last.

    Sinkhorn and Knopp (1967), in the order of equation 9 of arXiv 2512.24880. The first iteration is taken in the
    log domain; after it every row sums to 1, so that every later row and column sum lies in [1/n, n] and the
    following iterations are safe in plain arithmetic, for any finite logits. The derivative is that of the iterations
    themselves; backward runs them again instead of keeping them.

    Args:
        epsilon: DeepSeek-V4's `hc_eps`: added to the matrix after the first column normalization, and to every sum
            after it. With 0 the result is the paper's.
    """
    if followed(logits):
        return _plain_sinkhorn(logits, iterations, epsilon, columns=-2, rows=-1)
    # The batch goes last, where it fills the vector unit.
    matrices = logits.flatten(0, -3).permute(1, 2, 0) if logits.ndim > 2 else logits[..., None]
    result: Tensor = _sinkhorn(matrices.contiguous(), iterations, epsilon)
    return result.permute(2, 0, 1).contiguous().reshape(logits.shape)


# Operators of their own, on matrices of shape (n, n, batch): a compiler that sees into the loop unrolls it, which takes
# minutes to compile and comes out slower.
@torch.library.custom_op("mhc_torch::sinkhorn", mutates_args=())
def _sinkhorn(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
    return _sinkhorn_loop(logits, iterations, epsilon)[0]


@torch.library.custom_op("mhc_torch::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(logits: Tensor, cotangent: Tensor, iterations: int, epsilon: float) -> Tensor:
    columns, first = _sinkhorn_start(logits, epsilon)
    matrix, sums = _sinkhorn_loop(logits, iterations, epsilon)
    # Cotangents are of the logarithm of the matrix: there a normalization subtracts a weighted sum. Since
    # matrix = next * sums, each iterate is rebuilt from its successor.
    log_cotangent = matrix * cotangent
    for column_sums, row_sums in reversed(sums):
        log_cotangent.addcmul_(matrix, log_cotangent.sum(1, keepdim=True), value=-1)
        matrix *= row_sums
        log_cotangent.addcmul_(matrix, log_cotangent.sum(0, keepdim=True), value=-1)
        matrix *= column_sums
    log_cotangent.addcmul_(first, log_cotangent.sum(1, keepdim=True), value=-1)
    if epsilon:
        log_cotangent *= columns / (columns + epsilon)
    return log_cotangent.addcmul_(columns, log_cotangent.sum(0, keepdim=True), value=-1)


@_sinkhorn.register_fake
def _(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
    return torch.empty_like(logits)


@_sinkhorn_backward.register_fake
def _(logits: Tensor, cotangent: Tensor, iterations: int, epsilon: float) -> Tensor:
    return torch.empty_like(logits)


def _sinkhorn_save(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
    logits, ctx.iterations, ctx.epsilon = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_grad(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return _sinkhorn_backward(logits, cotangent.contiguous(), ctx.iterations, ctx.epsilon), None, None


_sinkhorn.register_autograd(_sinkhorn_grad, setup_context=_sinkhorn_save)


def _sinkhorn_backward_save(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
    logits, cotangent, ctx.iterations, ctx.epsilon = inputs
    ctx.save_for_backward(logits, cotangent)


def _sinkhorn_backward_grad(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is rarely asked for, and is that of the plain iterations."""
    with torch.enable_grad():
        logits, first = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        matrix = _plain_sinkhorn(logits, ctx.iterations, ctx.epsilon, columns=0, rows=1)
        (gradient,) = torch.autograd.grad(matrix, logits, first, create_graph=True)
    return *torch.autograd.grad(gradient, (logits, first), cotangent), None, None


_sinkhorn_backward.register_autograd(_sinkhorn_backward_grad, setup_context=_sinkhorn_backward_save)


def _plain_sinkhorn(logits: Tensor, iterations: int, epsilon: float, columns: int, rows: int) -> Tensor:
    """The iterations as operations of torch, along the axes over which columns and rows are summed."""
    _, matrix = _sinkhorn_start(logits, epsilon, columns, rows)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(columns, keepdim=True) + epsilon)
        matrix = matrix / (matrix.sum(rows, keepdim=True) + epsilon)
    return matrix


def _sinkhorn_start(logits: Tensor, epsilon: float, columns: int = 0, rows: int = 1) -> tuple[Tensor, Tensor]:
    """The column softmax, and what the first row normalization makes of it."""
    log_softmax = torch.log_softmax(logits, columns)
    softmax = log_softmax.exp()
    if not epsilon:
        return softmax, torch.softmax(log_softmax, rows)
    shifted = softmax + epsilon
    return softmax, shifted / (shifted.sum(rows, keepdim=True) + epsilon)


def _sinkhorn_loop(logits: Tensor, iterations: int, epsilon: float) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The result, and the column and row sums of every iteration but the first."""
    _, matrix = _sinkhorn_start(logits, epsilon)
    sums = []
    for _ in range(iterations - 1):
        columns = matrix.sum(0, keepdim=True)
        if epsilon:
            columns += epsilon
        matrix /= columns
        rows = matrix.sum(1, keepdim=True)
        if epsilon:
            rows += epsilon
        matrix /= rows
        sums.append((columns, rows))
    return matrix, sums
