"""Who follows the operations of torch one by one, and so cannot look into nodes and operators of ours."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mhc_torch import _private


def followed(x: Tensor) -> bool:
    """Whether a transform of torch.func, dual numbers or a class of tensors of its own (DTensor) follow each operation.

    They cannot look into the nodes and operators here, which keep less and are faster.
    """
    return _private.transforms_are_active() or _private.dual_numbers_exist() or _private.holds_tensors(x)


def transformed() -> bool:
    """Whether a compiler, a tracer, a mode, a transform of torch.func or a dual number follows each operation.

    They find out by themselves what a node of ours would tell the backward pass, and cannot look into it.
    """
    return (
        torch.compiler.is_compiling()
        or _private.transforms_are_active()
        or _private.count_modes() > 0
        or _private.is_tracing()
        or _private.dual_numbers_exist()
    )


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast is off; for devices that do not know it ("meta") it always is."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
