"""The learned map by which past states of another width join the mix."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MATERIALIZING = threading.Lock()


class _Shapeless(nn.UninitializedParameter):
    """A parameter whose shape is not known yet. It counts as none, so that parameters can be counted at any time."""

    def numel(self) -> int:
        return 0


class WidthMap(nn.Module):
    """A linear map, without bias, from the width of past states to that of the present one.

    Tensors of four axes are images (B, C, H, W), mapped by a 1x1 convolution; of all others the last axis is mapped.
    The widths show at the first forward that needs the map, but the parameter exists from the start, so that an
    optimizer made earlier and a state dict loaded earlier find it. Until then state dicts leave it out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = _Shapeless()

    def forward(self, states: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """The states, those whose shape is not that of `x` mapped to its width.

        Raises:
            ValueError: a state differs from x in more than its width, or from what this map takes.
        """
        return [state if state.shape == x.shape else self._map(state, x) for state in states]

    @staticmethod
    def maps(state: Tensor, x: Tensor) -> bool:
        """Whether the two differ in nothing but their width."""
        if state.ndim != x.ndim:
            return False
        axis = 1 if x.ndim == 4 else -1
        return state.movedim(axis, -1).shape[:-1] == x.movedim(axis, -1).shape[:-1]

    def _map(self, state: Tensor, x: Tensor) -> Tensor:
        axis = 1 if x.ndim == 4 else -1
        if not self.maps(state, x):
            raise ValueError(
                f"auto_project maps the width only: history has a state of shape {tuple(state.shape)}, "
                f"x has {tuple(x.shape)}"
            )
        if isinstance(self.weight, nn.UninitializedParameter):
            image_axes = (1, 1) if x.ndim == 4 else ()
            shape = (x.shape[axis], state.shape[axis], *image_axes)
            self._materialize(shape, x)
        if self.weight.shape[:2] != (x.shape[axis], state.shape[axis]):
            raise ValueError(
                f"this width map takes width {self.weight.shape[1]} to {self.weight.shape[0]}, "
                f"history has width {state.shape[axis]}, x {x.shape[axis]}: all past states may have one other width, "
                "so change it once in max_history layers, or outside of the stack"
            )
        return F.conv2d(state, self.weight) if x.ndim == 4 else F.linear(state, self.weight)

    def _materialize(self, shape: tuple[int, ...], like: Tensor) -> None:
        weight: Any = self.weight
        with _MATERIALIZING:
            if isinstance(self.weight, nn.UninitializedParameter):  # or another thread was here first
                # Not by its own method: other threads must not meet a parameter without numbers.
                weight.data = nn.init.kaiming_uniform_(like.new_empty(shape), a=math.sqrt(5))  # as torch.nn.Linear
                weight.__class__ = nn.Parameter

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not isinstance(self.weight, nn.UninitializedParameter):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if isinstance(self.weight, nn.UninitializedParameter):
            if prefix + "weight" not in state_dict:
                return
            with torch.no_grad():
                self.weight.materialize(state_dict[prefix + "weight"].shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)
