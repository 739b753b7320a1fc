"""A chain of any modules, with a history-mixing skip around each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax.history.config import DEFAULTS, MHCConfig
from mhc_jax.kernels.choice import Implementation
from mhc_jax.monitoring.connection import Shown, show_history
from mhc_jax.monitoring.figures import history_figures
from mhc_jax.monitoring.nonfinite import expect_finite
from mhc_jax.nn.errors import noted
from mhc_jax.nn.skip import FIXED, MHCSkip, skip_gradient_norms, stack_weights
from mhc_jax.options import check_change, resolve, settable


class MHCSequential(nnx.Module):
    """`x_{l+1} = f_l(x_l) + g_l * sum_k alpha_{l,k} x_k` for each module f_l in turn; the window includes the input.

    For modules that differ; every layer is compiled on its own. For many equal layers
    `MHCStack` computes the same with a compile time that does not grow with depth.

    Args:
        modules: the branches f_l, each from one array to one array.
        max_history: window H, 4 by default.
        config: all options in one value; keywords, the fields of `MHCConfig`, change single ones.
        features: with `auto_project`, the widths (last axes) of the states x_0, ..., x_L.
        policy: what of a branch to keep for the backward pass (`jax.checkpoint_policies`); the default keeps everything
            its derivative needs.
        implementation: as of `mhc_jax.history.mix`.
        rngs: needed for `stochastic` and `auto_project`.

    Attributes:
        wrapped_modules: the branches, an `nnx.List`.
        skip_layers: one `MHCSkip` for each branch, an `nnx.List`.
        config: the options, read-only. Single ones can be set, as those of an `MHCSkip`: `model.temperature = 0.5`
            gives all skips the options of the chain.

    Raises:
        ValueError: as `MHCSkip`, on setting an option too; `modules` is empty; `features` does not fit, in number or in
            that a window would hold states of two other widths.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import MHCSequential
        >>> rngs = nnx.Rngs(0)
        >>> model = MHCSequential([nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)], max_history=4)
        >>> model(jnp.ones((2, 8))).shape
        (2, 8)
    """

    def __init__(
        self,
        modules: Iterable[nnx.Module],
        max_history: int | None = None,
        *,
        config: MHCConfig | None = None,
        features: Sequence[int] | None = None,
        policy: Callable[..., bool] | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> None:
        if isinstance(modules, nnx.Module):
            raise TypeError(
                f"modules must be an iterable of modules, [first, second, ...]; got {type(modules).__name__}"
            )
        config = resolve(DEFAULTS, config, max_history=max_history, **options)
        self._config = config
        self.policy = policy
        self.wrapped_modules = nnx.List(modules)
        depth = len(self.wrapped_modules)
        if depth == 0:
            raise ValueError("modules must hold at least one module")
        if config.auto_project and (features is None or len(features) != depth + 1):
            raise ValueError(f"features: auto_project needs the widths of all {depth + 1} states, got {features!r}")
        self.skip_layers = nnx.List(
            MHCSkip(
                config=replace(config, auto_project=bool(widths)), implementation=implementation, rngs=rngs, **widths
            )
            for widths in (_widths(layer, config, features) for layer in range(depth))
        )

    @property
    def config(self) -> MHCConfig:
        return self._config

    @config.setter
    def config(self, config: MHCConfig) -> None:
        check_change("MHCSequential", self._config, config, FIXED)
        for skip in self.skip_layers:
            skip.config = replace(config, auto_project=skip.config.auto_project)
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

    def __call__(self, x: Float[Array, "*shape"], *args: Any, **kwargs: Any) -> Float[Array, "*out"]:
        """The last state. Further arguments reach every layer, the same for all: a mask, positions.

        Raises:
            ValueError: as `MHCSkip.__call__`; a note on any error says in which layer it came up.
        """

        def call(module: Any, x: Array) -> Array:
            return module(x, *args, **kwargs)

        if self.policy is not None:
            call = nnx.remat(call, policy=self.policy)
        expect_finite(x, "input of MHCSequential")
        states = [x]
        for layer, (module, skip) in enumerate(zip(self.wrapped_modules, self.skip_layers, strict=True)):
            name = f"layer {layer} ({type(module).__name__})"
            with noted(f"in {name}"):
                y = call(module, states[-1])
                if jnp.promote_types(y.dtype, states[-1].dtype) == states[-1].dtype:
                    y = y.astype(states[-1].dtype)  # float32 states around bfloat16 branches stay what they are
                states.append(skip(y, states))
            expect_finite(skip.mixing_logits, f"mixing_logits of layer {layer}")
            expect_finite(y, f"branch of {name}")
        return states[-1]

    def mixing_weights(self, *, gated: bool = False) -> Float[Array, "L H"]:
        """The weights of every layer, the latest state last, 0 where there is none yet; otherwise as `MHCSkip`'s."""
        return stack_weights(self.skip_layers, gated)

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        depth = range(len(self.skip_layers))
        # A layer without parameters has no entry among the gradients.
        layers = [grads.get("wrapped_modules", {}).get(layer, {}) for layer in depth]
        norms = skip_gradient_norms([grads["skip_layers"][layer] for layer in depth], layers)
        return history_figures(self.mixing_weights(), self.mixing_weights(gated=True)) | norms

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        depth = range(len(self.skip_layers))
        live = {f"skip_layers.{layer}": min(layer + 1, self.config.max_history) for layer in depth}
        return show_history(figures, live, container=True)


def _widths(layer: int, config: MHCConfig, features: Sequence[int] | None) -> dict[str, int]:
    """What the skip of `layer` has to map, if anything."""
    if not config.auto_project or features is None:
        return {}
    width = features[layer + 1]
    window = features[max(0, layer + 1 - config.max_history) : layer + 1]
    others = sorted(set(window) - {width})
    if len(others) > 1:
        raise ValueError(
            f"features: the window of layer {layer} holds states of widths {others} beside {width}; "
            "those that differ must have one width"
        )
    return {"history_features": others[0], "features": width} if others else {}
