"""How maps start, each way under its name: with equal streams the network is the residual one whichever it is.

Equal streams stay equal under any rows that sum to 1, so H_res need not start as the identity.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """What a new layer's maps are.

    Attributes:
        residual: what the residual logits of the identity are multiplied by, under constraints that are bounded.
        gates: the gates alpha, by which the maps depend on the token.
    """

    residual: float
    gates: float


STARTS: dict[str, Start] = {
    # Residual logits 0 and -8, as mHC-lite and KromHC; gates of the paper's table 5. Gradients of H_res are tiny.
    "identity": Start(residual=1.0, gates=0.01),
    # Residual logits 0 and -2, so that what is learned moves H_res as it moves the other maps.
    "mixed": Start(residual=0.25, gates=1.0),
}
