"""The options of streams, in one hashable value."""

import math
from dataclasses import dataclass

from mhc_jax.options import check_choice, check_type, check_types
from mhc_jax.streams.constraints import CONSTRAINTS
from mhc_jax.streams.norm import NORMS
from mhc_jax.streams.starts import STARTS

MAX_STREAMS = 16


@dataclass(frozen=True)
class StreamConfig:
    """What the maps are, as a hashable value (static under jit).

    Args:
        streams: number n of residual streams, 1 to 16.
        constraint: the set that the residual map lies in, a name in `CONSTRAINTS`.
            "sinkhorn": doubly stochastic by Sinkhorn-Knopp (mHC, arXiv 2512.24880), n*n logits;
            "permutations": convex mixture of all n! permutation matrices (mHC-lite, arXiv 2601.05732), n at most 6;
            "kronecker": Kronecker product of such mixtures, one per prime factor of n (KromHC, arXiv 2601.21579);
            "identity": the streams are not mixed (Hy4), no logits;
            "none": hyper-connections (HC, arXiv 2409.19606): all three maps are `alpha * tanh(.) + bias`. Projection
            and norm stay those of mHC, so that a comparison shows what the constraint does and nothing else.
        iterations: Sinkhorn iterations, of use to "sinkhorn" alone.
        dynamic: whether the maps depend on the streams. Static maps are the bias alone.
        epsilon: DeepSeek-V4's `hc_eps`, inside Sinkhorn (see `mhc_jax.sinkhorn`) and added to H_pre; the paper has 0.
        norm_epsilon: of the norm, which says where it is added.
        start: what new maps are, a name in `STARTS`; the network computes what the residual network does either way.
            "identity": H_res is the identity to 1e-3 and hardly leaves it; "mixed": it can learn, and so can the
            dependence on the token, with gates of 1 in place of 0.01.
        pre_epsilon: added to H_pre in place of `epsilon`; None is `epsilon`.
        post_scale, post_epsilon: H_post is `post_scale * sigmoid + post_epsilon`; the paper has 2 and 0.
        order: what Sinkhorn divides by its sums first: "columns", so that rows come last (the paper), or "rows".
        norm: the norm of the streams before they are projected, a name in `NORMS`. "rms": that of all streams
            together, norm_epsilon added to the mean square (the paper); "rms_outside": norm_epsilon added to its root;
            "streams": that of each stream by itself, norm_epsilon added to its mean square.
        single_pass: a branch reads by the H_pre of the branch before, not by its own, so that the streams are passed
            over once (DeepSeek-V4.1); for `single_pass` alone, which carries H_pre from branch to branch.

    Unbounded maps ("none") have neither `epsilon` nor what is said of H_pre and H_post here. `streams.conventions` has
    the values of public models.

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
    start: str = "identity"
    pre_epsilon: float | None = None
    post_scale: float = 2.0
    post_epsilon: float = 0.0
    order: str = "columns"
    norm: str = "rms"
    single_pass: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be between 1 and {MAX_STREAMS}, got {self.streams}")
        check_choice("constraint", self.constraint, CONSTRAINTS)
        check_choice("start", self.start, STARTS)
        check_choice("order", self.order, ("columns", "rows"))
        check_choice("norm", self.norm, NORMS)
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.pre_epsilon is not None:
            check_type("pre_epsilon", self.pre_epsilon, float)
        added = {name: getattr(self, name) for name in ("epsilon", "norm_epsilon", "post_epsilon")}
        for name, value in (added | {"pre_epsilon": self.read_epsilon}).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not 0 < self.post_scale < math.inf:
            raise ValueError(f"post_scale must be finite and positive, got {self.post_scale}")
        CONSTRAINTS[self.constraint].logits(self.streams)  # whether the set exists for so many streams

    @property
    def read_epsilon(self) -> float:
        """What is added to H_pre."""
        return self.epsilon if self.pre_epsilon is None else self.pre_epsilon

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
