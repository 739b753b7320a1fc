"""The sets that H_res may lie in, each under its name. One entry in `CONSTRAINTS` adds one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax.kernels import sinkhorn as sinkhorn_kernels
from mhc_jax.kernels.choice import Implementation, chosen
from mhc_jax.sinkhorn import sinkhorn

if TYPE_CHECKING:
    from mhc_jax.streams.config import StreamConfig

_MAX_PERMUTED = 6  # 6! = 720 logits a token; 7! = 5040 would outgrow the streams themselves


@dataclass(frozen=True)
class Constraint:
    """How the residual logits of a token become H_res.

    Attributes:
        logits: number n of streams -> number of logits; raises a ValueError where the set does not exist for n.
        residual: (logits (..., m), config, implementation) -> H_res (..., n, n), in the dtype of the logits.
        identity: n -> logits (m,) with which H_res is the identity, or as near to it as the set allows.
        bounded: whether H_pre is a sigmoid and H_post twice a sigmoid. If not, all three maps are
            `alpha * tanh(.) + bias` (HC, arXiv 2409.19606).
        mixes: whether H_res is anything but the identity. If not, `write` takes None for it, and mixes nothing.
        transposed: n -> the order of the logits with which H_res is the transpose of what it was.
    """

    logits: Callable[[int], int]
    residual: "Callable[[Array, StreamConfig, Implementation], Array]"
    identity: Callable[[int], np.ndarray]
    bounded: bool = True
    mixes: bool = True
    transposed: Callable[[int], list[int]] = lambda n: [j * n + i for i in range(n) for j in range(n)]


def _square(logits: Float[Array, "*tokens m"], n: int) -> Float[Array, "*tokens n n"]:
    return logits.reshape(*logits.shape[:-1], n, n)


def _sinkhorn(logits: Array, config: "StreamConfig", implementation: Implementation) -> Array:
    form = chosen("sinkhorn", implementation, sinkhorn_kernels.sinkhorn, sinkhorn)
    logits = _square(logits, config.streams)
    if config.order == "rows":
        return form(logits.mT, iterations=config.iterations, epsilon=config.epsilon).mT
    return form(logits, iterations=config.iterations, epsilon=config.epsilon)


def _mixtures(factors: Callable[[int], tuple[int, ...]]) -> Constraint:
    """The Kronecker product of a convex mixture of all permutation matrices of each size in `factors(n)`."""

    def logits(n: int) -> int:
        if (largest := max(factors(n), default=1)) > _MAX_PERMUTED:
            raise ValueError(
                f"streams={n} needs {largest}! permutations under this constraint; {_MAX_PERMUTED}! is the most: "
                "use 'kronecker' with a streams that has small factors, or 'sinkhorn'"
            )
        return sum(map(math.factorial, factors(n)))

    def residual(logits: Array, config: "StreamConfig", _: Any) -> Array:
        res = jnp.ones((*logits.shape[:-1], 1, 1), logits.dtype)
        for factor in factors(config.streams):
            weights, logits = jnp.split(logits, [math.factorial(factor)], axis=-1)
            matrices = jnp.asarray(_permutation_matrices(factor), weights.dtype)
            mixture = jnp.tensordot(jax.nn.softmax(weights), matrices, 1)
            size = res.shape[-1] * factor
            res = jnp.einsum("...ij,...kl->...ikjl", res, mixture).reshape(*res.shape[:-2], size, size)
        return res

    def identity(n: int) -> np.ndarray:
        # The identity is the first permutation of every factor.
        parts = [np.where(np.arange(math.factorial(factor)), -8.0, 0.0) for factor in factors(n)]
        return np.concatenate([np.zeros(0), *parts])

    def transposed(n: int) -> list[int]:
        # The transpose of a permutation matrix is that of the inverse permutation.
        order: list[int] = []
        for factor in factors(n):
            all_of_them = list(permutations(range(factor)))
            order += [len(order) + all_of_them.index(tuple(map(one.index, range(factor)))) for one in all_of_them]
        return order

    return Constraint(logits, residual, identity, transposed=transposed)


def _permutation_matrices(n: int) -> np.ndarray:
    """All n! of them, (n!, n, n), the identity first: [k, i, j] is 1 where permutation k sends i to j."""
    return np.eye(n)[np.array(list(permutations(range(n))))]


def _prime_factors(n: int) -> tuple[int, ...]:
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return () if smallest is None else (smallest, *_prime_factors(n // smallest))


CONSTRAINTS: dict[str, Constraint] = {
    # Doubly stochastic by Sinkhorn-Knopp: mHC, arXiv 2512.24880.
    "sinkhorn": Constraint(lambda n: n * n, _sinkhorn, lambda n: np.where(np.eye(n), 0.0, -8.0).ravel()),
    # A convex mixture of all n! permutation matrices: mHC-lite, arXiv 2601.05732.
    "permutations": _mixtures(lambda n: (n,)),
    # A Kronecker product of such mixtures, one for each prime factor of n: KromHC, arXiv 2601.21579.
    "kronecker": _mixtures(_prime_factors),
    # The identity itself, as Hy4 has it.
    "identity": Constraint(
        lambda n: 0,
        lambda logits, config, _: jnp.broadcast_to(
            jnp.eye(config.streams, dtype=logits.dtype), (*logits.shape[:-1], config.streams, config.streams)
        ),
        lambda n: np.zeros(0),
        mixes=False,
        transposed=lambda n: [],
    ),
    # Any matrix: HC, arXiv 2409.19606.
    "none": Constraint(
        lambda n: n * n,
        lambda logits, config, _: _square(logits, config.streams),
        lambda n: np.eye(n).ravel(),
        bounded=False,
    ),
}
