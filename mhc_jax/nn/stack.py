"""Many equal layers as one: their parameters stacked, their depth scanned."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax.history import apply_layers, apply_layers_carrying, mixing_weights
from mhc_jax.history.config import DEFAULTS, MHCConfig
from mhc_jax.history.scan import check_layers_implementation
from mhc_jax.kernels.choice import Implementation
from mhc_jax.monitoring.connection import Shown, show_history
from mhc_jax.monitoring.figures import history_figures
from mhc_jax.nn.errors import noted
from mhc_jax.nn.merged import CARRIED, GIVEN, Carries, Merged, drawn_streams, keep, stacked
from mhc_jax.nn.parameters import ConnectionParam
from mhc_jax.nn.sequential import MHCSequential
from mhc_jax.nn.skip import FIXED, GATE_INIT, initial_logits
from mhc_jax.options import check_change, resolve, settable


def unstacked(layers: nnx.Module) -> list[Any]:
    """The single layers of a module whose variables have a leading axis of depth."""
    graph, state = nnx.split(layers)
    depth = jax.tree.leaves(state)[0].shape[0]
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(depth)]


class MHCStack(nnx.Module):
    """L equal layers with history mixing, compiled once: `MHCSequential` at a fraction of the time and memory.

        x_{l+1} = f_l(x_l) + g_l * sum_k alpha_{l,k} x_k

    Args:
        make_layer: makes one branch from random streams, `lambda rngs: nnx.Linear(64, 64, rngs=rngs)`. A branch maps an
            array to one of the same shape; it may use dropout, keep batch statistics or a cache, and sow. What it
            writes while it runs costs memory for a window of states in every layer of a backward pass.
        depth: number of layers L.
        max_history: window H, 4 by default.
        config: all options in one value; keywords, the fields of `MHCConfig`, change single ones.
        policy: what of a branch to keep for the backward pass (`jax.checkpoint_policies`); the default keeps everything
            its derivative needs.
        implementation: as of `mhc_jax.history.apply_layers`.
        rngs: for the layers; a branch with dropout draws from the stream `dropout`, `stochastic` from `mixing`.

    Attributes:
        layers: one module of the branch's type, whose variables have a leading axis of length L.
        mixing_logits: (L, H) parameter, the latest state last.
        gate_logit: (L,) parameter, only with use_gating.
        deterministic: no noise is drawn for `stochastic`; set by `model.eval()` and `model.train()`.
        config: the options, read-only. Single ones can be set, as those of an `MHCSkip`.

    Raises:
        ValueError: depth is below 1, an option is out of range, or `auto_project` is set: equal layers have one width.
            On setting an option too, and for one that parameters were made for.
        TypeError: `make_layer` is a module, or an option is none of a history.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import MHCStack
        >>> stack = MHCStack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), depth=50, max_history=4, rngs=nnx.Rngs(0))
        >>> stack(jnp.ones((2, 8))).shape, stack.layers.kernel.shape, stack.mixing_logits.shape
        ((2, 8), (50, 8, 8), (50, 4))
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        depth: int,
        max_history: int | None = None,
        *,
        config: MHCConfig | None = None,
        policy: Callable[..., bool] | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if isinstance(make_layer, nnx.Module):
            kind = type(make_layer).__name__
            raise TypeError(f"make_layer must make a layer from nnx.Rngs, as lambda rngs: {kind}(...); got a {kind}")
        self.config = resolve(DEFAULTS, config, max_history=max_history, **options)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth!r}")
        if self.config.auto_project:
            raise ValueError("auto_project: the layers of a stack are equal and have one width; use MHCSequential")
        self.depth = depth
        self.policy = policy
        check_layers_implementation(implementation)
        self.implementation = implementation
        self.layers = stacked(make_layer, depth, rngs.split(depth))
        self.mixing_logits = ConnectionParam(initial_logits(self.config, depth))
        if self.config.use_gating:
            self.gate_logit = ConnectionParam(jnp.full(depth, GATE_INIT))
        if self.config.stochastic:
            self.rngs = rngs.mixing.fork()
        self.deterministic = False

    @property
    def config(self) -> MHCConfig:
        return self._config

    @config.setter
    def config(self, config: MHCConfig) -> None:
        before = getattr(self, "_config", None)
        check_change("MHCStack", before, config, FIXED)
        if before is not None and config.stochastic and not hasattr(self, "rngs"):
            raise ValueError("stochastic needs rngs, for its noise; make a new MHCStack with it")
        self._config = config

    mode = settable("mode")
    max_history = settable("max_history")
    constraint = settable("constraint")
    epsilon = settable("epsilon")
    temperature = settable("temperature")
    detach_history = settable("detach_history")
    auto_project = settable("auto_project")
    use_gating = settable("use_gating")
    prune_threshold = settable("prune_threshold")
    stochastic = settable("stochastic")

    def __call__(self, x: Float[Array, "*shape"], *args: Any, **kwargs: Any) -> Float[Array, "*shape"]:
        """The last state, x_L. Further arguments reach every layer, the same for all: a mask, positions.

        Raises:
            ValueError: a branch changes the shape of its input.
            TypeError: a branch writes its parameters.
        """
        graphdef = nnx.graphdef(self.layers)
        params, carried = nnx.state(self.layers, GIVEN, CARRIED)
        streams: Any = drawn_streams(self.layers, self.deterministic)
        options: dict[str, Any] = {
            "gate_logits": self.gate_logit[...] if self.config.use_gating else None,
            "mixing_key": self.rngs() if self.config.stochastic and not self.deterministic else None,
            "policy": self.policy,
        }
        mixing = self.mixing_logits[...], self.config
        with noted(f"in the layers of MHCStack ({type(self.layers).__name__})"):
            if not nnx.to_flat_state(carried):
                try:
                    return apply_layers(
                        Merged(graphdef, args, kwargs),
                        params,
                        x,
                        *mixing,
                        keys=streams,
                        implementation=self.implementation,
                        **options,
                    )
                except Carries:
                    pass
            branch = Merged(graphdef, args, kwargs, carries=True)
            variables = nnx.merge_state(params, carried, streams)
            x, carried = apply_layers_carrying(branch, variables, x, *mixing, **options)
        keep(self.layers, carried)
        return x

    def mixing_weights(self, *, gated: bool = False) -> Float[Array, "L H"]:
        """The weights of every layer, the latest state last, 0 where there is none yet; otherwise as `MHCSkip`'s."""
        live = jnp.minimum(jnp.arange(self.depth) + 1, self.config.max_history)
        gated = gated and self.config.use_gating
        return mixing_weights(
            self.mixing_logits[...],
            replace(self.config, use_gating=gated),
            live=live,
            gate_logit=self.gate_logit[...] if gated else None,
        )

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        norms = jax.vmap(optax.tree.norm)
        figures = history_figures(self.mixing_weights(), self.mixing_weights(gated=True))
        return figures | {"logits_grad_norm": norms(grads["mixing_logits"]), "grad_norm": norms(grads["layers"])}

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        live = {f"skip_layers.{layer}": min(layer + 1, self.config.max_history) for layer in range(self.depth)}
        return show_history(figures, live, container=True)

    def unrolled(self) -> MHCSequential:
        """The same function as a chain of single layers, each of which can be watched and run alone; draws no noise."""
        chain = MHCSequential(unstacked(self.layers), config=self.config, policy=self.policy, rngs=nnx.Rngs(0))
        for layer, skip in enumerate(chain.skip_layers):
            skip.mixing_logits.set_value(self.mixing_logits[layer])
            skip.deterministic = self.deterministic
            if self.config.use_gating:
                skip.gate_logit.set_value(self.gate_logit[layer])
        return chain
