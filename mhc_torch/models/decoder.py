"""A decoder-only language model of the Llama and Qwen3 family, with a choice of how its layers are connected."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_torch.history.config import MHCConfig, get_default_config
from mhc_torch.history.window import appended
from mhc_torch.models.cache import KVCache
from mhc_torch.models.config import DecoderConfig
from mhc_torch.models.loss import cross_entropy
from mhc_torch.models.rotary import rotary, rotate
from mhc_torch.models.sampling import check_sampling, sample
from mhc_torch.nn.hyper_connections import ConnectionMaps, through
from mhc_torch.nn.sequential import tape_of, window_maps
from mhc_torch.nn.skip import MHCSkip
from mhc_torch.options import resolve
from mhc_torch.streams import Connected, StreamConfig, expand, reduce
from mhc_torch.streams.depth import check_block_length

Connection = Literal["residual", "history", "streams"]


States = Float[Tensor, "B T *n C"]
"""What layers pass on: one state, or several side by side."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries; `index` is the number of the layer, from 0."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        queries, others = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = _linear(config.features, queries)
        self.k_proj = _linear(config.features, others)
        self.v_proj = _linear(config.features, others)
        self.o_proj = _linear(queries, config.features)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_width, eps=config.norm_epsilon)
            self.k_norm = nn.RMSNorm(config.head_width, eps=config.norm_epsilon)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        cache: KVCache | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        past = 0 if cache is None or self.index not in cache.layers else cache.layers[self.index][0].shape[2]
        if positions is None:
            positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        cos, sin = rotary(self.config, positions, q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        # What needs no mask may run in a kernel that knows what causal is.
        masked = segments is not None or (past and x.shape[1] > 1)
        seen = _seen(x.shape[1], past, x.device, segments) if masked else None
        causal = seen is None and not past
        mixed = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1])
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_width))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.features, config.mlp_features)
        self.up_proj = _linear(config.features, config.mlp_features)
        self.down_proj = _linear(config.mlp_features, config.features)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """What one layer adds to its input: a = attention(x);  f(x) = a + mlp(x + a).

    With a residual connection around it, `x + f(x)`, it is the layer of Llama. `skip` mixes the history into it;
    `context` of the call are the further arguments of `Attention`. Retrofitted, it adds to several states (..., n, C).
    """

    def __init__(self, config: DecoderConfig, index: int, skip: MHCSkip | None = None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.features, eps=config.norm_epsilon)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.features, eps=config.norm_epsilon)
        self.mlp = MLP(config)
        if skip is not None:
            self.skip = skip

    def attend(self, x: States, *context: Any) -> States:
        """The first branch, attention after its norm."""
        return self.self_attn(self.input_layernorm(x), *context)

    def transform(self, x: States) -> States:
        """The second branch, SwiGLU after its norm."""
        return self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: States, *context: Any) -> States:
        attended = self.attend(x, *context)
        return attended + self.transform(x + attended)


class StreamDecoderLayer(DecoderLayer):
    """The same two branches, each connected to n streams."""

    def __init__(self, config: DecoderConfig, index: int, streams: StreamConfig) -> None:
        super().__init__(config, index)
        attention, mlp = ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")
        self.attn_hc = ConnectionMaps(config.features, streams, 2 * index, branch_names=attention)
        self.ffn_hc = ConnectionMaps(config.features, streams, 2 * index + 1, branch_names=mlp)

    def forward(self, streams: Float[Tensor, "B T n C"], *context: Any) -> Float[Tensor, "B T n C"]:
        return self.ffn_hc.around(self.transform, self.attn_hc.around(self.attend, streams, *context))

    def connected(self, *context: Any) -> list[Connected]:
        """The branches that a call with this context is a chain of."""
        return [self.attn_hc.connecting(self.attend, *context), self.ffn_hc.connecting(self.transform)]

    def mixed_states(self, streams: Tensor, *_: Any) -> list[Tensor]:
        """The states that a call mixes."""
        return [streams]


