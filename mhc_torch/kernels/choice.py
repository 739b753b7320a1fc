"""Which form of an operation runs: kernels of Triton, or operations of torch. Either has derivatives of any order."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from mhc_torch.following import followed

Implementation = Literal["torch", "triton"] | None

DTYPES = torch.bfloat16, torch.float16, torch.float32
INSTALLED = find_spec("triton") is not None


def check_implementation(implementation: Implementation) -> None:
    """Raises a ValueError for what is no implementation."""
    if implementation not in (None, "torch", "triton"):
        raise ValueError(f"implementation must be 'torch', 'triton' or None, got {implementation!r}")


def by_kernels(
    implementation: Implementation,
    states: Sequence[Tensor],
    others: Sequence[Tensor | None] = (),
    *,
    unserved: str | None = None,
) -> bool:
    """Whether the kernels of an operation compute it; if not, the form of torch does.

    None is the kernels wherever they can run: on a GPU, where Triton is installed and no transform of torch.func,
    forward-mode derivative or class of tensors (DTensor) follows each operation.

    Args:
        states: the tensors of features, which have one dtype, of `DTYPES`.
        others: the rest, such as maps and parameters, in any dtype; all lie on the device of the states.
        unserved: what the kernels of this operation lack for this call, such as "a width of 8"; None if nothing.

    Raises:
        ValueError: there is no such implementation; "triton" is asked for and cannot run. The message says why, and
            which form does it.
    """
    check_implementation(implementation)
    if implementation == "torch":
        return False
    reason = _obstacle(implementation, states, others, unserved)
    if reason is not None and implementation == "triton":
        raise ValueError(f"implementation='triton' cannot run: {reason}; implementation='torch' can")
    return reason is None


def _obstacle(
    implementation: Implementation, states: Sequence[Tensor], others: Sequence[Tensor | None], unserved: str | None
) -> str | None:
    """Why kernels cannot run, or None."""
    first = states[0]
    device = first.device
    if not INSTALLED:
        return "Triton is not installed (pip install 'mhc-jax[triton]')"
    # Triton's interpreter is for tests: nobody who has not asked for it wants to wait for it.
    if device.type != "cuda" and not (device.type == "cpu" and implementation == "triton" and interpreted()):
        return f"the tensors are on the device {str(device)!r}, and kernels are for a GPU ('cuda')"
    for tensor in (*states, *others):
        if tensor is not None and tensor.device != device:
            return f"tensors are on the devices {str(device)!r} and {str(tensor.device)!r} and must be on one"
    if len(dtypes := list(dict.fromkeys(str(state.dtype) for state in states))) > 1:
        return f"streams and outputs must have one dtype, and have {' and '.join(dtypes)}"
    if first.dtype not in DTYPES:
        return f"kernels are for {', '.join(map(str, DTYPES))}, and the streams have {first.dtype}"
    if any(followed(state) for state in states):
        return "a transform of torch.func, a forward-mode derivative or a class of tensors follows each operation"
    return f"kernels have nothing for {unserved}" if unserved else None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on a CPU: TRITON_INTERPRET=1 before this package is first imported."""
    return _INTERPRETED


# Read once: a compiler traces into `interpreted`, and to mark it for that would import all of torch's compiler here.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
