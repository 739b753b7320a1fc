"""Modules with history or streams around a branch, under the state-dict keys of the `mhc` package."""

from mhc_torch.history.window import HistoryBuffer
from mhc_torch.nn.conv import MHCBasicBlock, MHCBottleneck, MHCConv2d, share_history
from mhc_torch.nn.hyper_connections import HyperConnections, StreamHead, StreamStack
from mhc_torch.nn.matrix_skip import MatrixMHCSkip
from mhc_torch.nn.sequential import MHCSequential
from mhc_torch.nn.skip import MHCSkip

__all__ = [
    "HistoryBuffer",
    "HyperConnections",
    "MHCBasicBlock",
    "MHCBottleneck",
    "MHCConv2d",
    "MHCSequential",
    "MHCSkip",
    "MatrixMHCSkip",
    "StreamHead",
    "StreamStack",
    "share_history",
]
