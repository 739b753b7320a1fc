"""Moves weights between `mhc_jax` and `mhc_torch`, and proves that both compute the same function."""

from bridge import table  # noqa: F401 - declares the rules
from bridge.call import JaxFunction, JaxModule
from bridge.callback import torch_function
from bridge.convert import convert
from bridge.files import convert_file, load, save
from bridge.match import match
from bridge.optimizers import convert_optimizer
from bridge.pretrained import load_pretrained, read_config
from bridge.report import Report
from bridge.rules import Child, Leaf, Setting, register
from bridge.verify import verify

__all__ = [
    "Child",
    "JaxFunction",
    "JaxModule",
    "Leaf",
    "Report",
    "Setting",
    "convert",
    "convert_file",
    "convert_optimizer",
    "load",
    "load_pretrained",
    "match",
    "read_config",
    "register",
    "save",
    "torch_function",
    "verify",
]
