"""Convolutions and residual blocks of image networks, with a history in place of the residual connection."""

from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.history.config import MHCConfig, resolve_config
from mhc_torch.nn.compatible import mhc_compatible
from mhc_torch.nn.shared_history import SharedHistory, first_window, live_window, span_forwards
from mhc_torch.nn.skip import MHCSkip

Input = Float[Tensor, "batch in_channels in_height in_width"]
Image = Float[Tensor, "batch channels height width"]
M = TypeVar("M", bound=nn.Module)
# The options that blocks take by position, in the order of the `mhc` package.
_POSITIONAL = ("max_history", "mode", "constraint", "epsilon", "temperature", "detach_history")


@mhc_compatible
class _HistoryBlock(nn.Module):
    """What the blocks share: a skip, and a history that is the block's own unless `share_history` joins it to others.

    The states are the outputs of blocks. A history of its own begins at every forward from the input of the block.
    """

    def __init__(self, config: MHCConfig | None, *positional: Any, **options: Any) -> None:
        super().__init__()
        config = resolve_config(config, **dict(zip(_POSITIONAL, positional, strict=True)), **options)
        self.skip = MHCSkip(config=config)
        self.history_buffer = SharedHistory(config=config)
        self.shares_history = False

    def _mix(self, branch: Image, x: Input, shortcut: nn.Module | None, activation: nn.Module | None = None) -> Image:
        history = self.history_buffer
        if shortcut is not None:
            x = shortcut(x)
            if x.shape != branch.shape:
                # A convolution that trims the edges: nothing to mix, but DDP wants every parameter in the graph.
                branch = branch + x.flatten()[:0].sum()
            elif self.shares_history:
                history.append(x)
        window = (live_window if self.shares_history else first_window)(self.skip, history, branch, x)
        x = self.skip(branch, window)
        x = x if activation is None else activation(x)
        if self.shares_history:
            history.append(x)
        return x


def share_history(model: M, clear_on_forward: bool = True) -> M:
    """Let all MHCConv2d, MHCBasicBlock and MHCBottleneck in `model` mix one history, in the order they are called.

    The history begins anew at every forward of `model`. A block mixes the states of the shape that it puts out.

    Args:
        clear_on_forward: if False, every forward goes on with the history of the last one that did not fail, until
            `clear_history()` is called on a block.

    Returns:
        The same model.

    Raises:
        ValueError: there is no such block in the model.
    """
    blocks = [part for part in model.modules() if isinstance(part, _HistoryBlock)]
    if not blocks:
        raise ValueError(f"model has no MHCConv2d, MHCBasicBlock or MHCBottleneck, got {type(model).__name__}")
    history = SharedHistory(max(block.skip.max_history for block in blocks), blocks[0].history_buffer.detach_history)
    for block in blocks:
        block.history_buffer = history
        block.shares_history = True
    span_forwards(model, [history], keep=not clear_on_forward)
    return model


class MHCConv2d(_HistoryBlock):
    """conv(x) plus the mixed history; the input joins it through a strided 1x1 convolution if channels or stride ask.

    The arguments up to `bias` are those of torch.nn.Conv2d. The others are options, fields of MHCConfig; those left out
    come from `config`, by default `get_default_config()`.

    State dicts of the `mhc` package are refused: its first forward is conv(x) alone, and later ones mix what earlier
    batches left, so that its weights make another function. `load_state_dict(dict(state))` takes them all the same.

    Raises:
        TypeError, ValueError: as MHCConfig.
    """

    _version = 2  # torch writes it beside the state; 1, its default, is that of the `mhc` package

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        max_history: int | None = None,
        mode: str | None = None,
        constraint: str | None = None,
        epsilon: float | None = None,
        temperature: float | None = None,
        detach_history: bool | None = None,
        *,
        config: MHCConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, max_history, mode, constraint, epsilon, temperature, detach_history, **options)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.needs_projection = in_channels != out_channels or stride not in (1, (1, 1))
        if self.needs_projection:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    @staticmethod
    def refusal(version: int | None) -> str | None:
        """Why a state that was saved as of this version does not fit; None if it does, or if no version is known."""
        if version != 1:
            return None
        return (
            "the state of an MHCConv2d of the mhc package: its first forward is conv(x) alone, here the history begins "
            "with the input, so that equal weights make another function. To go on from them all the same: "
            "model.load_state_dict(dict(state))"
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if refusal := self.refusal(local_metadata.get("version")):
            rest[-1].append(f"{prefix.rstrip('.') or 'the model'}: {refusal}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def forward(self, x: Input) -> Image:
        """(B, in_channels, H, W) to (B, out_channels, H', W'), as torch.nn.Conv2d."""
        return self._mix(self.conv(x), x, self.projection if self.needs_projection else None)


class MHCBasicBlock(_HistoryBlock):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + history): the block of ResNet-18 and -34.

    Args:
        stride: of the first convolution. With it, or with other channels, the history begins from downsample(x).

    The other arguments are options, fields of MHCConfig; those left out come from `config`, by default
    `get_default_config()`.

    Raises:
        TypeError, ValueError: as MHCConfig.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        max_history: int | None = None,
        mode: str | None = None,
        constraint: str | None = None,
        epsilon: float | None = None,
        temperature: float | None = None,
        detach_history: bool | None = None,
        *,
        config: MHCConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, max_history, mode, constraint, epsilon, temperature, detach_history, **options)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: Input) -> Image:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self._mix(out, x, self.downsample, self.relu)


class MHCBottleneck(_HistoryBlock):
    """relu(bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x)))))))) + history): the block of ResNet-50, -101 and -152.

    Args:
        out_channels: width of the 3x3 convolution; the block puts out `expansion` = 4 times as many channels.
        stride: of the 3x3 convolution. With it, or with other channels, the history begins from downsample(x).

    The other arguments are options, fields of MHCConfig; those left out come from `config`, by default
    `get_default_config()`.

    Raises:
        TypeError, ValueError: as MHCConfig.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        max_history: int | None = None,
        mode: str | None = None,
        constraint: str | None = None,
        epsilon: float | None = None,
        temperature: float | None = None,
        detach_history: bool | None = None,
        *,
        config: MHCConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, max_history, mode, constraint, epsilon, temperature, detach_history, **options)
        expanded = out_channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv3 = nn.Conv2d(out_channels, expanded, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(expanded)
        self.relu = nn.ReLU()
        self.downsample = _downsample(in_channels, expanded, stride)

    def forward(self, x: Input) -> Image:
        """(B, in_channels, H, W) to (B, 4 * out_channels, H / stride, W / stride), rounded up."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self._mix(out, x, self.downsample, self.relu)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
