"""A small decoder-only transformer, with a choice of how its layers are connected."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mhc_torch.history.config import MHCConfig, get_default_config
from mhc_torch.nn.hyper_connections import HyperConnections, StreamStack
from mhc_torch.nn.sequential import MHCSequential
from mhc_torch.options import resolve
from mhc_torch.streams import StreamConfig
from mhc_torch.streams.config import DEFAULTS

Connection = Literal["residual", "history", "streams"]
_EPSILON = 1e-6


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every position to itself and those before it; Vaswani et al. 2017, arXiv 1706.03762."""

    def __init__(self, features: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.out = nn.Linear(features, features, bias=False)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class AttentionBranch(nn.Module):
    """attention(norm(x)): what a layer adds first."""

    def __init__(self, features: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features, eps=_EPSILON)
        self.attention = CausalSelfAttention(features, num_heads)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.attention(self.norm(x))


class MLPBranch(nn.Module):
    """A GELU network of four times the width, after a norm: what a layer adds second."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features, eps=_EPSILON)
        self.up = nn.Linear(features, 4 * features, bias=False)
        self.down = nn.Linear(4 * features, features, bias=False)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


class TransformerLayer(nn.Module):
    """What one layer adds to its input: a = attention(x);  f(x) = a + mlp(x + a).

    With a residual connection around it, `x + f(x)`, it is the pre-norm layer of GPT-2 with RMSNorm and without biases.
    """

    def __init__(self, features: int, num_heads: int) -> None:
        super().__init__()
        self.attention = AttentionBranch(features, num_heads)
        self.mlp = MLPBranch(features)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        attended = self.attention(x)
        return attended + self.mlp(x + attended)


class StreamTransformerLayer(nn.Module):
    """The same two branches, each connected to n streams; `index` is the number of the layer, from 0."""

    def __init__(self, features: int, num_heads: int, config: StreamConfig, index: int) -> None:
        super().__init__()
        attention, mlp = AttentionBranch(features, num_heads), MLPBranch(features)
        self.attention = HyperConnections(attention, features, config=config, layer_index=2 * index)
        self.mlp = HyperConnections(mlp, features, config=config, layer_index=2 * index + 1)

    def forward(self, streams: Float[Tensor, "B T n C"]) -> Float[Tensor, "B T n C"]:
        return self.mlp(self.attention(streams))


class MHCTransformer(nn.Module):
    """A decoder-only language model: embeddings of tokens and positions, a stack of layers, tied output.

    The twin of `mhc_jax.models.MHCTransformer`: the names of parameters are the same, and so is the function.

    Args:
        vocabulary: number of tokens.
        features: width C, a multiple of num_heads.
        num_heads: number of attention heads.
        depth: number of layers.
        max_length: longest sequence.
        connection: "history" mixes the last `max_history` states into every layer, "residual" adds the latest alone,
            "streams" connects both branches of every layer to n residual streams.
        config: all options of the connection in one value, an `MHCConfig` ("history") or `StreamConfig` ("streams").
        options: its fields, which change single ones; `use_checkpointing` of `MHCSequential` too.

    Raises:
        TypeError, ValueError: as those configurations; an option belongs to another connection.
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
        config: MHCConfig | StreamConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if features % num_heads:
            raise ValueError(f"features must be a multiple of num_heads={num_heads}, got {features}")
        self.max_length = max_length
        self.embed = nn.Embedding(vocabulary, features)
        self.positions = nn.Embedding(max_length, features)
        nn.init.normal_(self.embed.weight, std=features**-0.5)
        nn.init.normal_(self.positions.weight, std=features**-0.5)
        self.stack: MHCSequential | StreamStack
        if connection == "residual":
            if config is not None or options:
                raise ValueError(f"connection: 'residual' has no options, got {config or sorted(options)}")
            layers = (TransformerLayer(features, num_heads) for _ in range(depth))
            self.stack = MHCSequential(layers, max_history=1, mode="residual")
        elif connection == "history":
            layers = (TransformerLayer(features, num_heads) for _ in range(depth))
            self.stack = MHCSequential(layers, config=resolve(get_default_config(), config), **options)
        elif connection == "streams":
            streams = resolve(DEFAULTS, config, **options)
            stream_layers = (StreamTransformerLayer(features, num_heads, streams, index) for index in range(depth))
            self.stack = StreamStack(stream_layers, config=streams)
        else:
            raise ValueError(f"connection must be one of {get_args(Connection)}, got {connection!r}")
        self.norm = nn.RMSNorm(features, eps=_EPSILON)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T vocabulary"]:
        """Tokens to the logits of the token after each; a ValueError if the sequence is longer than max_length."""
        length = tokens.shape[-1]
        if length > self.max_length:
            raise ValueError(f"tokens has sequences of length {length}, longer than max_length={self.max_length}")
        x = self.embed(tokens) + self.positions(torch.arange(length, device=tokens.device))
        return F.linear(self.norm(self.stack(x)), self.embed.weight)
