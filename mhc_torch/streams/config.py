"""The options of streams, in one value."""

import math
from dataclasses import dataclass

from mhc_torch.options import check_choice, check_types
from mhc_torch.streams.constraints import CONSTRAINTS

MAX_STREAMS = 16


@dataclass(frozen=True)
class StreamConfig:
    """What the maps are, as one value.

    Args:
        streams: number n of residual streams, 1 to 16.
        constraint: the set that the residual map lies in, a name in `CONSTRAINTS`.
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
        TypeError: a field has the wrong type.
        ValueError: a field has a value outside its range.
    """

    streams: int = 4
    constraint: str = "sinkhorn"
    iterations: int = 20
    dynamic: bool = True
    epsilon: float = 0.0
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be between 1 and {MAX_STREAMS}, got {self.streams}")
        check_choice("constraint", self.constraint, CONSTRAINTS)
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        for name in ("epsilon", "norm_epsilon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        CONSTRAINTS[self.constraint].logits(self.streams)  # whether the set exists for so many streams

    @property
    def residual_logits(self) -> int:
        """Logits a token of H_res."""
        return CONSTRAINTS[self.constraint].logits(self.streams)

    @property
    def logits(self) -> int:
        """Logits a token: n for H_pre, n for H_post, then those of H_res, in this order."""
        return 2 * self.streams + self.residual_logits


DEFAULTS = StreamConfig()
"""What modules use for the options that they are not given."""
