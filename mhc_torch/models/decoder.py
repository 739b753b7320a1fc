"""A decoder-only language model of the Llama and Qwen3 family, with a choice of how its layers are connected."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_torch.history.config import MHCConfig, get_default_config
from mhc_torch.history.window import appended
from mhc_torch.models.loss import cross_entropy
from mhc_torch.nn.hyper_connections import ConnectionMaps
from mhc_torch.nn.sequential import tape_of
from mhc_torch.nn.skip import MHCSkip
from mhc_torch.options import resolve
from mhc_torch.streams import StreamConfig, expand, reduce

Connection = Literal["residual", "history", "streams"]


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch rotary positions to longer texts (`rope_type` "llama3" of transformers).

    Args:
        factor: by which slow frequencies are divided.
        low_frequency, high_frequency: turns in `length` positions below which a frequency is slow, and from which on it
            is fast, and left as it is; between them it is interpolated.
        length: longest text before the stretching.
    """

    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    length: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder, as a hashable value.

    Args:
        vocabulary: number of tokens V.
        features: width C.
        mlp_features: width of the SwiGLU network inside a layer.
        depth: number of layers L.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, a divisor of num_heads; None is num_heads.
        head_dim: width of a head, even; None is features / num_heads.
        qk_norm: whether queries and keys get an RMSNorm a head, as in Qwen3.
        tied: whether the output layer is the embedding.
        rope_theta: base of the rotary frequencies.
        rope_scaling: of Llama 3.1 and later.
        norm_epsilon: added to the mean square in every RMSNorm.

    Raises:
        ValueError: a size is below 1, or one does not divide another as it must.
    """

    vocabulary: int
    features: int
    mlp_features: int
    depth: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    tied: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocabulary", "features", "mlp_features", "depth", "num_heads", "num_kv_heads", "head_dim"):
            size = getattr(self, name)
            optional = name in ("num_kv_heads", "head_dim")
            if not (optional and size is None) and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        if self.head_dim is None and self.features % self.num_heads:
            raise ValueError(
                f"features must be a multiple of num_heads={self.num_heads}, or head_dim given; got {self.features}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads, got {self.kv_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim must be even, for rotary positions, got {self.head_width}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.features // self.num_heads if self.head_dim is None else self.head_dim

    @classmethod
    def from_transformers(cls, config: Any) -> "DecoderConfig":
        """The sizes of a Llama or Qwen3 of transformers.

        Args:
            config: a `LlamaConfig` or `Qwen3Config`, or what their `config.json` holds.

        Raises:
            ValueError: it is of another model, or asks for something that this decoder does not do.
        """
        given = dict(config) if isinstance(config, Mapping) else config.to_dict()
        if given.get("model_type") not in ("llama", "qwen3"):
            raise ValueError(f"config: model_type must be 'llama' or 'qwen3', got {given.get('model_type')!r}")
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
        for name, value in plain.items():
            if given.get(name, value) != value:
                raise ValueError(f"config: {name} must be {value!r}, got {given[name]!r}")
        # One dictionary since transformers 5; before, the base apart from the scaling, which plain models leave out.
        rope = given.get("rope_parameters") or {
            "rope_theta": given.get("rope_theta"),
            **(given.get("rope_scaling") or {}),
        }
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "llama3"):
            raise ValueError(f"config: rope_type must be 'default' or 'llama3', got {kind!r}")
        scaling = None
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = RopeScaling(*(rope[name] for name in names))
        return cls(
            vocabulary=given["vocab_size"],
            features=given["hidden_size"],
            mlp_features=given["intermediate_size"],
            depth=given["num_hidden_layers"],
            num_heads=given["num_attention_heads"],
            num_kv_heads=given.get("num_key_value_heads"),
            head_dim=given.get("head_dim"),
            qk_norm=given["model_type"] == "qwen3",
            tied=given.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta") or 10_000.0,
            rope_scaling=scaling,
            norm_epsilon=given["rms_norm_eps"],
        )


@dataclass
class KVCache:
    """Keys and values of the tokens so far, (B, K, S, D) for every layer; a call of `Decoder` appends to it."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of positions S that it holds."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, these last."""
        if layer in self.layers:
            old = self.layers[layer]
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        self.layers[layer] = k, v
        return k, v


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

    def forward(self, x: Float[Tensor, "B T C"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        past = 0 if cache is None or self.index not in cache.layers else cache.layers[self.index][0].shape[2]
        cos, sin = rotary(self.config, torch.arange(past, past + x.shape[1], device=x.device), q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
        seen = _seen(x.shape[1], past, x.device) if past and x.shape[1] > 1 else None
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

    With a residual connection around it, `x + f(x)`, it is the layer of Llama. `skip` mixes the history into it.
    """

    def __init__(self, config: DecoderConfig, index: int, skip: MHCSkip | None = None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.features, eps=config.norm_epsilon)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.features, eps=config.norm_epsilon)
        self.mlp = MLP(config)
        if skip is not None:
            self.skip = skip

    def attend(self, x: Float[Tensor, "B T C"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        """The first branch, attention after its norm."""
        return self.self_attn(self.input_layernorm(x), cache)

    def transform(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """The second branch, SwiGLU after its norm."""
        return self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Float[Tensor, "B T C"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        attended = self.attend(x, cache)
        return attended + self.transform(x + attended)


class StreamDecoderLayer(DecoderLayer):
    """The same two branches, each connected to n streams."""

    def __init__(self, config: DecoderConfig, index: int, streams: StreamConfig) -> None:
        super().__init__(config, index)
        self.attn_hc = ConnectionMaps(config.features, streams, 2 * index)
        self.ffn_hc = ConnectionMaps(config.features, streams, 2 * index + 1)

    def forward(self, streams: Float[Tensor, "B T n C"], cache: KVCache | None = None) -> Float[Tensor, "B T n C"]:
        return self.ffn_hc.around(self.transform, self.attn_hc.around(self.attend, streams, cache))

    def mixed_states(self, streams: Tensor, *_: Any) -> list[Tensor]:
        """The states that a call mixes."""
        return [streams]


class DecoderStack(nn.ModuleList):
    """The layers, connected."""

    def __init__(self, config: DecoderConfig, connection: MHCConfig | StreamConfig | None, checkpointing: bool) -> None:
        self.connection, self.checkpointing = connection, checkpointing
        indices = range(config.depth)
        if isinstance(connection, StreamConfig):
            super().__init__(StreamDecoderLayer(config, index, connection) for index in indices)
        elif connection is not None:
            super().__init__(DecoderLayer(config, index, MHCSkip(config=connection)) for index in indices)
        else:
            super().__init__(DecoderLayer(config, index) for index in indices)

    def forward(self, x: Float[Tensor, "B T C"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        if isinstance(self.connection, MHCConfig):
            return self._with_history(x, self.connection, cache)
        streams = isinstance(self.connection, StreamConfig)
        x = expand(x, self.connection.streams) if isinstance(self.connection, StreamConfig) else x
        for layer in self:
            y = self._run(layer, x, cache)
            x = y if streams else x + y
        return reduce(x) if streams else x

    def _with_history(self, x: Tensor, config: MHCConfig, cache: KVCache | None) -> Tensor:
        layers: Any = self
        kept = config.max_history, config.detach_history
        states = appended([], x, *kept)
        tape = tape_of([layer.skip for layer in layers], x, len(states), config.detach_history)
        for layer in layers:
            x = layer.skip(self._run(layer, x, cache), states, tape)
            states = appended(states, x, *kept)
        return x

    def _run(self, layer: nn.Module, x: Tensor, cache: KVCache | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, cache, use_reentrant=False)
        return layer(x, cache)


class DecoderModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: DecoderConfig, connection: MHCConfig | StreamConfig | None, checkpointing: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.features)
        nn.init.normal_(self.embed_tokens.weight, std=config.features**-0.5)
        self.layers = DecoderStack(config, connection, checkpointing)
        self.norm = nn.RMSNorm(config.features, eps=config.norm_epsilon)

    def forward(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        return self.norm(self.layers(self.embed_tokens(tokens), cache))


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
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config, as_connection(connection, options), use_checkpointing)
        self.lm_head = _linear(config.features, config.vocabulary)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T V"]:
        """Tokens to the logits of the token after each, in float32 at least; with a cache, they follow those in it."""
        logits = self.lm_head(self.hidden(tokens, cache))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def hidden(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        """What the output layer reads.

        Raises:
            ValueError: tokens are not integers of shape (B, T).
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be integers of shape (B, T), got {tokens.dtype}{list(tokens.shape)}")
        return self.model(tokens, cache)

    def loss(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"] | None = None, *, chunk: int = 512
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats; the logits of `chunk` positions of each sequence live at a time.

        Args:
            tokens: what the model reads.
            targets: the token after each, negative where none counts; None for `tokens` one position further on, and
                then the last token is a target only.
            chunk: as of `cross_entropy`.
        """
        if targets is None:
            tokens, targets = tokens[:, :-1], tokens[:, 1:]
        return cross_entropy(self.hidden(tokens), self.lm_head.weight, targets, chunk=chunk)

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "B T"],
        steps: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B T+steps"]:
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
            latest = _sample(logits, temperature, top_k, generator)
            tokens = torch.cat([tokens, latest], 1)
        return tokens


def check_sampling(steps: int, temperature: float, top_k: int | None, vocabulary: int) -> None:
    """A ValueError if one of these is out of its range."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be in 1..{vocabulary}, got {top_k}")


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)


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
    return resolve(config, None, **options)


def rotary(
    config: DecoderConfig, positions: Int[Tensor, " T"], dtype: torch.dtype
) -> tuple[Float[Tensor, "T D/2"], Float[Tensor, "T D/2"]]:
    """Cosine and sine of the rotary angles, in float32 at least; Su et al. 2021, arXiv 2104.09864."""
    wide = torch.promote_types(dtype, torch.float32)
    halves = torch.arange(0, config.head_width, 2, dtype=torch.float64, device=positions.device)
    frequencies = config.rope_theta ** -(halves / config.head_width)
    if scaling := config.rope_scaling:
        turns = scaling.length * frequencies / (2 * math.pi)
        fast = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        fast = fast.clamp(0, 1)
        frequencies = frequencies * (fast + (1 - fast) / scaling.factor)
    angles = positions[:, None].to(wide) * frequencies.to(wide)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B N T D"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B N T D"]:
    """Each feature of the first half of a head and its partner in the second, turned by the angle of the position."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _seen(length: int, past: int, device: torch.device) -> Bool[Tensor, "T S"]:
    """Which of past + length keys each of `length` new queries sees."""
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Without bias; drawn as by `nnx.Linear`, from a normal distribution of variance 1 / inputs, cut at two sigma."""
    linear = nn.Linear(inputs, outputs, bias=False)
    sigma = inputs**-0.5 / 0.87962566103423978  # of what is cut, so that what is left has that variance
    nn.init.trunc_normal_(linear.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    return linear
