"""Programs for accelerators that the machine does not have."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def lowered_for(platform: str, function: Callable[..., Any], *arguments: Any) -> str:
    """The program of a function for "tpu" or "cuda", as text."""
    # Triton asks which GPU the program is for; there is none here, so it is told.
    target = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu") if platform == "cuda" else None
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=target)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
