"""Residual blocks of image networks, which mix the history of the network in place of the residual connection."""

from typing import Any

from flax import nnx
from jaxtyping import Array

from mhc_jax.history.config import DEFAULTS, MHCConfig
from mhc_jax.kernels.choice import Implementation
from mhc_jax.nn.conv import Image, Output, fit
from mhc_jax.nn.skip import MHCSkip
from mhc_jax.options import resolve


def conv(in_features: int, out_features: int, size: int, strides: int, rngs: nnx.Rngs) -> nnx.Conv:
    # Padded on both sides alike, as everywhere but in TensorFlow.
    return nnx.Conv(in_features, out_features, (size, size), strides, padding=size // 2, use_bias=False, rngs=rngs)


def norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, rngs=rngs)


class _Block(nnx.Module):
    """What basic and bottleneck blocks share: the skip, and the projection of the window to a new shape."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        strides: int,
        config: MHCConfig,
        implementation: Implementation,
        rngs: nnx.Rngs,
    ) -> None:
        self.downsample = (
            nnx.Sequential(conv(in_features, out_features, 1, strides, rngs), norm(out_features, rngs))
            if strides != 1 or in_features != out_features
            else None
        )
        self.skip = MHCSkip(config=config, implementation=implementation, rngs=rngs)

    def branch(self, x: Image) -> Output:
        raise NotImplementedError

    def __call__(self, x: Image) -> Output:
        """The block alone: the window holds `x` only, as in a plain ResNet."""
        return self.advance((x,))[-1]

    def advance(self, states: tuple[Array, ...]) -> tuple[Array, ...]:
        """The block in a model: past states, oldest first, the input last -> the same with the output.

        At most `max_history + 1` states come back, all of the output's shape.

        Raises:
            ValueError: the states do not share one shape.
        """
        window = fit(states[-self.skip.config.max_history :], self.downsample)
        return (*window, nnx.relu(self.skip(self.branch(states[-1]), window)))


class MHCBasicBlock(_Block):
    """Two 3x3 convolutions with history mixing, `relu(f(x_l) + g * sum_k alpha_k P x_k)`, channels last.

    In mode "residual" it is the basic block of He et al. (2015, arXiv 1512.03385). P is the identity, or where the
    block changes width or resolution a 1x1 convolution with batch norm, applied to the whole window.

    Args:
        in_features, features: widths of input and output.
        strides: of the first convolution.
        max_history: window H, 4 by default.
        config: all options in one value; keywords, the fields of `MHCConfig`, change single ones.
        implementation: as of `mhc_jax.history.mix`.
        rngs: for the parameters, and for the noise of `stochastic`.

    Attributes:
        conv1, bn1, conv2, bn2, skip, downsample: the parts; downsample (P) is None where nothing changes.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import MHCBasicBlock
        >>> MHCBasicBlock(8, 16, strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 16, 16, 8))).shape
        (2, 8, 8, 16)
    """

    expansion = 1

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int = 1,
        max_history: int | None = None,
        *,
        config: MHCConfig | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        config = resolve(DEFAULTS, config, max_history=max_history, **options)
        super().__init__(in_features, features, strides, config, implementation, rngs)
        self.conv1, self.bn1 = conv(in_features, features, 3, strides, rngs), norm(features, rngs)
        self.conv2, self.bn2 = conv(features, features, 3, 1, rngs), norm(features, rngs)

    def branch(self, x: Image) -> Output:
        """f: (B, H, W, in_features) -> (B, H', W', features)."""
        return self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))


class MHCBottleneck(_Block):
    """1x1, 3x3 and 1x1 convolutions with history mixing, `relu(f(x_l) + g * sum_k alpha_k P x_k)`, channels last.

    In mode "residual" it is the bottleneck block of He et al. (2015, arXiv 1512.03385) with the stride on the 3x3
    convolution. The output is four times as wide as `features`.

    Args:
        in_features: width of the input.
        features: width of the 3x3 convolution; that of the output is `4 * features`.
        strides: of the 3x3 convolution.
        max_history: window H, 4 by default.
        config: all options in one value; keywords, the fields of `MHCConfig`, change single ones.
        implementation: as of `mhc_jax.history.mix`.
        rngs: for the parameters, and for the noise of `stochastic`.

    Attributes:
        conv1, bn1, conv2, bn2, conv3, bn3, skip, downsample: the parts; downsample (P) is None where nothing changes.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.nn import MHCBottleneck
        >>> MHCBottleneck(16, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 16)
    """

    expansion = 4

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int = 1,
        max_history: int | None = None,
        *,
        config: MHCConfig | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        wide = self.expansion * features
        config = resolve(DEFAULTS, config, max_history=max_history, **options)
        super().__init__(in_features, wide, strides, config, implementation, rngs)
        self.conv1, self.bn1 = conv(in_features, features, 1, 1, rngs), norm(features, rngs)
        self.conv2, self.bn2 = conv(features, features, 3, strides, rngs), norm(features, rngs)
        self.conv3, self.bn3 = conv(features, wide, 1, 1, rngs), norm(wide, rngs)

    def branch(self, x: Image) -> Output:
        """f: (B, H, W, in_features) -> (B, H', W', 4 * features)."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(nnx.relu(self.bn2(self.conv2(x)))))
