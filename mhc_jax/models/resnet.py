"""A ResNet for images in which every block mixes the history of the network."""

from collections.abc import Mapping, Sequence
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
from mhc_jax.nn.blocks import MHCBasicBlock, MHCBottleneck, conv, norm
from mhc_jax.nn.errors import noted
from mhc_jax.nn.skip import skip_gradient_norms, stack_weights
from mhc_jax.options import resolve


class MHCResNet(nnx.Module):
    """A ResNet for images, with one history through all its blocks: a 3x3 stem, stages of blocks, mean, linear head.

    Where a stage halves the resolution, its first block maps the whole window to the new shape; no state is dropped.

    Args:
        stage_sizes: number of blocks in each stage; `(2, 2, 2, 2)` with basic blocks is a ResNet-18.
        num_classes: width of the output.
        in_features: channels of the images.
        features: width of the first stage; it doubles from stage to stage.
        block: `MHCBasicBlock` or `MHCBottleneck`.
        max_history: window H, 4 by default.
        config: all options in one value; keywords, the fields of `MHCConfig`, change single ones.
        implementation: as of `mhc_jax.history.mix`.
        rngs: for the parameters, and for the noise of `stochastic`.

    Attributes:
        conv1, bn1: the stem.
        blocks: the blocks of all stages, an `nnx.List`.
        fc: the head.

    Raises:
        ValueError: an option is out of range, or a stage has no block.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.models import MHCResNet
        >>> model = MHCResNet((1, 1), num_classes=10, features=8, rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 16, 16, 3))).shape
        (2, 10)
    """

    def __init__(
        self,
        stage_sizes: Sequence[int],
        num_classes: int,
        *,
        in_features: int = 3,
        features: int = 64,
        block: type[MHCBasicBlock] | type[MHCBottleneck] = MHCBasicBlock,
        max_history: int | None = None,
        config: MHCConfig | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        config = resolve(DEFAULTS, config, max_history=max_history, **options)
        if not stage_sizes or min(stage_sizes) < 1:
            raise ValueError(f"stage_sizes must hold at least one block for each stage, got {stage_sizes!r}")
        self.conv1, self.bn1 = conv(in_features, features, 3, 1, rngs), norm(features, rngs)
        blocks = []
        width = features
        for stage, size in enumerate(stage_sizes):
            for index in range(size):
                strides = 2 if stage > 0 and index == 0 else 1
                kind: dict[str, Any] = {"config": config, "implementation": implementation}
                blocks.append(block(width, features * 2**stage, strides, rngs=rngs, **kind))
                width = block.expansion * features * 2**stage
        self.blocks = nnx.List(blocks)
        self.config = config
        self.fc = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B num_classes"]:
        """Images, channels last, to class scores. A note on any error says in which block it came up."""
        states: tuple[Array, ...] = (nnx.relu(self.bn1(self.conv1(x))),)
        expect_finite(states, "stem of MHCResNet")
        for index, block in enumerate(self.blocks):
            with noted(f"in block {index} ({type(block).__name__})"):
                states = block.advance(states)
            expect_finite(block.skip.mixing_logits, f"mixing_logits of block {index}")
            expect_finite(states[-1], f"state of block {index} ({type(block).__name__})")
        return self.fc(jnp.mean(states[-1], axis=(1, 2)))

    def mixing_weights(self, *, gated: bool = False) -> Float[Array, "L H"]:
        """The weights of every block, the latest state last, 0 where there is none yet; otherwise as `MHCSkip`'s."""
        return stack_weights([block.skip for block in self.blocks], gated)

    def figures(self, grads: nnx.State) -> dict[str, Array]:
        """What `mhc_jax.monitoring.diagnostics.diagnose` reports."""
        layers = [grads["blocks"][layer] for layer in range(len(self.blocks))]
        norms = skip_gradient_norms([layer["skip"] for layer in layers], layers)
        return history_figures(self.mixing_weights(), self.mixing_weights(gated=True)) | norms

    def shown(self, figures: Mapping[str, np.ndarray]) -> Shown:
        """What the dashboard shows of the figures."""
        live = {f"blocks.{layer}.skip": min(layer + 1, self.config.max_history) for layer in range(len(self.blocks))}
        return show_history(figures, live, container=True)
