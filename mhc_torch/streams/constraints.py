"""The sets that H_res may lie in, each under its name. One entry in `CONSTRAINTS` adds one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mhc_torch.sinkhorn import sinkhorn

if TYPE_CHECKING:
    from mhc_torch.streams.config import StreamConfig

_MAX_PERMUTED = 6  # 6! = 720 logits a token; 7! = 5040 would outgrow the streams themselves


@dataclass(frozen=True)
class Constraint:
    """How the residual logits of a token become H_res.

    Attributes:
        logits: number n of streams -> number of logits; raises a ValueError where the set does not exist for n.
        residual: (logits (..., m), config) -> H_res (..., n, n), in the dtype of the logits.
        identity: n -> logits (m,) with which H_res is the identity, or as near to it as the set allows.
        bounded: whether H_pre is a sigmoid and H_post twice a sigmoid. If not, all three maps are
            `alpha * tanh(.) + bias` (HC, arXiv 2409.19606).
        mixes: whether H_res is anything but the identity. If not, `write` takes None for it, and mixes nothing.
        transposed: n -> the order of the logits with which H_res is the transpose of what it was.
    """

    logits: Callable[[int], int]
    residual: "Callable[[Tensor, StreamConfig], Tensor]"
    identity: Callable[[int], Tensor]
    bounded: bool = True
    mixes: bool = True
    transposed: Callable[[int], list[int]] = lambda n: [j * n + i for i in range(n) for j in range(n)]


def _square(logits: Float[Tensor, "*tokens m"], n: int) -> Float[Tensor, "*tokens n n"]:
    return logits.unflatten(-1, (n, n))


def _sinkhorn(logits: Tensor, config: "StreamConfig") -> Tensor:
    logits = _square(logits, config.streams)
    if config.order == "rows":
        return sinkhorn(logits.mT, config.iterations, config.epsilon).mT
    return sinkhorn(logits, config.iterations, config.epsilon)


def _mixtures(factors: Callable[[int], tuple[int, ...]]) -> Constraint:
    """The Kronecker product of a convex mixture of all permutation matrices of each size in `factors(n)`."""

    def logits(n: int) -> int:
        if (largest := max(factors(n), default=1)) > _MAX_PERMUTED:
            raise ValueError(
                f"streams={n} needs {largest}! permutations under this constraint; {_MAX_PERMUTED}! is the most: "
                "use 'kronecker' with a streams that has small factors, or 'sinkhorn'"
            )
        return sum(map(math.factorial, factors(n)))

    def residual(logits: Tensor, config: "StreamConfig") -> Tensor:
        res = logits.new_ones((*logits.shape[:-1], 1, 1))
        sizes = factors(config.streams)
        for factor, weights in zip(sizes, logits.split([*map(math.factorial, sizes)], dim=-1), strict=True):
            matrices = _permutation_matrices(factor).to(weights)
            mixture = torch.tensordot(torch.softmax(weights, -1), matrices, 1)
            res = (res[..., :, None, :, None] * mixture[..., None, :, None, :]).flatten(-4, -3).flatten(-2, -1)
        return res

    def identity(n: int) -> Tensor:
        # The identity is the first permutation of every factor.
        parts = [torch.tensor([0.0] + [-8.0] * (math.factorial(factor) - 1)) for factor in factors(n)]
        return torch.cat([torch.zeros(0), *parts])

    def transposed(n: int) -> list[int]:
        # The transpose of a permutation matrix is that of the inverse permutation.
        order: list[int] = []
        for factor in factors(n):
            all_of_them = list(permutations(range(factor)))
            order += [len(order) + all_of_them.index(tuple(map(one.index, range(factor)))) for one in all_of_them]
        return order

    return Constraint(logits, residual, identity, transposed=transposed)


def _permutation_matrices(n: int) -> Tensor:
    """All n! of them, (n!, n, n), the identity first: [k, i, j] is 1 where permutation k sends i to j."""
    return torch.eye(n)[torch.tensor(list(permutations(range(n))))]


def _prime_factors(n: int) -> tuple[int, ...]:
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return () if smallest is None else (smallest, *_prime_factors(n // smallest))


CONSTRAINTS: dict[str, Constraint] = {
    # Doubly stochastic by Sinkhorn-Knopp: mHC, arXiv 2512.24880.
    "sinkhorn": Constraint(lambda n: n * n, _sinkhorn, lambda n: 8 * torch.eye(n).flatten() - 8),
    # A convex mixture of all n! permutation matrices: mHC-lite, arXiv 2601.05732.
    "permutations": _mixtures(lambda n: (n,)),
    # A Kronecker product of such mixtures, one for each prime factor of n: KromHC, arXiv 2601.21579.
    "kronecker": _mixtures(_prime_factors),
    # The identity itself, as Hy4 has it.
    "identity": Constraint(
        lambda n: 0,
        lambda logits, config: torch.eye(config.streams).to(logits).expand(*logits.shape[:-1], -1, -1),
        lambda n: torch.zeros(0),
        mixes=False,
        transposed=lambda n: [],
    ),
    # Any matrix: HC, arXiv 2409.19606.
    "none": Constraint(
        lambda n: n * n,
        lambda logits, config: _square(logits, config.streams),
        lambda n: torch.eye(n).flatten(),
        bounded=False,
    ),
}
