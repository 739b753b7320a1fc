"""Whole models, each short enough to read in one sitting."""

from mhc_jax.models.decoder import Decoder, DecoderConfig, RopeScaling
from mhc_jax.models.loss import cross_entropy

__all__ = ["Decoder", "DecoderConfig", "RopeScaling", "cross_entropy"]
