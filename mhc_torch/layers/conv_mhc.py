"""An import path of the `mhc` package; see `mhc_torch.nn.conv`."""

from mhc_torch.nn.conv import MHCBasicBlock, MHCBottleneck, MHCConv2d

__all__ = ["MHCBasicBlock", "MHCBottleneck", "MHCConv2d"]
