"""Whole models, each short enough to read in one sitting."""

from mhc_torch.models.cache import KVCache
from mhc_torch.models.config import DecoderConfig, RopeScaling
from mhc_torch.models.decoder import Decoder
from mhc_torch.models.loss import cross_entropy

__all__ = ["Decoder", "DecoderConfig", "KVCache", "RopeScaling", "cross_entropy"]
