"""Flax NNX modules with history or streams: a thin skin on the functions of `mhc_jax`; and `retrofit`, for a model that
exists.

Images are channels last, (B, H, W, C), as everywhere in Flax. `model.train()` and `model.eval()` switch dropout,
batch statistics and the noise of stochastic mixing.
"""

from mhc_jax.nn.blocks import MHCBasicBlock, MHCBottleneck
from mhc_jax.nn.conv import MHCConv
from mhc_jax.nn.hyper_connections import HyperConnections, StreamHead, StreamStack
from mhc_jax.nn.matrix_skip import MatrixMHCSkip
from mhc_jax.nn.parameters import ConnectionParam
from mhc_jax.nn.retrofitting import register_block, retrofit, unretrofit
from mhc_jax.nn.sequential import MHCSequential
from mhc_jax.nn.skip import MHCSkip
from mhc_jax.nn.stack import MHCStack

__all__ = [
    "ConnectionParam",
    "HyperConnections",
    "MHCBasicBlock",
    "MHCBottleneck",
    "MHCConv",
    "MHCSequential",
    "MHCSkip",
    "MHCStack",
    "MatrixMHCSkip",
    "StreamHead",
    "StreamStack",
    "register_block",
    "retrofit",
    "unretrofit",
]