class DecoderStack(nn.ModuleList):
    """The layers, connected."""

    def __init__(
        self,
        config: DecoderConfig,
        connection: MHCConfig | StreamConfig | None,
        checkpointing: bool,
        block_length: int = 1,
    ) -> None:
        check_block_length(block_length)
        if block_length > 1 and not isinstance(connection, StreamConfig):
            raise ValueError(f"block_length is of use to connection='streams' alone, got {block_length}")
        self.connection, self.checkpointing, self.block_length = connection, checkpointing, block_length
        indices = range(config.depth)
        if isinstance(connection, StreamConfig):
            super().__init__(StreamDecoderLayer(config, index, connection) for index in indices)
        elif connection is not None:
            super().__init__(DecoderLayer(config, index, MHCSkip(config=connection)) for index in indices)
            for index, layer in enumerate(self):
                layer.skip.live = min(index + 1, connection.max_history)  # type: ignore[union-attr]
        else:
            super().__init__(DecoderLayer(config, index) for index in indices)

    def forward(self, x: States, *context: Any) -> States:
        if isinstance(self.connection, MHCConfig):
            return self._with_history(x, self.connection, *context)
        if isinstance(self.connection, StreamConfig):
            return reduce(self._with_streams(expand(x, self.connection.streams), *context))
        for layer in self:
            x = x + self._run(layer, x, *context)
        return x

    def residual_maps(self) -> Float[Tensor, "L n n"]:
        """What each layer does to the window of states, or to the streams, without its branches; float64."""
        layers: Any = self
        if isinstance(self.connection, StreamConfig):
            maps = [hc.resting_maps().res.double() for layer in layers for hc in (layer.attn_hc, layer.ffn_hc)]
            return torch.stack(maps)
        return window_maps([layer.skip for layer in layers] if self.connection else [])

    def _with_history(self, x: Tensor, config: MHCConfig, *context: Any) -> Tensor:
        layers: Any = self
        kept = config.max_history, config.detach_history
        states = appended([], x, *kept)
        tape = tape_of([layer.skip for layer in layers], x, len(states), config.detach_history)
        for layer in layers:
            x = layer.skip(self._run(layer, x, *context), states, tape)
            states = appended(states, x, *kept)
        return x

    def _with_streams(self, streams: Tensor, *context: Any) -> Tensor:
        layers = list(self)
        if not (self.checkpointing and torch.is_grad_enabled()):
            return through(layers, streams, *context, block_length=self.block_length)
        for start in range(0, len(layers), self.block_length):
            block = partial(through, layers[start : start + self.block_length], block_length=1)
            streams = checkpoint(block, streams, *context, use_reentrant=False)
        return streams

    def _run(self, layer: nn.Module, x: Tensor, *context: Any) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, *context, use_reentrant=False)
        return layer(x, *context)


class DecoderModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(
        self,
        config: DecoderConfig,
        connection: MHCConfig | StreamConfig | None,
        checkpointing: bool,
        block_length: int = 1,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.features)
        nn.init.normal_(self.embed_tokens.weight, std=config.features**-0.5)
        self.layers = DecoderStack(config, connection, checkpointing, block_length)
        self.norm = nn.RMSNorm(config.features, eps=config.norm_epsilon)

    def forward(self, tokens: Int[Tensor, "B T"], *context: Any) -> Float[Tensor, "B T C"]:
        return self.norm(self.layers(self.embed_tokens(tokens), *context))


