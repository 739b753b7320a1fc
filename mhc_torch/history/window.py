"""HistoryBuffer: the last states of a network, kept by whoever calls the layers."""

from typing import Any

from torch import Tensor, nn


class HistoryBuffer(nn.Module):
    """The last `max_history` states, oldest first.

    It is a module so that it follows `.to()` with the model that holds it. The states are activations, no part of the
    model: `state_dict`, copies and pickles leave them out.

    Args:
        max_history: how many states are kept; appending one more drops the oldest.
        detach_history: keep the states without their graph, so that no gradient flows through history.

    Raises:
        ValueError: max_history is below 1.
    """

    def __init__(self, max_history: int = 4, detach_history: bool = False) -> None:
        super().__init__()
        if max_history < 1:
            raise ValueError(f"max_history must be at least 1, got {max_history}")
        self.max_history = max_history
        self.detach_history = detach_history
        self._states: list[Tensor] = []

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
        return [*states, x.detach() if self.detach_history else x][-self.max_history :]

    def replace(self, states: list[Tensor]) -> None:
        """Keep `states` in place of what is kept."""
        self._states = states

    def get(self) -> list[Tensor]:
        """The states that are kept, oldest first."""
        return list(self._states)

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


def clear_history(module: nn.Module) -> None:
    """Forget every state that `module` and the modules in it hold."""
    for part in module.modules():
        if isinstance(part, HistoryBuffer):
            part.clear()
