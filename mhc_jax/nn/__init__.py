"""Flax NNX modules with history mixing: a thin skin on the functions of `mhc_jax`.

Images are channels last, (B, H, W, C), as everywhere in Flax. `model.train()` and `model.eval()` switch dropout,
batch statistics and the noise of stochastic mixing.
"""

from mhc_jax.nn.conv import MHCConv
from mhc_jax.nn.hyper_connections import HyperConnections, StreamHead, StreamStack
from mhc_jax.nn.resnet import MHCBasicBlock, MHCBottleneck, MHCResNet
from mhc_jax.nn.sequential import MHCSequential
from mhc_jax.nn.skip import MatrixMHCSkip, MHCSkip
from mhc_jax.nn.stack import MHCStack

__all__ = [
    "HyperConnections",
    "MHCBasicBlock",
    "MHCBottleneck",
    "MHCConv",
    "MHCResNet",
    "MHCSequential",
    "MHCSkip",
    "MHCStack",
    "MatrixMHCSkip",
    "StreamHead",
    "StreamStack",
]
