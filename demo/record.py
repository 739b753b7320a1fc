"""What one training run leaves behind, the same for both frameworks, so that the report need not know which it was."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Run:
    """One trained network."""

    name: str
    losses: Float[np.ndarray, "steps"]
    accuracies: Float[np.ndarray, "epochs"]
    """Held-out accuracy after each epoch, in [0, 1]."""
    seconds: float
    gradient_norms: Float[np.ndarray, "depth"]
    """Norm of each layer's gradient at the first step, input side first."""
    weights: Float[np.ndarray, "depth window"] | None = None
    """The learned mixing weights, oldest state first; None where nothing is mixed."""
    entropy_steps: Int[np.ndarray, "points"] | None = None
    entropy: Float[np.ndarray, "points depth"] | None = None
    """Shannon entropy of each layer's weights, in nats, at `entropy_steps`."""


@dataclass(frozen=True)
class Check:
    """One thing that was compared, and how the comparison came out."""

    what: str
    measured: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.allowed  # False for NaN too

    def __str__(self) -> str:
        return f"{self.what}: {self.measured:.2g}, {'within' if self.passed else 'NOT WITHIN'} {self.allowed:.0g}"
