"""A history that the layers of a model share for the span of one forward."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mhc_torch.history.width_map import HistoryProjection
from mhc_torch.history.window import HistoryBuffer
from mhc_torch.nn.skip import MHCSkip


class _Running(threading.local):
    """The states of the forwards that run in this thread, the innermost last. A copy begins with none.

    Not a context variable, which torch.compile cannot follow; a forward does not leave its thread.
    """

    def __init__(self) -> None:
        self.forwards: list[list[Tensor]] = []

    def __reduce__(self) -> Any:
        return _Running, ()


class SharedHistory(HistoryBuffer):
    """The last `max_history` states of every shape, so that layers of several widths do not push out each other's.

    Between `begin` and `end` they are those of one forward, which no other thread sees, nor a forward within it. Else
    they are the buffer's own, as in every HistoryBuffer.
    """

    def __init__(self, max_history: int = 4, detach_history: bool = False) -> None:
        super().__init__(max_history, detach_history)
        self._running = _Running()

    def begin(self, keep: bool) -> None:
        """A forward begins, with what the last one kept, or with nothing."""
        if not keep:
            self._states = []
        self._running.forwards = [*self._running.forwards, list(self._states)]

    def keep(self) -> None:
        """The forward has not failed: the next one goes on with its states."""
        self._states = self.get()

    def end(self) -> None:
        """The forward that began last is over, or has failed."""
        self._running.forwards = self._running.forwards[:-1]

    def append(self, x: Tensor) -> None:
        if self._running.forwards:
            *outer, states = self._running.forwards
            self._running.forwards = [*outer, self.with_state(states, x)]
        else:
            self._states = self.with_state(self._states, x)

    def with_state(self, states: list[Tensor], x: Tensor) -> list[Tensor]:
        same = [i for i, state in enumerate(states) if state.shape == x.shape]
        if len(same) >= self.max_history:
            states = [state for i, state in enumerate(states) if i != same[0]]
        return [*states, x.detach() if self.detach_history else x]

    def get(self) -> list[Tensor]:
        return list(self._running.forwards[-1] if self._running.forwards else self._states)

    def clear(self) -> None:
        if self._running.forwards:
            self._running.forwards = [*self._running.forwards[:-1], []]
        self._states = []

    def __len__(self) -> int:
        return len(self.get())


def live_window(skip: MHCSkip, history: SharedHistory, branch: Tensor, start: Tensor | None) -> list[Tensor]:
    """The states that `skip` is to add to the output `branch` of a layer: those in `history` of the same shape.

    Where there are none, the history of that shape begins with `start`, the input of the layer, if it has it too, or
    if skip may project it.
    """
    states = [state for state in history.get() if state.shape == branch.shape]
    if states or start is None:
        return states
    if start.shape == branch.shape:
        history.append(start)
    return first_window(skip, history, branch, start)


def first_window(skip: MHCSkip, history: SharedHistory, branch: Tensor, start: Tensor) -> list[Tensor]:
    """The window of a history that begins with `start`, the input of the layer; empty if its shape does not fit."""
    if start.shape == branch.shape:
        return history.with_state([], start)
    return [start] if skip.auto_project and HistoryProjection.maps(start, branch) else []


def span_forwards(root: nn.Module, histories: Iterable[SharedHistory], *, keep: bool) -> None:
    """Give every forward of `root` states of its own in `histories`; one that fails leaves none behind.

    Args:
        keep: whether a forward goes on with the states of the last one.
    """
    span = _Span(list(histories), keep)
    root.register_forward_pre_hook(span.begin, prepend=True)
    if keep:
        root.register_forward_hook(span.keep)
    root.register_forward_hook(span.end, always_call=True)


@dataclass
class _Span:
    """The hooks, methods of an object that is copied and pickled along with the model and its histories."""

    histories: list[SharedHistory]
    carry: bool

    def begin(self, *_: Any) -> None:
        for history in self.histories:
            history.begin(self.carry)

    def keep(self, *_: Any) -> None:
        for history in self.histories:
            history.keep()

    def end(self, *_: Any) -> None:
        for history in self.histories:
            history.end()
