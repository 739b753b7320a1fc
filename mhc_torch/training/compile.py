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
def autocast_context(device_type: str = "cuda", dtype: torch.dtype | None = None) -> Iterator[None]:
    """Mixed precision: on CUDA in float16, on the CPU in bfloat16, unless told otherwise.

    Without CUDA, "cuda" changes nothing, so that the same script runs on a laptop, in full precision.

    Args:
        device_type: "cuda", "cpu", ...
        dtype: lower precision that the operations run in.

    Raises:
        RuntimeError: torch knows no such device.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        yield
        return
    with torch.autocast(device_type, dtype=dtype):
        yield
