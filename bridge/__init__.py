"""Moves weights between `mhc_jax` and `mhc_torch`, and proves that both compute the same function.

A name is imported when it is first asked for: who converts a file need not wait for the compilers that a proof takes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.calls.jax_in_torch import JaxFunction, JaxModule
    from bridge.calls.torch_in_jax import torch_function
    from bridge.proof.inputs import Inputs
    from bridge.proof.report import Report
    from bridge.proof.verify import verify
    from bridge.weights.convert import convert
    from bridge.weights.families import families
    from bridge.weights.files import convert_file, load, save
    from bridge.weights.hyper import hyper_connections, return_hyper_connections
    from bridge.weights.match import match
    from bridge.weights.optimizers import convert_optimizer
    from bridge.weights.pretrained import load_pretrained, read_config
    from bridge.weights.recurrent import fold_biases
    from bridge.weights.rules import Zero
    from bridge.weights.suggest import Suggestion, suggest
    from bridge.weights.table import Child, Leaf, Setting, register

__all__ = [
    "Child",
    "Inputs",
    "JaxFunction",
    "JaxModule",
    "Leaf",
    "Report",
    "Setting",
    "Suggestion",
    "Zero",
    "convert",
    "convert_file",
    "convert_optimizer",
    "families",
    "fold_biases",
    "hyper_connections",
    "load",
    "load_pretrained",
    "match",
    "read_config",
    "register",
    "return_hyper_connections",
    "save",
    "suggest",
    "torch_function",
    "verify",
]

_HOMES = {
    "Child": "weights.table",
    "Inputs": "proof.inputs",
    "JaxFunction": "calls.jax_in_torch",
    "JaxModule": "calls.jax_in_torch",
    "Leaf": "weights.table",
    "Report": "proof.report",
    "Setting": "weights.table",
    "Suggestion": "weights.suggest",
    "Zero": "weights.rules",
    "convert": "weights.convert",
    "convert_file": "weights.files",
    "convert_optimizer": "weights.optimizers",
    "families": "weights.families",
    "fold_biases": "weights.recurrent",
    "hyper_connections": "weights.hyper",
    "load": "weights.files",
    "load_pretrained": "weights.pretrained",
    "match": "weights.match",
    "read_config": "weights.pretrained",
    # Through the table, whose rules must stand before others replace them.
    "register": "weights.table",
    "return_hyper_connections": "weights.hyper",
    "save": "weights.files",
    "suggest": "weights.suggest",
    "torch_function": "calls.torch_in_jax",
    "verify": "proof.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"bridge.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
