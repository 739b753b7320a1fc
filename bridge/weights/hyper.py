"""The hyper-connections of a model of transformers as modules of JAX, and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from flax import nnx
from torch import nn

from bridge.weights.arrays import copy_into, to_jax, to_numpy
from mhc_jax.nn.hyper_connections import ConnectionMaps, StreamHead
from mhc_jax.streams import CONVENTIONS, StreamConfig
from mhc_jax.streams.conventions import Parameters

Twin = ConnectionMaps | StreamHead


@dataclass(frozen=True)
class Kind:
    """A class of modules of transformers, and what of its attributes makes its options.

    Attributes:
        convention: a name in `mhc_jax.streams.CONVENTIONS`.
        settings: by the convention's name of a setting, the attribute of the module that holds it.
        head: whether it is the learned reduction at the end.
    """

    convention: str
    settings: Mapping[str, str] = field(default_factory=dict)
    head: bool = False

    def config(self, module: nn.Module) -> StreamConfig:
        """The options of this very module."""
        values = {name: reduce(getattr, path.split("."), module) for name, path in self.settings.items()}
        convention = CONVENTIONS[self.convention]
        return (convention.head_config if self.head else convention.config)(**values)


_SINKHORN = {"hc_mult": "hc_mult", "hc_sinkhorn_iters": "hc_sinkhorn_iters", "hc_eps": "hc_eps"}
_NORM = {"rms_norm_eps": "input_norm.eps"}
_HEAD = {"hc_mult": "hc_mult", "hc_eps": "eps"}
KINDS: dict[str, Kind] = {
    "DeepseekV4HyperConnection": Kind("deepseek_v4", _SINKHORN | _NORM),
    "DeepseekV4HyperHead": Kind("deepseek_v4", _HEAD | _NORM, head=True),
    "Glm5NextTextHyperConnection": Kind("glm5_next", _SINKHORN | _NORM),
    "HYV4HyperConnection": Kind(
        "hy_v4", {"hc_mult": "hc_mult", "hc_magnitude": "hc_post_magnitude", "hc_eps": "hc_eps"} | _NORM
    ),
    "HYV4HyperHead": Kind("hy_v4", _HEAD | _NORM, head=True),
}
"""What is known, by the name of the class: transformers need not be installed."""


def hyper_connections(model: nn.Module) -> dict[str, Twin]:
    """All hyper-connections of a model of transformers as modules of `mhc_jax`, bit for bit.

    DeepSeek-V4, GLM-5.3 (whose streams end by their mean, which has no parameters) and Hy4. A branch's is a
    `ConnectionMaps`, for use as `maps.around(branch, streams)`; the end's is a `StreamHead`.

    Args:
        model: the whole model, or any part of it.

    Returns:
        The modules by the names that theirs have in the model, in its order.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        ValueError: it has none that are known.

    Example:
        >>> import torch
        >>> from transformers.models.hy_v4.modeling_hy_v4 import HYV4Config, HYV4HyperConnection
        >>> hyper = HYV4HyperConnection(HYV4Config(hidden_size=8, hc_mult=2)).requires_grad_(False)
        >>> for parameter in hyper.parameters():
        ...     _ = parameter.fill_(0.5)
        >>> twins = hyper_connections(torch.nn.ModuleDict({"attn_hc": hyper}))
        >>> twins["attn_hc"].phi.shape, twins["attn_hc"].config.constraint
        ((16, 4), 'identity')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: _twin(kind, module) for name, (kind, module) in _known(model).items()}
    if not found:
        raise ValueError(f"{type(model).__name__} has no hyper-connections that are known: {', '.join(KINDS)}")
    return found


def return_hyper_connections(twins: Mapping[str, Twin], model: nn.Module) -> None:
    """Writes what `hyper_connections` gave, trained since, back into the model, bit for bit, in place.

    Args:
        twins: for every hyper-connection of the model its own, by its name.
        model: as of `hyper_connections`; another one of the same sizes will do.

    Raises:
        ValueError: one is missing or left over, or has other options, another shape or dtype than the model's. Nothing
            is written then.

    Example:
        >>> import torch
        >>> from transformers.models.hy_v4.modeling_hy_v4 import HYV4Config, HYV4HyperConnection
        >>> model = HYV4HyperConnection(HYV4Config(hidden_size=8, hc_mult=2)).requires_grad_(False)
        >>> for parameter in model.parameters():
        ...     _ = parameter.fill_(0.5)
        >>> twins = hyper_connections(model)
        >>> twins[""].bias[...] = twins[""].bias[...] + 1
        >>> return_hyper_connections(twins, model)
        >>> model.base
        Parameter containing:
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    known = _known(model)
    if missing := sorted(known.keys() - twins.keys()):
        raise ValueError(f"twins must hold all hyper-connections of the model, {missing} are missing")
    if unknown := sorted(twins.keys() - known.keys()):
        raise ValueError(f"twins must be of hyper-connections of the model, {unknown} are not")
    writes = []
    for name, (kind, module) in known.items():
        twin, config = twins[name], kind.config(module)
        if twin.config != config:
            raise ValueError(f"{name} must have the options {config}, its twin has {twin.config}")
        arrays = Parameters(*(to_numpy(leaf.get_value()) for leaf in _leaves(twin)))
        for leaf, own, given in zip(arrays._fields, _parameters(kind, module), arrays, strict=True):
            if (given.shape, given.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"the {leaf} of {name} must be {own.dtype} of shape {own.shape}, its twin has {given.dtype} of "
                    f"shape {given.shape}"
                )
        stored = CONVENTIONS[kind.convention].store(arrays, config, head=kind.head)
        writes += [(module.get_parameter(key), values) for key, values in stored.items()]
    with torch.no_grad():
        for target, values in writes:
            copy_into(target, values)


def _known(model: nn.Module) -> dict[str, tuple[Kind, nn.Module]]:
    classes = {name: [kind.__name__ for kind in type(module).__mro__] for name, module in model.named_modules()}
    kinds = {name: next((KINDS[one] for one in bases if one in KINDS), None) for name, bases in classes.items()}
    return {name: (kind, model.get_submodule(name)) for name, kind in kinds.items() if kind is not None}


def _twin(kind: Kind, module: nn.Module) -> Twin:
    config, parameters = kind.config(module), _parameters(kind, module)
    width = len(parameters.phi) // config.streams
    make: Any = StreamHead if kind.head else ConnectionMaps
    # Without memory, since all of it is set anew, in the dtype that the tensors have.
    twin: Twin = nnx.eval_shape(lambda: make(width, config=config))
    for leaf, values in zip(_leaves(twin), parameters, strict=True):
        leaf.set_value(to_jax(values))
    return twin


def _parameters(kind: Kind, module: nn.Module) -> Parameters:
    """Those of a torch module, in the layout of ours."""
    tensors = {name: to_numpy(parameter) for name, parameter in module.named_parameters(recurse=False)}
    return CONVENTIONS[kind.convention].load(tensors, kind.config(module), head=kind.head)


def _leaves(twin: Twin) -> tuple[Any, Any, Any]:
    return twin.phi, twin.alpha, twin.bias
