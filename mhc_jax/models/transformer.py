"""A small decoder-only transformer, with a choice of how its layers are connected."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mhc_jax.history.config import DEFAULTS as HISTORY_DEFAULTS
from mhc_jax.history.config import MHCConfig
from mhc_jax.kernels.choice import Implementation
from mhc_jax.nn.hyper_connections import HyperConnections, StreamStack
from mhc_jax.nn.stack import MHCStack
from mhc_jax.options import resolve
from mhc_jax.streams import Connected, StreamConfig
from mhc_jax.streams.config import DEFAULTS as STREAM_DEFAULTS

Connection = Literal["residual", "history", "streams"]


class CausalSelfAttention(nnx.Module):
    """Multi-head attention of every position to itself and those before it; Vaswani et al. 2017, arXiv 1706.03762.

    Args:
        features: width, a multiple of num_heads.
        num_heads: number of heads.
        dtype: of the computation; None is that of the parameters, which are float32.
        rngs: for the parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.models.transformer import CausalSelfAttention
        >>> CausalSelfAttention(16, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    def __init__(self, features: int, num_heads: int, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        self.num_heads = num_heads
        self.qkv = nnx.Linear(features, 3 * features, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(features, features, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, -1), -3, 0)
        # Not jax.nn.dot_product_attention: its softmax is float32 for float64 arrays too.
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), -jnp.inf)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return self.out(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape))


class AttentionBranch(nnx.Module):
    """attention(norm(x)): what a layer adds first. Arguments as `CausalSelfAttention`."""

    def __init__(self, features: int, num_heads: int, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
        self.attention = CausalSelfAttention(features, num_heads, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.attention(self.norm(x))


class MLPBranch(nnx.Module):
    """A GELU network of four times the width, after a norm: what a layer adds second."""

    def __init__(self, features: int, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(features, 4 * features, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * features, features, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        return self.down(nnx.gelu(self.up(self.norm(x))))


class TransformerLayer(nnx.Module):
    """What one layer adds to its input: a = attention(x);  f(x) = a + mlp(x + a).

    With a residual connection around it, `x + f(x)`, it is the pre-norm layer of GPT-2 with RMSNorm and without biases.

    Args:
        features, num_heads, dtype, rngs: as `CausalSelfAttention`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.models.transformer import TransformerLayer
        >>> TransformerLayer(16, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 16))).shape
        (2, 5, 16)
    """

    def __init__(self, features: int, num_heads: int, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        self.attention = AttentionBranch(features, num_heads, dtype=dtype, rngs=rngs)
        self.mlp = MLPBranch(features, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        attended = self.attention(x)
        return attended + self.mlp(x + attended)


class StreamTransformerLayer(nnx.Module):
    """The same two branches, each connected to n streams.

    Args:
        features, num_heads, dtype, rngs: as `CausalSelfAttention`.
        config: of the hyper-connections.
        index: number of the layer, from 0.
        implementation: as `HyperConnections`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        config: StreamConfig,
        index: int | Array,
        *,
        dtype: Any = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ) -> None:
        common: dict[str, Any] = {"config": config, "implementation": implementation}
        attention = AttentionBranch(features, num_heads, dtype=dtype, rngs=rngs)
        mlp = MLPBranch(features, dtype=dtype, rngs=rngs)
        self.attention = HyperConnections(attention, features, layer_index=2 * index, **common)
        self.mlp = HyperConnections(mlp, features, layer_index=2 * index + 1, **common)

    def __call__(self, streams: Float[Array, "B T n C"]) -> Float[Array, "B T n C"]:
        return self.mlp(self.attention(streams))

    def connected(self) -> list[Connected]:
        """The branches that this layer is a chain of."""
        return self.attention.connected() + self.mlp.connected()


class MHCTransformer(nnx.Module):
    """A decoder-only language model: embeddings of tokens and positions, a scanned stack of layers, tied output.

    Args:
        vocabulary: number of tokens.
        features: width C, a multiple of num_heads.
        num_heads: number of attention heads.
        depth: number of layers.
        max_length: longest sequence.
        connection: `"history"` mixes the last `max_history` states into every layer, `"residual"` adds only the latest,
            `"streams"` carries n residual streams (`HyperConnections`).
        dtype: of the computation and the states; None is that of the parameters, which are float32 as the logits are.
        config: all options of the connection in one value, an `MHCConfig` ("history") or `StreamConfig` ("streams");
            keywords, its fields, change single ones.
        implementation: as of `MHCStack` ("history", "residual") or `HyperConnections` ("streams").
        rngs: for the parameters, and for the noise of `stochastic`.

    Attributes:
        embed, positions: `nnx.Embed`; the output uses `embed` too.
        stack: the layers, an `MHCStack` of `TransformerLayer`, or a `StreamStack` of `StreamTransformerLayer`.
        norm: the last `nnx.RMSNorm`.

    Raises:
        TypeError, ValueError: as those configurations; an option belongs to another connection.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.models import MHCTransformer
        >>> model = MHCTransformer(100, features=16, num_heads=2, depth=3, max_length=8, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 100)
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        features: int,
        num_heads: int,
        depth: int,
        max_length: int,
        connection: Connection = "history",
        dtype: Any = None,
        config: MHCConfig | StreamConfig | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if features % num_heads:
            raise ValueError(f"features must be a multiple of num_heads={num_heads}, got {features}")
        self.max_length = max_length
        self.embed = nnx.Embed(vocabulary, features, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(max_length, features, dtype=dtype, rngs=rngs)

        def make_layer(rngs: nnx.Rngs) -> TransformerLayer:
            return TransformerLayer(features, num_heads, dtype=dtype, rngs=rngs)

        def make_stream_layer(rngs: nnx.Rngs, index: Array) -> StreamTransformerLayer:
            return StreamTransformerLayer(
                features, num_heads, streams, index, dtype=dtype, implementation=implementation, rngs=rngs
            )

        common: dict[str, Any] = {"implementation": implementation, "rngs": rngs}
        self.stack: MHCStack | StreamStack
        if connection == "residual":
            if config is not None or options:
                raise ValueError(f"connection: 'residual' has no options, got {config or sorted(options)}")
            self.stack = MHCStack(make_layer, depth, max_history=1, mode="residual", **common)
        elif connection == "history":
            history = resolve(HISTORY_DEFAULTS, config, **options)
            self.stack = MHCStack(make_layer, depth, config=history, **common)
        elif connection == "streams":
            streams = resolve(STREAM_DEFAULTS, config, **options)
            self.stack = StreamStack(make_stream_layer, depth, config=streams, rngs=rngs)
        else:
            raise ValueError(f"connection must be one of {get_args(Connection)}, got {connection!r}")
        self.norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T vocabulary"]:
        """Tokens to the logits of the token after each.

        Raises:
            ValueError: the sequence is longer than max_length.
        """
        length = tokens.shape[-1]
        if length > self.max_length:
            raise ValueError(f"tokens has sequences of length {length}, longer than max_length={self.max_length}")
        x = self.embed(tokens) + self.positions(jnp.arange(length))
        logits = self.embed.attend(self.norm(self.stack(x)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
