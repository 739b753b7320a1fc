"""MHCSequential: a stack of branches whose outputs are mixed with the stack's own past states."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_torch import _private
from mhc_torch.history.config import MHCConfig, resolve_config
from mhc_torch.history.mixing import check_arithmetic
from mhc_torch.history.tape import Tape
from mhc_torch.history.window import HistoryBuffer
from mhc_torch.monitoring.connection import whole
from mhc_torch.nn.compatible import mhc_compatible, takes_history
from mhc_torch.nn.matrix_skip import MatrixMHCSkip
from mhc_torch.nn.skip import FIXED, MHCSkip
from mhc_torch.options import check_change, settable


class MixesItself(nn.Module):
    """Stands for the skip of a branch that takes the history, and mixes it, itself."""

    def forward(self, branch: Inexact[Tensor, "..."], history: Sequence[Tensor]) -> Inexact[Tensor, "..."]:
        return branch


@mhc_compatible
class MHCSequential(nn.Module):
    """x_{l+1} = f_l(x_l) + g_l * sum_k alpha_{l,k} x_k for each module f_l in turn; the window includes the input x_0.

    A module that is @mhc_compatible and whose forward takes `history` mixes for itself: it is called with the states so
    far, oldest first, and x_{l+1} is what it puts out.

    Options are fields of MHCConfig, which has their meaning; those left out come from `config`, by default
    `get_default_config()`.

    Args:
        modules: the branches f_l, each from one tensor to one tensor.
        config: all options in one value; keywords change single ones.
        use_checkpointing: keep only the states, and compute the inside of each branch again for the gradient.

    Attributes:
        wrapped_modules: the branches.
        skip_layers: one MHCSkip for each branch, a `MixesItself` for one that does. Another module may take its place:
            it is called with the output of the branch and the states, and puts out the next state.
        history_buffer: what the last forward left to the next one if clear_history_each_forward is off, else empty: the
            states of a forward belong to it alone, so that threads can share a stack, and a branch can call it.
        config: the options, read-only. Single ones can be set, as those of an MHCSkip, detach_history and
            clear_history_each_forward: `stack.temperature = 0.5` gives all skips the options of the stack.

    Raises:
        TypeError: one of `modules` is no torch.nn.Module; others as MHCConfig.
        ValueError: as MHCConfig; on setting an option too, and for one that parameters were made for.
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
        *,
        config: MHCConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(modules, Iterable):
            kind = type(modules).__name__
            raise TypeError(f"modules must be an iterable of modules, [first, second, ...]; got {kind}")
        self.wrapped_modules = nn.ModuleList(modules)
        config = resolve_config(
            config,
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
            **options,
        )
        self.skip_layers = nn.ModuleList(
            MixesItself() if takes_history(module) else MHCSkip(config=config) for module in self.wrapped_modules
        )
        for depth, skip in enumerate(self.skip_layers, start=1):
            if isinstance(skip, MHCSkip):
                skip.live = min(depth, config.max_history)
        self.history_buffer = HistoryBuffer(config=config)
        self._config = config
        self.use_checkpointing = use_checkpointing

    @property
    def config(self) -> MHCConfig:
        return self._config

    @config.setter
    def config(self, config: MHCConfig) -> None:
        check_change("MHCSequential", self._config, config, FIXED)
        for skip in self.skip_layers:
            if isinstance(skip, MHCSkip):
                skip.config = config
        self.history_buffer.config = config
        self._config = config

    mode = settable("mode")
    max_history = settable("max_history")
    constraint = settable("constraint")
    epsilon = settable("epsilon")
    temperature = settable("temperature")
    detach_history = settable("detach_history")
    clear_history_each_forward = settable("clear_history_each_forward")
    auto_project = settable("auto_project")
    use_gating = settable("use_gating")
    prune_threshold = settable("prune_threshold")
    stochastic = settable("stochastic")

    def forward(self, x: Inexact[Tensor, "..."]) -> Inexact[Tensor, "..."]:
        """The last state.

        Raises:
            ValueError: as MHCSkip.forward.
            TypeError: as MHCSkip.forward; x is no tensor, or of eight bits.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        check_arithmetic(x)
        buffer = self.history_buffer
        states = buffer.with_state([] if self.clear_history_each_forward else buffer.get(), x)
        tape = tape_of(list(self.skip_layers), x, len(states), buffer.detach_history)
        for module, skip in zip(self.wrapped_modules, self.skip_layers, strict=True):
            given: dict[str, Any] = {"history": list(states)} if isinstance(skip, MixesItself) else {}
            if self.use_checkpointing and torch.is_grad_enabled():
                branch = checkpoint(module, x, use_reentrant=False, **given)
            else:
                branch = module(x, **given)
            x = skip(branch, states) if tape is None else skip(branch, states, tape)
            states = buffer.with_state(states, x)
        if not self.clear_history_each_forward:
            buffer.replace(states)
        return x

    def branch_of(self, skip: nn.Module) -> nn.Module | None:
        """The branch whose output `skip` mixes; None if it is no skip of this stack."""
        pairs = zip(self.skip_layers, self.wrapped_modules, strict=True)
        return next((branch for own, branch in pairs if own is skip), None)

    def residual_maps(self) -> Float[Tensor, "L H H"]:
        """What each layer does to the window: the oldest state drops out, the weighted sum comes in; float64.

        Of no layer (L = 0) where one mixes in a way of its own.
        """
        return window_maps(list(self.skip_layers))


def window_maps(skips: Sequence[Any]) -> Float[Tensor, "L H H"]:
    """As `MHCSequential.residual_maps`, of the skips of all layers in turn."""
    if not all(isinstance(skip, MHCSkip | MatrixMHCSkip) for skip in skips):
        return torch.empty(0, 0, 0, dtype=torch.float64)
    window = max((skip.max_history for skip in skips), default=0)
    maps = torch.eye(window, dtype=torch.float64).roll(-1, 0).repeat(len(skips), 1, 1)
    for step, skip in zip(maps, skips, strict=True):
        alpha = whole(skip.mixing_weights()).double().cpu()
        if (gate_logit := getattr(skip, "gate_logit", None)) is not None:
            alpha *= whole(gate_logit).double().sigmoid().cpu()
        step[-1] = 0
        step[-1, window - len(alpha) :] = alpha
    return maps


def tape_of(skips: Sequence[Any], x: Inexact[Tensor, "*shape"], states: int, detach_history: bool) -> Tape | None:
    """The logits of all layers, projected at once; the first layer sees so many `states`, each next one more.

    None where they cannot be: skips that no longer share their settings project for themselves, and so do those
    of another class, which may mix in a way of their own, and those whose parameters are sharded (`fully_shard`),
    which are whole only inside of their own forward.
    """
    if any(type(skip) is not MHCSkip for skip in skips):
        return None
    configs = [skip.config for skip in skips]
    if not skips or configs.count(configs[0]) < len(skips) or configs[0].mode == "residual":
        return None
    first, each = skips[0], [skip.mixing_logits for skip in skips]
    if any(type(logits) is not nn.Parameter and _private.holds_tensors(logits) for logits in each):
        return None
    logits = torch.stack(each)
    window = logits.shape[1]
    # Layer l has states + l past states; the columns c before those, c + l < window - states, are dead.
    dead = (torch.arange(window + len(skips) - 1, device=logits.device) < window - states).unfold(0, window, 1)
    gate_logits = torch.stack([skip.gate_logit for skip in skips]) if first.use_gating else None
    weights = first.coefficients(logits.masked_fill(dead, -math.inf), gate_logits)
    # Tensors that are kept without their graph get no gradient to share.
    return Tape(x, weights, alone=states == 1 and not detach_history)
