"""Whole models, short enough to read in one sitting."""

from mhc_torch.models.transformer import MHCTransformer

__all__ = ["MHCTransformer"]
