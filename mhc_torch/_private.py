"""Every private name of torch, and of trackers, that this package leans on, and what stands in where it is missing.

All of them but the trackers' make something faster and nothing else: without one, what it would have told is taken to
be the slower case. The list is `NAMES`; `tests/mhc_torch/test_private.py` holds the code to it and runs without each.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch.autograd import forward_ad, function
from torch.utils import _python_dispatch

NAMES = {
    "torch._C._are_functorch_transforms_active": "whether torch.func follows each operation; else: it does",
    "torch._C._len_torch_dispatch_stack": "whether a mode follows each operation; else: one does",
    "torch._C._is_tracing": "whether torch.jit.trace follows each operation; else: it does",
    "torch.autograd.forward_ad._current_level": "whether there are dual numbers; else: there are",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": "whether a tensor holds tensors; else: any subclass",
    "torch.autograd.function._SingleLevelFunction": "a Function that seeks no transforms; else: one that does",
    "torch._C._current_graph_task_id": "which backward pass this is; else: no nodes in Python, one edge for each state",
    "torch.autograd.Variable._execution_engine": "to be told when a backward pass ends; else: as above",
    "torch.nn.Module()._forward_hooks": "what runs with a call of a module; else: something may",
    "torch.nn.Module()._forward_pre_hooks": "as above",
    "torch.nn.Module()._backward_hooks": "as above",
    "torch.nn.Module()._backward_pre_hooks": "as above",
    "torch.nn.Module._compiled_call_impl": "as above",
    "torch.nn.modules.module._has_any_global_hook": "as above",
    "clearml.Task._reporter": "an attribute that is made on demand, so that threads find it; else: they make it",
    "comet_ml.Experiment._report_experiment_error": "marks a run as failed; else: it ends as finished",
}


def _find(path: str, otherwise: Any = None) -> Any:
    """The attribute of torch at a dotted path, `otherwise` if it is not there."""
    try:
        return reduce(getattr, path.split(".")[1:], torch)
    except AttributeError:
        return otherwise


def _yes(*_: Any) -> bool:
    return True


transforms_are_active: Callable[[], bool] = _find("torch._C._are_functorch_transforms_active", _yes)
count_modes: Callable[[], int] = _find("torch._C._len_torch_dispatch_stack", _yes)
is_tracing: Callable[[], bool] = _find("torch._C._is_tracing", _yes)
SingleLevelFunction: Any = getattr(function, "_SingleLevelFunction", function.Function)
graph_task: Any = _find("torch._C._current_graph_task_id")
queue_callback: Any = _find("torch.autograd.Variable._execution_engine.queue_callback")
PASSES_ARE_KNOWN = graph_task is not None and queue_callback is not None
"""Whether nodes can tell one backward pass from another; the compiled ones ask torch in C++."""


def dual_numbers_exist() -> bool:
    """Whether forward-mode differentiation runs."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def _is_subclass(x: Any) -> bool:
    return type(x) not in (torch.Tensor, torch.nn.Parameter)


holds_tensors: Callable[[Any], bool] = getattr(_python_dispatch, "is_traceable_wrapper_subclass", _is_subclass)


_CALLED = [name.rpartition(".")[2] for name in NAMES if name.startswith("torch.nn.Module")]
_global_hooks: Callable[[], Any] = _find("torch.nn.modules.module._has_any_global_hook", _yes)


def calls_more_than_forward(module: torch.nn.Module) -> bool:
    """Whether a call of the module is more than the forward of its class: hooks, or another function in its place."""
    own = "forward" in vars(module) or any(getattr(module, name, True) for name in _CALLED)
    return own or bool(_global_hooks())
