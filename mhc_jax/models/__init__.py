"""Whole models, short enough to read in one sitting."""

from mhc_jax.models.resnet import MHCResNet
from mhc_jax.models.transformer import MHCTransformer

__all__ = ["MHCResNet", "MHCTransformer"]
