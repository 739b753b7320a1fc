"""The mark by which utilities recognise modules that manage their own hyper-connections."""

from inspect import signature
from typing import TypeVar

from torch import nn

from mhc_torch.history.window import clear_history

T = TypeVar("T", bound=nn.Module)


def mhc_compatible(cls: type[T]) -> type[T]:
    """Class decorator: this module handles its own hyper-connections.

    Injection leaves instances of `cls` and everything in them alone, dashboards show the weights of those that have
    `mixing_weights()` or `logits`, and an MHCSequential passes its history to a forward that takes `history`. The class
    gets a method `clear_history()`, which empties every HistoryBuffer inside it, unless it has one.
    It stays the same class, so signature, isinstance and pickling are untouched; subclasses are marked too.

    Raises:
        TypeError: cls is no subclass of torch.nn.Module.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"mhc_compatible decorates subclasses of torch.nn.Module, got {cls!r}")
    cls._mhc_compatible = True  # type: ignore[attr-defined]
    if not hasattr(cls, "clear_history"):
        cls.clear_history = clear_history  # type: ignore[attr-defined]
    return cls


def is_mhc_compatible(module: nn.Module) -> bool:
    """Whether the class of `module` is marked by @mhc_compatible."""
    return getattr(type(module), "_mhc_compatible", False)


def takes_history(module: nn.Module) -> bool:
    """Whether `module` is marked by @mhc_compatible and its forward takes `history`, so that it mixes for itself."""
    return is_mhc_compatible(module) and "history" in signature(module.forward).parameters
