"""HistoryBuffer: the last states of a network, kept by whoever calls the layers."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.history.config import MHCConfig, resolve_config
from mhc_torch.history.mixing import mix
from mhc_torch.options import settable


class HistoryBuffer(nn.Module):
    """The last `max_history` states, oldest first.

    It is a module so that it follows `.to()` with the model that holds it. The states are activations, no part of the
    model: `state_dict`, copies and pickles leave them out.

    Args:
        max_history: how many states are kept; appending one more drops the oldest.
        detach_history: keep the states without their graph, so that no gradient flows through history.
        config: has what is left out, by default `get_default_config()`.

    `max_history` and `detach_history` can be set later, and hold for the states that are appended from then on.

    Raises:
        TypeError, ValueError: as MHCConfig, on setting one too.
    """

    def __init__(
        self, max_history: int | None = None, detach_history: bool | None = None, *, config: MHCConfig | None = None
    ) -> None:
        super().__init__()
        self.config = resolve_config(config, max_history=max_history, detach_history=detach_history)
        self._states: list[Tensor] = []

    max_history = settable("max_history")
    detach_history = settable("detach_history")

    def append(self, x: Tensor) -> None:
        """Remember `x` as the latest state.

        Raises:
            TypeError: x is no tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        self._states = self.with_state(self._states, x)

    def with_state(self, states: list[Tensor], x: Tensor) -> list[Tensor]:
        """`states` and the state `x` after them, as this buffer would keep them: a new list."""
        return appended(states, x, self.config.max_history, self.config.detach_history)

    def replace(self, states: list[Tensor]) -> None:
        """Keep `states` in place of what is kept."""
        self._states = states

    def get(self) -> list[Tensor]:
        """The states that are kept, oldest first."""
        return list(self._states)

    def get_mixed(self, weights: Float[Tensor, "k"] | Sequence[float]) -> Tensor:
        """sum_k weights[k] * x_k over the states x_k that are kept, the oldest first.

        Raises:
            ValueError: no state is kept, there are more or fewer weights than states, or the shapes of states differ.
        """
        states = self.get()
        if not states or len(weights) != len(states):
            raise ValueError(
                f"weights must be one for each state that is kept, of which there are {len(states)}; got {weights}"
            )
        latest = states[-1]
        dtype = torch.promote_types(latest.dtype, torch.float32)
        return mix(
            torch.zeros_like(latest), states, torch.as_tensor(weights, dtype=dtype, device=latest.device).unbind()
        )

    def clear(self) -> None:
        """Forget every state."""
        self._states = []

    def __len__(self) -> int:
        return len(self._states)

    def extra_repr(self) -> str:
        return f"max_history={self.max_history}, detach_history={self.detach_history}"

    def _apply(self, fn: Any, recurse: bool = True) -> "HistoryBuffer":
        super()._apply(fn, recurse)
        self._states = [fn(state) for state in self._states]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_states": []}


def appended(states: list[Tensor], x: Tensor, max_history: int, detach_history: bool) -> list[Tensor]:
    """The last `max_history` of `states` and the state `x` after them: a new list."""
    return [*states, x.detach() if detach_history else x][-max_history:]


def clear_history(module: nn.Module) -> None:
    """Forget every state that `module` and the modules in it hold."""
    for part in module.modules():
        if isinstance(part, HistoryBuffer):
            part.clear()
