"""MHCSkip: add a weighted sum of past states to the output of a branch."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor, nn

from mhc_torch.history.config import INITS, MHCConfig, resolve_config
from mhc_torch.history.mixing import check_window, mix
from mhc_torch.history.tape import Tape
from mhc_torch.history.width_map import WidthMap
from mhc_torch.nn.compatible import mhc_compatible
from mhc_torch.options import check_change, settable

# What parameters are made for.
FIXED = ("max_history", "auto_project", "use_gating")


@mhc_compatible
class MHCSkip(nn.Module):
    """x_{l+1} = f(x_l) + g * sum_k alpha_k x_k over the last `max_history` states x_k.

    The weights alpha are the projection of the live logits, so that none goes to a state that does not exist; g is
    sigmoid(gate_logit) when gating is on, else 1. Keywords that are left out come from `config`, by default
    `get_default_config()`; see MHCConfig for their meaning. The state dict is that of the `mhc` package.

    Attributes:
        config: the options, read-only. Single ones can be set: `skip.temperature = 0.5`, and so mode, constraint,
            epsilon, prune_threshold and stochastic; they are checked as at construction.
        live: how many states the last forward mixed.
        mixing_logits: (max_history,) parameter, the latest state last. Frozen in mode "residual", which has no weights.
        gate_logit: () parameter, only with use_gating.
        projection: maps past states of another width, only with auto_project.

    Raises:
        TypeError, ValueError: as MHCConfig; on setting an option too, and for one that parameters were made for.
    """

    def __init__(
        self,
        mode: str | None = None,
        max_history: int | None = None,
        constraint: str | None = None,
        epsilon: float | None = None,
        temperature: float | None = None,
        init: str | None = None,
        auto_project: bool | None = None,
        use_gating: bool | None = None,
        prune_threshold: float | None = None,
        stochastic: bool | None = None,
        *,
        config: MHCConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = resolve_config(
            config,
            mode=mode,
            max_history=max_history,
            constraint=constraint,
            epsilon=epsilon,
            temperature=temperature,
            init=init,
            auto_project=auto_project,
            use_gating=use_gating,
            prune_threshold=prune_threshold,
            stochastic=stochastic,
            **options,
        )
        self.live = self.max_history
        mixes = self.mode != "residual"
        self.mixing_logits = nn.Parameter(torch.empty(self.max_history), requires_grad=mixes)
        if self.use_gating:
            self.gate_logit = nn.Parameter(torch.empty(()), requires_grad=mixes)
        self.projection = WidthMap() if self.config.auto_project else None
        self.reset_parameters()

    @property
    def config(self) -> MHCConfig:
        return self._config

    @config.setter
    def config(self, config: MHCConfig) -> None:
        before = getattr(self, "_config", None)
        check_change("MHCSkip", before, config, FIXED)
        self._config = config
        if before is not None and (before.mode == "residual") != (config.mode == "residual"):
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(config.mode != "residual")

    mode = settable("mode")
    max_history = settable("max_history")
    constraint = settable("constraint")
    epsilon = settable("epsilon")
    temperature = settable("temperature")
    auto_project = settable("auto_project")
    use_gating = settable("use_gating")
    prune_threshold = settable("prune_threshold")
    stochastic = settable("stochastic")

    def reset_parameters(self) -> None:
        """Set the logits to what they start as (`INITS`), 0 for the latest state, and the gate logit to 2."""
        with torch.no_grad():
            self.mixing_logits.fill_(INITS[self.config.init](self.config))
            self.mixing_logits[-1] = 0.0
            if self.use_gating:
                self.gate_logit.fill_(2.0)

    @property
    def logits(self) -> nn.Parameter:
        """The same parameter as `mixing_logits`."""
        return self.mixing_logits

    def mixing_weights(self, k: int | None = None) -> Float[Tensor, "k"]:
        """The weights of `k` live states, the latest last; by default as many as the last forward mixed.

        They are the point on the manifold: pruned weights are 0, neither noise nor the gate is applied. In mode
        "residual" all weight is on the latest state.

        Raises:
            ValueError: k is not in 0..max_history.
        """
        k = self.live if k is None else k
        if not 0 <= k <= self.max_history:
            raise ValueError(f"k must be in 0..{self.max_history}, got {k}")
        if k == 0:
            return self.mixing_logits.new_empty(0)
        if self.mode == "residual":
            return torch.eye(k, device=self.mixing_logits.device)[-1]
        return self.prune(self.project(self.mixing_logits[-k:]))

    def project(self, logits: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Logits to weights: the constraint of mode "mhc", the plain softmax of mode "hc"."""
        return self.config.projection(logits, self.config)

    def prune(self, weights: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Weights below prune_threshold become 0; the others stay as they are."""
        if self.prune_threshold == 0:
            return weights
        return torch.where(weights < self.prune_threshold, 0, weights)

    def coefficients(
        self, logits: Float[Tensor, "*batch k"], gate_logit: Float[Tensor, "*batch"] | None
    ) -> Float[Tensor, "*batch k"]:
        """What the states are multiplied with: noise while training if stochastic, projection, pruning, gate."""
        if self.stochastic and self.training:
            logits = logits - torch.empty_like(logits).exponential_().log()  # -log(Exp(1)) is standard Gumbel
        weights = self.prune(self.project(logits))
        return weights if gate_logit is None else weights * torch.sigmoid(gate_logit)[..., None]

    def forward(
        self,
        x: Inexact[Tensor, "*shape"],
        history: Sequence[Tensor],
        tape: Tape | None = None,
    ) -> Inexact[Tensor, "*shape"]:
        """Add the mixed history to the branch output `x`.

        Args:
            x: output of the branch.
            history: past states, oldest first; the last `max_history` are used. With none, the output equals `x`.
            tape: mixes in place of this layer, where a container has projected the logits of all its layers at once.

        Raises:
            ValueError: shapes or devices of the states differ from those of x, and auto_project does not help.
            TypeError: their dtype is wider than that of x, outside of autocast; x is no tensor; history is no list or
                tuple of tensors.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x, the output of the branch, must be a tensor, got {type(x).__name__}")
        if not isinstance(history, (list, tuple)):
            raise TypeError(f"history must be a list of tensors, got {type(history).__name__}")
        config = self.config
        window = history[-1:] if config.mode == "residual" else history[-config.max_history :]
        gate_logit = self.gate_logit if config.use_gating else None
        if self.live != len(window):  # writing an attribute of a module takes as long as mixing a state
            self.live = len(window)
        if not window:
            # Nothing to mix, but DDP wants every parameter in the graph.
            return x + 0 * self.coefficients(self.mixing_logits, gate_logit).sum()
        if self.projection is not None:
            window = self.projection(window, x)
        if config.mode == "residual":
            check_window(window, x)
            return x + window[0]
        if tape is not None:
            return tape.mix(x, window)
        return mix(x, window, self.coefficients(self.mixing_logits[-len(window) :], gate_logit).unbind())

    def mixed_states(self, x: Tensor, history: Sequence[Tensor], *_: Any) -> list[Tensor]:
        """The states that a call mixes."""
        return list(history[-self.max_history :])

    def recorded(self, x: Tensor, history: Sequence[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
        """What a call depends on: the branch's output, and the states in the window."""
        return x, self.mixed_states(x, history)

    def extra_repr(self) -> str:
        shown = f"mode={self.mode!r}, max_history={self.max_history}"
        if self.mode == "mhc":
            shown += f", constraint={self.constraint!r}"
        return shown + (", use_gating=True" if self.use_gating else "")
