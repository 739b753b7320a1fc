"""Whole models, each short enough to read in one sitting."""

from mhc_jax.models.cache import KVCache
from mhc_jax.models.config import DecoderConfig, RopeScaling
from mhc_jax.models.decoder import Decoder
from mhc_jax.models.loss import cross_entropy
from mhc_jax.models.resnet import MHCResNet

__all__ = ["Decoder", "DecoderConfig", "KVCache", "MHCResNet", "RopeScaling", "cross_entropy"]
