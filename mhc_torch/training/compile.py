"""torch.compile and autocast, as the documentation spells them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn


def compile_model(model: nn.Module, **kwargs: Any) -> nn.Module:
    """torch.compile(model, **kwargs); attributes and methods of the model stay within reach."""
    return cast(nn.Module, torch.compile(model, **kwargs))


@contextmanager
def autocast_context(device_type: str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Mixed precision: on CUDA in float16, on the CPU in bfloat16, unless told otherwise.

    Args:
        device_type: "cuda", "cpu", ...; by default CUDA where there is one.
        dtype: lower precision that the operations run in.

    Raises:
        RuntimeError: there is no such device.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device_type is 'cuda', but no CUDA device is available; use device_type='cpu'")
    with torch.autocast(device_type, dtype=dtype):
        yield
