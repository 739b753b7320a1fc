"""What the `mhc` package has, or its documentation describes, and this one has not; and what to write instead."""

from typing import NoReturn

_INSTEAD = {
    "InjectedMHC": (
        "an injected module keeps its class and has a child mhc_skip: in place of isinstance(module, InjectedMHC) "
        "ask hasattr(module, 'mhc_skip')"
    ),
    "PerformanceAudit": (
        "only the documentation of the mhc package has it; ForwardProfiler times modules, torch.profiler their memory"
    ),
}


def refuse(module: str, name: str) -> NoReturn:
    """What `__getattr__` of an import path of the `mhc` package does with a name that is not there.

    Raises:
        ImportError: the package has it; the message says what to write instead. Of an AttributeError,
            `from ... import` would keep the type alone.
        AttributeError: nobody has it.
    """
    if name in _INSTEAD:
        raise ImportError(f"{module} has no {name}: {_INSTEAD[name]}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
