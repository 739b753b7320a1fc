"""Moves weights between `mhc_jax` and `mhc_torch`, and proves that both compute the same function."""

from bridge.calls.jax_in_torch import JaxFunction, JaxModule
from bridge.calls.torch_in_jax import torch_function
from bridge.proof.inputs import Inputs
from bridge.proof.report import Report
from bridge.proof.verify import verify
from bridge.weights import table  # noqa: F401 - declares the rules
from bridge.weights.convert import convert
from bridge.weights.files import convert_file, load, save
from bridge.weights.hyper import hyper_connections, return_hyper_connections
from bridge.weights.match import match
from bridge.weights.optimizers import convert_optimizer
from bridge.weights.pretrained import load_pretrained, read_config
from bridge.weights.rules import Child, Leaf, Setting, register

__all__ = [
    "Child",
    "Inputs",
    "JaxFunction",
    "JaxModule",
    "Leaf",
    "Report",
    "Setting",
    "convert",
    "convert_file",
    "convert_optimizer",
    "hyper_connections",
    "load",
    "load_pretrained",
    "match",
    "read_config",
    "register",
    "return_hyper_connections",
    "save",
    "torch_function",
    "verify",
]
