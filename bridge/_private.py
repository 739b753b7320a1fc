"""Every private name of torch that this package leans on, and what stands in where it is missing.

They serve the float64 reference of `bridge.verify`, which has to follow every operation of a model: without one of
them there is none, and the verdict says so. The list is `NAMES`; `tests/bridge/test_private.py` holds the code to it
and verifies without each.
"""

from typing import Any

from torch.utils import _python_dispatch

NAMES = {
    "torch.utils._python_dispatch.TorchDispatchMode": "follows each operation; else: there is no float64 reference",
    "torch._ops.OpOverload._schema": "which arguments an operation writes into; else: there is no float64 reference",
}


class _NoMode:
    """Stands in for a mode, and refuses to begin."""

    def __enter__(self) -> Any:
        raise NotImplementedError("this torch does not tell which operations run (TorchDispatchMode)")

    def __exit__(self, *error: Any) -> None: ...


Mode: Any = getattr(_python_dispatch, "TorchDispatchMode", _NoMode)


def parameters_of(operation: Any) -> list[tuple[str, bool]]:
    """Name of each parameter of an ATen operation, and whether the operation writes into it.

    Raises:
        NotImplementedError: torch does not tell.
    """
    schema = getattr(operation, "_schema", None)
    if schema is None:
        raise NotImplementedError("this torch does not tell what an operation writes into (OpOverload._schema)")
    return [(a.name, a.alias_info is not None and a.alias_info.is_write) for a in schema.arguments]
