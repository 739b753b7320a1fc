"""An import path of the `mhc` package; see `mhc_torch.nn.matrix_skip`."""

from mhc_torch.nn.matrix_skip import MatrixMHCSkip

__all__ = ["MatrixMHCSkip"]