class Decoder(nn.Module):
    """A decoder-only language model: embedding, a stack of layers, RMSNorm, output layer.

    The twin of `mhc_jax.models.Decoder`. Its state dict has the keys of Llama and Qwen3 in transformers, whatever the
    connection: of a residual decoder just these, so that `load_state_dict` and `bridge.load` take public checkpoints.

    Args:
        config: the sizes.
        connection: "residual" adds the latest state to every layer, "history" mixes the last ones into it, "streams"
            carries n residual streams around both of its branches; or the `MHCConfig` or `StreamConfig` itself.
        options: keywords, the fields of `MHCConfig` or of `StreamConfig`, change single options of the connection.
        use_checkpointing: keep only the states, and compute the inside of each layer again for the gradient.
        block_length: of how many layers the streams are kept once for the backward pass; see `streams.apply_branches`.
            With `use_checkpointing` nothing else is kept of so many layers.

    Raises:
        ValueError, TypeError: an option is out of range, or belongs to another connection.

    Example:
        >>> import torch
        >>> from mhc_torch.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(100, features=16, mlp_features=32, depth=3, num_heads=2)
        >>> Decoder(config, "streams", streams=2)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 100])
    """

    def __init__(
        self,
        config: DecoderConfig,
        connection: Connection | MHCConfig | StreamConfig = "residual",
        *,
        use_checkpointing: bool = False,
        block_length: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(config, DecoderConfig):
            raise TypeError(f"config must be of type DecoderConfig, got {config!r}")
        self.config = config
        self.model = DecoderModel(config, as_connection(connection, options), use_checkpointing, block_length)
        self.lm_head = _linear(config.features, config.vocabulary)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        *,
        positions: Int[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Tokens to the logits of the token after each, in float32 at least; with a cache, they follow those in it.

        Args:
            positions: of the tokens; by default they are counted on from the cache, or from 0.
            segments: where several texts lie in one row, which of them each token is of: it sees no other.
        """
        logits = self.lm_head(self.hidden(tokens, cache, positions=positions, segments=segments))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        *,
        positions: Int[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """What the output layer reads.

        Raises:
            ValueError: tokens are not integers of shape (B, T), positions or segments are others; the cache is for
                another batch, or given with segments.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be integers of shape (B, T), got {tokens.dtype}{list(tokens.shape)}")
        for name, given in (("positions", positions), ("segments", segments)):
            if given is not None and (given.shape != tokens.shape or given.is_floating_point()):
                shape = f"{given.dtype}{list(given.shape)}"
                raise ValueError(f"{name} must be integers of tokens' shape {list(tokens.shape)}, got {shape}")
        if cache is not None and segments is not None:
            raise ValueError("segments: a cache holds one text a row; call without a cache")
        if cache is not None and len(cache) and (batch := len(cache.layers[0][0])) != len(tokens):
            raise ValueError(f"cache is for a batch of {batch}, tokens has one of {len(tokens)}")
        return self.model(tokens, cache, positions, segments)

    def loss(
        self,
        tokens: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"] | None = None,
        *,
        positions: Int[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        chunk: int = 512,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats; the logits of `chunk` positions of each sequence live at a time.

        Args:
            tokens: what the model reads.
            targets: the token after each, negative where none counts; None for `tokens` one position further on, and
                then the last token is a target only, and the first of a segment counts for none.
            positions, segments: as of the call.
            chunk: as of `cross_entropy`.
        """
        if targets is None:
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
            positions = None if positions is None else positions[:, :-1]
            if segments is not None:
                targets = torch.where(segments[:, 1:] == segments[:, :-1], targets, -1)
                segments = segments[:, :-1]
        hidden = self.hidden(tokens, positions=positions, segments=segments)
        return cross_entropy(hidden, self.lm_head.weight, targets, chunk=chunk)

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "B T"],
        steps: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B T+{steps}"]:
        """`tokens`, and `steps` more that the model continues them with.

        Args:
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only.
            generator: for the draws.

        Raises:
            ValueError: steps is below 1, temperature below 0, or top_k not in 1..V.
        """
        check_sampling(steps, temperature, top_k, self.config.vocabulary)
        cache, latest = KVCache(), tokens
        for _ in range(steps):
            logits = self.lm_head(self.hidden(latest, cache)[:, -1]).float()
            latest = sample(logits, temperature, top_k, generator)
            tokens = torch.cat([tokens, latest], 1)
        return tokens


def as_connection(connection: Any, options: dict[str, Any]) -> MHCConfig | StreamConfig | None:
    """The config of a connection that is given by its name or config; keywords change single options. None is residual.

    Raises:
        ValueError: the name is of none, a residual connection is given options, or an option is out of range.
        TypeError: a keyword is not an option of the connection.
    """
    if connection == "residual":
        if options:
            raise ValueError(f"connection: 'residual' has no options, got {sorted(options)}")
        return None
    named = {"history": get_default_config(), "streams": StreamConfig()}
    config = named.get(connection, connection) if isinstance(connection, str) else connection
    if not isinstance(config, (MHCConfig, StreamConfig)):
        raise ValueError(f"connection must be one of {('residual', *named)} or a config of one, got {connection!r}")
    config = resolve(config, None, **options)
    if isinstance(config, MHCConfig) and config.auto_project:
        raise ValueError("auto_project: the layers of a decoder have one width")
    return config


def _seen(length: int, past: int, device: torch.device, segments: Tensor | None) -> Bool[Tensor, "#B 1 T S"]:
    """Which of past + length keys each of `length` new queries sees."""
    seen = torch.ones(1, 1, length, past + length, dtype=torch.bool, device=device).tril(past)
    return seen if segments is None else seen & (segments[:, None, :, None] == segments[:, None, None, :])


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Without bias; drawn as by `nnx.Linear`, from a normal distribution of variance 1 / inputs, cut at two sigma."""
    linear = nn.Linear(inputs, outputs, bias=False)
    sigma = inputs**-0.5 / 0.87962566103423978  # of what is cut, so that what is left has that variance
    nn.init.trunc_normal_(linear.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    return linear
