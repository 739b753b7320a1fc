"""MHCSequential: a stack of branches whose outputs are mixed with the stack's own past states."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_torch.config import resolve_config
from mhc_torch.layers.compatible import mhc_compatible
from mhc_torch.layers.history_buffer import HistoryBuffer
from mhc_torch.layers.mhc_skip import MHCSkip
from mhc_torch.layers.tape import Tape


@mhc_compatible
class MHCSequential(nn.Module):
    """x_{l+1} = f_l(x_l) + g_l * sum_k alpha_{l,k} x_k for each module f_l in turn; the window includes the input x_0.

    Keywords that are left out come from `get_default_config()`; see MHCConfig for their meaning.

    Args:
        modules: the branches f_l, each from one tensor to one tensor.
        use_checkpointing: keep only the states, and compute the inside of each branch again for the gradient.

    Attributes:
        wrapped_modules: the branches.
        skip_layers: one MHCSkip for each branch.
        history_buffer: empty between two forwards, unless clear_history_each_forward is off.

    Raises:
        TypeError: one of `modules` is no torch.nn.Module; others as MHCConfig.
        ValueError: as MHCConfig.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        max_history: int | None = None,
        mode: str | None = None,
        constraint: str | None = None,
        epsilon: float | None = None,
        temperature: float | None = None,
        clear_history_each_forward: bool | None = None,
        detach_history: bool | None = None,
        use_gating: bool | None = None,
        use_checkpointing: bool = False,
        prune_threshold: float | None = None,
        stochastic: bool | None = None,
        auto_project: bool | None = None,
        init: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(modules, Iterable):
            kind = type(modules).__name__
            raise TypeError(f"modules must be an iterable of modules, [first, second, ...]; got {kind}")
        self.wrapped_modules = nn.ModuleList(modules)
        config = resolve_config(
            max_history=max_history,
            mode=mode,
            constraint=constraint,
            epsilon=epsilon,
            temperature=temperature,
            clear_history_each_forward=clear_history_each_forward,
            detach_history=detach_history,
            use_gating=use_gating,
            prune_threshold=prune_threshold,
            stochastic=stochastic,
            auto_project=auto_project,
            init=init,
        )
        self.skip_layers = nn.ModuleList(MHCSkip(config=config) for _ in self.wrapped_modules)
        for depth, skip in enumerate(self.skip_layers, start=1):
            skip.live = min(depth, config.max_history)  # type: ignore[assignment]
        self.history_buffer = HistoryBuffer(config.max_history, config.detach_history)
        self.clear_history_each_forward = config.clear_history_each_forward
        self.use_checkpointing = use_checkpointing

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The last state.

        Raises:
            ValueError, TypeError: as MHCSkip.forward.
        """
        history = self.history_buffer
        if self.clear_history_each_forward:
            history.clear()
        history.append(x)
        tape = tape_of(list(self.skip_layers), history, x)
        for module, skip in zip(self.wrapped_modules, self.skip_layers, strict=True):
            if self.use_checkpointing and torch.is_grad_enabled():
                branch = checkpoint(module, x, use_reentrant=False)
            else:
                branch = module(x)
            x = skip(branch, history.get(), tape)
            history.append(x)
        if self.clear_history_each_forward:
            history.clear()
        return x


def tape_of(skips: Sequence[Any], history: HistoryBuffer, x: Float[Tensor, "*shape"]) -> Tape | None:
    """The logits of all layers, projected at once; the first layer sees the history as it is, each next one more.

    None where they cannot be: skips that no longer share their settings project for themselves.
    """
    configs = [skip.config for skip in skips]
    if not skips or configs.count(configs[0]) < len(skips) or configs[0].mode == "residual":
        return None
    first = skips[0]
    states = len(history)
    logits = torch.stack([skip.mixing_logits for skip in skips])
    window = logits.shape[1]
    # Layer l has states + l past states; the columns c before those, c + l < window - states, are dead.
    dead = (torch.arange(window + len(skips) - 1, device=logits.device) < window - states).unfold(0, window, 1)
    gate_logits = torch.stack([skip.gate_logit for skip in skips]) if first.use_gating else None
    weights = first.coefficients(logits.masked_fill(dead, -math.inf), gate_logits)
    # Tensors that are kept without their graph get no gradient to share.
    return Tape(x, weights, alone=states == 1 and not history.detach_history)
