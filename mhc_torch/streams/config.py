"""The options of streams, in one value."""

import math
from dataclasses import dataclass
from typing import Literal

MAX_STREAMS = 16


_MAX_PERMUTED = 6  # 6! = 720 logits a token; 7! = 5040 would outgrow the streams themselves


@dataclass(frozen=True)
class StreamConfig:
    """What the maps are, as one value.

    Args:
        streams: number n of residual streams, 1 to 16.
        constraint: the set that the residual map lies in.
            "sinkhorn": doubly stochastic by Sinkhorn-Knopp (mHC, arXiv 2512.24880), n*n logits;
            "permutations": convex mixture of all n! permutation matrices (mHC-lite, arXiv 2601.05732), n at most 6;
            "kronecker": Kronecker product of such mixtures, one per prime factor of n (KromHC, arXiv 2601.21579);
            "none": hyper-connections (HC, arXiv 2409.19606): all three maps are `alpha * tanh(.) + bias`. Projection
            and norm stay those of mHC, so that a comparison shows what the constraint does and nothing else.
        iterations: Sinkhorn iterations, of use to "sinkhorn" alone.
        dynamic: whether the maps depend on the streams. Static maps are the bias alone.
        epsilon: DeepSeek-V4's `hc_eps`, added to H_pre and inside Sinkhorn (see `sinkhorn`); the paper has 0.
        norm_epsilon: added to the mean square of the norm.

    Raises:
        ValueError: if a value is outside its range.
    """

    streams: int = 4
    constraint: Literal["sinkhorn", "permutations", "kronecker", "none"] = "sinkhorn"
    iterations: int = 20
    dynamic: bool = True
    epsilon: float = 0.0
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be between 1 and {MAX_STREAMS}, got {self.streams}")
        if self.constraint not in ("sinkhorn", "permutations", "kronecker", "none"):
            raise ValueError(
                f"constraint must be 'sinkhorn', 'permutations', 'kronecker' or 'none', got {self.constraint!r}"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.epsilon < 0 or self.norm_epsilon < 0:
            raise ValueError(f"epsilon and norm_epsilon must not be negative, got {self.epsilon}, {self.norm_epsilon}")
        if (largest := max(self.factors, default=1)) > _MAX_PERMUTED:
            raise ValueError(
                f"constraint={self.constraint!r} with streams={self.streams} needs {largest}! permutations; "
                f"{_MAX_PERMUTED}! is the most: use 'kronecker' with a streams that has small factors, or 'sinkhorn'"
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Sizes of the permutation mixtures that the residual map is the Kronecker product of; empty if it is none."""
        if self.constraint == "permutations":
            return (self.streams,)
        if self.constraint == "kronecker":
            return _prime_factors(self.streams)
        return ()

    @property
    def residual_logits(self) -> int:
        if self.constraint in ("permutations", "kronecker"):
            return sum(math.factorial(f) for f in self.factors)
        return self.streams**2

    @property
    def logits(self) -> int:
        """Logits a token: n for H_pre, n for H_post, then those of H_res, in this order."""
        return 2 * self.streams + self.residual_logits


def _prime_factors(n: int) -> tuple[int, ...]:
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return () if smallest is None else (smallest, *_prime_factors(n // smallest))
