"""ForwardProfiler: how long the modules of a model take."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardProfiler:
    """Wall time of the forward of every module; also a context manager.

    Args:
        module: the model.
        filter_fn: called with name and module; only modules for which it is true are timed.
        use_cuda_sync: wait for the device before each reading. Without, on CUDA, only the launches are timed.

    Attributes:
        times_ms: durations in milliseconds of every call, by the name of the module; the model itself is "".
    """

    def __init__(
        self,
        module: nn.Module,
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        use_cuda_sync: bool = False,
    ) -> None:
        self.module = module
        self.filter_fn = filter_fn
        self.use_cuda_sync = use_cuda_sync
        self.times_ms: dict[str, list[float]] = {}
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Begin to time.

        Raises:
            RuntimeError: it has begun already.
        """
        if self._handles:
            raise RuntimeError("the profiler is running; call stop() first")
        for name, module in self.module.named_modules():
            if self.filter_fn is None or self.filter_fn(name, module):
                self._time(name, module)

    def stop(self) -> None:
        """End timing; the times stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def summary(self) -> dict[str, float]:
        """Mean milliseconds per call, by the name of the module."""
        return {name: sum(times) / len(times) for name, times in self.times_ms.items()}

    def _time(self, name: str, module: nn.Module) -> None:
        began: list[float] = []  # a stack: a module may call itself

        def before(*_: Any) -> None:
            began.append(self._now())

        def after(*_: Any) -> None:
            self.times_ms.setdefault(name, []).append((self._now() - began.pop()) * 1000)

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _now(self) -> float:
        if self.use_cuda_sync and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> "ForwardProfiler":
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
