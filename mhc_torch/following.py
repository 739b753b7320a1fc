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


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast is off; for devices that do not know it ("meta") it always is."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
