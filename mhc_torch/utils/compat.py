"""An import path of the `mhc` package; see `mhc_torch.training.compile`."""

from mhc_torch.training.compile import autocast_context, compile_model

__all__ = ["autocast_context", "compile_model"]
