"""What the mixing layers of a network do at this moment: weights, entropy, gradients, by layer name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.layers.compatible import is_mhc_compatible
from mhc_torch.layers.history_buffer import clear_history
from mhc_torch.layers.managed import MHCSequential

# Parameters of skips that scale the mixed history as a whole.
_NO_LOGITS = ("gate_logit", "gain")


def mixing_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The mixing layers in ``model`` and their names, in order of registration.

    These are the modules whose class is marked by ``@mhc_compatible`` and has a method ``mixing_weights()``: the
    library's skips, and those of the user who wants them in the dashboard.
    """
    for name, module in model.named_modules():
        if is_mhc_compatible(module) and hasattr(module, "mixing_weights"):
            yield name, module


@torch.no_grad()
def extract_mixing_weights(model: nn.Module) -> dict[str, Float[Tensor, "k"]]:
    """The weights that each mixing layer gives to its live states, oldest first.

    A layer that has run with fewer states than its window holds has that many weights. Of a matrix skip it is the last
    row, the one that makes the output. Names are those of ``model.named_modules()`` without what ``torch.compile``
    adds to them; a model that is itself a mixing layer has the name of its class.

    Returns:
        float tensors ``(K,)`` on the CPU by layer name; empty when there is no mixing layer.
    """
    return {
        without_compile_prefix(name) or type(module).__name__: _whole(module.mixing_weights()).float().cpu()
        for name, module in mixing_layers(model)
    }


def _whole(weights: Tensor) -> Tensor:
    """Gathered from all ranks, if they are a DTensor."""
    return weights.full_tensor() if hasattr(weights, "full_tensor") else weights


def entropy(weights: Float[Tensor, "k"]) -> Float[Tensor, ""]:
    """Shannon entropy ``-Σ α log α`` in nats with ``0 log 0 = 0``: from 0 to ``log K`` where the weights sum to 1."""
    return torch.special.entr(weights).sum(-1)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norms of the gradients now in ``.grad``: ``{layer}/grad_norm`` and ``{layer}/logits_grad_norm``.

    The layer is the module that the skip follows in an MHCSequential, and elsewhere the module that holds the skip.
    Parameters without gradient count as zero.
    """
    norms = {}
    for name, skip in mixing_layers(model):
        key = without_compile_prefix(name) or type(skip).__name__
        norms[f"{key}/grad_norm"] = _gradient_norm(_layer_of(model, name).parameters())
        own = skip.named_parameters(recurse=False)
        norms[f"{key}/logits_grad_norm"] = _gradient_norm(p for name, p in own if name not in _NO_LOGITS)
    return norms


@torch.no_grad()
def composite_gains(model: nn.Module, weights: Mapping[str, Float[Tensor, "k"]]) -> dict[str, float]:
    """By how much the skips alone can amplify a signal and a gradient through all layers of each MHCSequential.

    ``{container}/gain_forward`` and ``{container}/gain_backward``: the largest absolute row and column sum of the
    product of the layers' maps of the window, gates included; the "Amax gain magnitude" of arXiv 2512.24880,
    section 3.1. A model that is itself an MHCSequential has no first part.

    Args:
        weights: of ``extract_mixing_weights(model)``.
    """
    gains = {}
    for name, module in model.named_modules():
        if not isinstance(module, MHCSequential) or not len(module.skip_layers):
            continue
        inside = f"{holder}." if (holder := without_compile_prefix(name)) else ""
        skips: list[Any] = list(module.skip_layers)
        window = max(skip.max_history for skip in skips)
        product = torch.eye(window, dtype=torch.float64)
        for layer, skip in enumerate(skips):
            alpha = weights[f"{inside}skip_layers.{layer}"].double()
            if skip.use_gating:
                alpha = alpha * skip.gate_logit.double().sigmoid().cpu()
            # The oldest state drops out of the window, and the weighted sum comes in last.
            step = torch.eye(window, dtype=torch.float64).roll(-1, 0)
            step[-1] = 0
            step[-1, window - len(alpha) :] = alpha
            product = step @ product
        start = f"{holder}/" if holder else ""
        gains[f"{start}gain_forward"] = product.abs().sum(1).max().item()
        gains[f"{start}gain_backward"] = product.abs().sum(0).max().item()
    return gains


def reset_history(model: nn.Module) -> None:
    """Empty every HistoryBuffer in ``model``, and call ``clear_history()`` of the modules that define their own."""
    clear_history(model)
    for module in model.modules():
        own = getattr(type(module), "clear_history", None)
        if own is not None and own is not clear_history:
            own(module)


def without_compile_prefix(name: str) -> str:
    """``name`` of a module or parameter without the parts that ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _layer_of(model: nn.Module, name: str) -> nn.Module:
    holder, _, position = name.rpartition(".")
    container, _, group = holder.rpartition(".")
    if group == "skip_layers" and isinstance(sequential := model.get_submodule(container), MHCSequential):
        return sequential.wrapped_modules[int(position)]
    return model.get_submodule(holder)


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    return nn.utils.get_total_norm([p.grad.float() for p in parameters if p.grad is not None]).item()
