"""History: a window of earlier states, mixed into one residual stream."""

from mhc_jax.history.config import MHCConfig
from mhc_jax.history.mixing import mix, mixing_weights
from mhc_jax.history.scan import apply_layers, apply_layers_carrying, apply_layers_reference
from mhc_jax.history.window import History, State

__all__ = [
    "History",
    "MHCConfig",
    "State",
    "apply_layers",
    "apply_layers_carrying",
    "apply_layers_reference",
    "mix",
    "mixing_weights",
]
