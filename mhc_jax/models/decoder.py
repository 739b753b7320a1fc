"""A decoder-only language model of the Llama and Qwen3 family, with a choice of how its layers are connected."""

from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float, Int, Key

from mhc_jax.history import History, MHCConfig, mix
from mhc_jax.meshes import explicit_sharding
from mhc_jax.models import attention as kernels
from mhc_jax.models.attention import named
from mhc_jax.models.cache import KVCache, LayerCache
from mhc_jax.models.config import DecoderConfig
from mhc_jax.models.loss import cross_entropy
from mhc_jax.models.rotary import rotary, rotate
from mhc_jax.models.sampling import check_sampling, generate
from mhc_jax.nn.hyper_connections import ConnectionMaps, StreamStack
from mhc_jax.nn.stack import MHCStack
from mhc_jax.options import resolve
from mhc_jax.placement import PARAMETERS, at_hand, split
from mhc_jax.streams import Connected, Implementation, StreamConfig, expand, reduce

Connection = Literal["residual", "history", "streams"]

States = Float[Array, "B T *n C"]
"""What layers pass on: one state, or several side by side."""

REMAT_NAMES = ("query", "key", "value", "attention", "attention_out", "gate", "up", "mlp_out")
"""What of a layer `Decoder(remat=...)` can keep, in the order in which it is computed."""


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped queries; arguments as `Decoder`."""

    def __init__(
        self, config: DecoderConfig, *, attention: kernels.Attention, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.config, self.implementation = config, attention
        kind = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        queries, others = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = nnx.Linear(config.features, queries, promote_dtype=_placed("q_proj"), **kind)
        self.k_proj = nnx.Linear(config.features, others, promote_dtype=_placed("k_proj"), **kind)
        self.v_proj = nnx.Linear(config.features, others, promote_dtype=_placed("v_proj"), **kind)
        self.o_proj = nnx.Linear(queries, config.features, promote_dtype=_placed("o_proj"), **kind)
        if config.qk_norm:
            self.q_norm = _norm(config, config.head_width, dtype, param_dtype, rngs)
            self.k_norm = _norm(config, config.head_width, dtype, param_dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        cache: LayerCache | None = None,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T C"]:
        projected = (_heads(project(x), self.config) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (split(heads, "batch", "context", "heads") for heads in projected)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if positions is None:
            positions = (0 if cache is None else cache.length) + jnp.arange(x.shape[1])[None]
        cos, sin = rotary(self.config, positions, q.dtype)
        q, k, v = named(rotate(q, cos, sin), "query"), named(rotate(k, cos, sin), "key"), named(v, "value")
        k, v, seen = (k, v, None) if cache is None else cache.append(k, v)
        mixed = kernels.attend(q, k, v, seen, segments=segments, implementation=self.implementation)
        return named(self.o_proj(mixed.reshape(*x.shape[:-1], -1)), "attention_out")


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        kind = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        inner, outer = config.mlp_features, config.features
        self.gate_proj = nnx.Linear(outer, inner, promote_dtype=_placed("gate_proj"), **kind)
        self.up_proj = nnx.Linear(outer, inner, promote_dtype=_placed("up_proj"), **kind)
        self.down_proj = nnx.Linear(inner, outer, promote_dtype=_placed("down_proj"), **kind)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        gate, up = (split(project(x), "batch", "context", "mlp") for project in (self.gate_proj, self.up_proj))
        gate, up = named(gate, "gate"), named(up, "up")
        return named(self.down_proj(nnx.silu(gate) * up), "mlp_out")


class DecoderLayer(nnx.Module):
    """What one layer adds to its input: a = attention(x);  f(x) = a + mlp(x + a).

    With a residual connection around it, `x + f(x)`, it is the layer of Llama. Arguments as `Decoder`; `context` of the
    call are the further arguments of `Attention`. Retrofitted, it adds to several states (..., n, C) at once.
    """

    def __init__(
        self, config: DecoderConfig, *, attention: kernels.Attention, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.input_layernorm = _norm(config, config.features, dtype, param_dtype, rngs)
        self.self_attn = Attention(config, attention=attention, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = _norm(config, config.features, dtype, param_dtype, rngs)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def attend(self, x: States, *context: Any) -> States:
        """The first branch, attention after its norm."""
        return _state(self.self_attn(_inside(self.input_layernorm(_state(x))), *context))

    def transform(self, x: States) -> States:
        """The second branch, SwiGLU after its norm."""
        return _state(self.mlp(_inside(self.post_attention_layernorm(_state(x)))))

    def __call__(self, x: States, *context: Any) -> States:
        attended = self.attend(x, *context)
        return attended + self.transform(x + attended)


class StreamDecoderLayer(DecoderLayer):
    """The same two branches, each connected to n streams; `index` is the number of the layer, from 0."""

    def __init__(
        self,
        config: DecoderConfig,
        streams: StreamConfig,
        index: int | Array,
        *,
        implementation: Implementation,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        kind: dict[str, Any] = {"config": streams, "implementation": implementation}
        attention, mlp = ("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")
        self.attn_hc = ConnectionMaps(config.features, layer_index=2 * index, branch_names=attention, **kind)
        self.ffn_hc = ConnectionMaps(config.features, layer_index=2 * index + 1, branch_names=mlp, **kind)

    def __call__(self, streams: Float[Array, "B T n C"], *context: Any) -> Float[Array, "B T n C"]:
        return self.ffn_hc.around(self.transform, self.attn_hc.around(self.attend, streams, *context))

    def connected(self, *context: Any) -> list[Connected]:
        """The branches that a call is a chain of."""
        return [self.attn_hc.connecting(self.attend, *context), self.ffn_hc.connecting(self.transform)]


class Decoder(nnx.Module):
    """A decoder-only language model: embedding, a scanned stack of layers, RMSNorm, output layer.

    Variables are called as in Llama and Qwen3, whatever the connection, so that `bridge.convert` moves public
    checkpoints, and a trained residual decoder can go on as one of streams.

    Args:
        config: the sizes.
        connection: "residual" adds the latest state to every layer, "history" mixes the last ones into it, "streams"
            carries n residual streams around both of its branches; or the `MHCConfig` or `StreamConfig` itself.
        options: keywords, the fields of `MHCConfig` or of `StreamConfig`, change single options of the connection.
        block_length: of how many layers the streams are kept once for the backward pass; see `streams.scan_layers`.
        implementation: "pallas" for the kernels of streams, as of `HyperConnections`.
        attention: "plain", "splash" or "cudnn", see `mhc_jax.models.attention.attend`; None is the kernel of JAX's
            default device, where it has one.
        remat: names of what a layer keeps for the backward pass beside its input, out of `REMAT_NAMES`; all else is
            computed again, () keeps nothing. None keeps all that derivatives need.
        dtype: of the computation; None is that of the parameters. Logits and loss are float32 at least.
        state_dtype: of what layers pass on to each other; None is that of the computation. float32 states around
            bfloat16 layers cost memory, and add up exactly.
        param_dtype: of the parameters; those of the connection are always float32.
        rngs: for the parameters, and for the noise of `stochastic`.

    Attributes:
        connection: the `MHCConfig` or `StreamConfig`.
        embed_tokens: `nnx.Embed`, (V, C).
        stack: an `MHCStack` of `DecoderLayer`, or a `StreamStack` of `StreamDecoderLayer`: its variables, as
            `stack.layers.self_attn.q_proj.kernel`, have a leading axis of depth.
        norm: the last `nnx.RMSNorm`.
        lm_head: `nnx.Linear`, (C, V), unless `config.tied`.

    Raises:
        ValueError: an option is out of range, or of use to another connection.
        TypeError: a keyword is no option of the connection.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from mhc_jax.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(100, features=16, mlp_features=32, depth=3, num_heads=2)
        >>> model = Decoder(config, "streams", streams=2, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape, model.stack.layers.self_attn.q_proj.kernel.shape
        ((1, 3, 100), (3, 16, 16))
    """

    def __init__(
        self,
        config: DecoderConfig,
        connection: Connection | MHCConfig | StreamConfig = "residual",
        *,
        block_length: int = 1,
        implementation: Implementation = None,
        attention: kernels.Attention = None,
        remat: tuple[str, ...] | None = None,
        dtype: Any = None,
        state_dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        if not isinstance(config, DecoderConfig):
            raise TypeError(f"config must be of type DecoderConfig, got {config!r}")
        self.config = config
        self.state_dtype = state_dtype
        kind = {"attention": attention, "dtype": dtype, "param_dtype": param_dtype}
        self.embed_tokens = nnx.Embed(
            config.vocabulary, config.features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        connected = as_connection(connection, options)
        policy = _policy(None if remat is None else tuple(remat))
        self.connection = connected
        self.stack: MHCStack | StreamStack
        if isinstance(connected, StreamConfig):
            self.stack = StreamStack(
                lambda rngs, index: StreamDecoderLayer(
                    config, connected, index, implementation=implementation, rngs=rngs, **kind
                ),
                config.depth,
                connected.streams,
                block_length=block_length,
                policy=policy,
                rngs=rngs,
            )
        else:
            for name, value, default in (("block_length", block_length, 1), ("implementation", implementation, None)):
                if value != default:
                    raise ValueError(f"{name} is of use to connection='streams' alone, got {value!r}")
            self.stack = MHCStack(
                lambda rngs: DecoderLayer(config, rngs=rngs, **kind),
                config.depth,
                config=connected,
                policy=policy,
                rngs=rngs,
            )
        self.norm = _norm(config, config.features, dtype, param_dtype, rngs)
        if not config.tied:
            self.lm_head = nnx.Linear(
                config.features, config.vocabulary, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: KVCache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Any:
        """Tokens to the logits of the token after each, (B, T, V), in float32 at least.

        With a `cache` the tokens follow those that are in it, and the result is (logits, cache with these added); if
        they do not fit into it, logits are NaN.

        Args:
            positions: of the tokens; by default they are counted on from the cache, or from 0.
            segments: where several texts lie in one row, which of them each token is of: it sees no other.
        """
        hidden = self.hidden(tokens, cache, positions=positions, segments=segments)
        return self.logits(hidden) if cache is None else (self.logits(hidden[0]), hidden[1])

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        cache: KVCache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Any:
        """What the output layer reads, (B, T, C); arguments and result otherwise as of the call.

        Raises:
            ValueError: tokens are not integers of shape (B, T), positions or segments are others; the cache is for
                another batch, or given with segments.
        """
        _check_tokens(tokens)
        for name, given in (("positions", positions), ("segments", segments)):
            if given is not None and (given.shape != tokens.shape or not jnp.issubdtype(given.dtype, jnp.integer)):
                shape = f"{given.dtype}{list(given.shape)}"
                raise ValueError(f"{name} must be integers of tokens' shape {list(tokens.shape)}, got {shape}")
        x = split(self.embed_tokens(tokens, out_sharding=explicit_sharding(tokens, None)), "batch", None, "looked_up")
        x = _state(_inside(x.astype(self.state_dtype or x.dtype)))
        if cache is None:
            context = () if positions is None and segments is None else (None, positions, segments)
            return self.norm(self.stack(x, *context))
        if segments is not None:
            raise ValueError("segments: a cache holds one text a row; call without a cache")
        if cache.keys.shape[1] != len(tokens):
            raise ValueError(f"cache is for a batch of {cache.keys.shape[1]}, tokens has one of {len(tokens)}")
        x = jnp.where(cache.length + tokens.shape[1] <= cache.keys.shape[2], x, jnp.nan)
        x, cache = self._with_cache(x, cache, positions)
        return self.norm(x), cache

    def _with_cache(self, x: Array, cache: KVCache, positions: Array | None) -> tuple[Array, KVCache]:
        """The stack, layer by layer in a scan without derivatives of its own, which keys and values go along with."""
        stack: Any = self.stack
        graphdef, params = nnx.split(stack.layers)
        streams = isinstance(stack, StreamStack)
        state: Any = expand(x, stack.streams) if streams else History.create(x, stack.config.max_history)
        weights = jnp.zeros((self.config.depth, 0)) if streams else stack.mixing_weights(gated=True)

        def step(carry: tuple[Any, Array, Array, Array], layer: tuple[Any, Array, Array]) -> tuple[Any, None]:
            state, x, keys, values = carry
            params, weights, index = layer
            here = LayerCache(keys, values, cache.length, index)
            y = nnx.merge(graphdef, params)(x, here, positions)
            x = y if streams else mix(y.astype(x.dtype), state.window, weights)
            return (y if streams else state.push(x), x, here.keys, here.values), None

        start = (state, state if streams else x, cache.keys, cache.values)
        (_, x, keys, values), _ = jax.lax.scan(step, start, (params, weights, jnp.arange(self.config.depth)))
        return reduce(x) if streams else x, KVCache(keys, values, cache.length + len(x[0]))

    def logits(self, hidden: Float[Array, "B T C"]) -> Float[Array, "B T V"]:
        """The output layer, in float32 at least."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        return jnp.matmul(hidden, self.output_kernel.astype(hidden.dtype), preferred_element_type=wide)

    def init_cache(self, batch: int, size: int) -> KVCache:
        """An empty cache for `size` positions of each of `batch` sequences, in the dtype of the computation."""
        dtype = self.embed_tokens.dtype or self.embed_tokens.embedding.dtype
        return KVCache.create(self.config.depth, batch, size, self.config.kv_heads, self.config.head_width, dtype)

    def generate(
        self,
        tokens: Int[Array, "B T"],
        steps: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Int[Array, "B T+{steps}"]:
        """`tokens`, and `steps` more that the model continues them with.

        Args:
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only.
            key: for the draws.

        Raises:
            ValueError: steps is below 1, temperature below 0, or top_k not in 1..V; a key is missing; tokens are not
                integers of shape (B, T).
        """
        check_sampling(steps, temperature, top_k, key, self.config.vocabulary)
        _check_tokens(tokens)
        graphdef, state = nnx.split(self)
        greedy = temperature == 0
        return generate(graphdef, state, tokens, key, temperature, steps=steps, top_k=top_k, greedy=greedy)

    def loss(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"] | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        chunk: int = 512,
    ) -> Float[Array, ""]:
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
                targets = jnp.where(segments[:, 1:] == segments[:, :-1], targets, -1)
                segments = segments[:, :-1]
        hidden = self.hidden(tokens, positions=positions, segments=segments)
        return cross_entropy(_inside(hidden), self.output_kernel, targets, chunk=chunk)

    @property
    def output_kernel(self) -> Float[Array, "C V"]:
        """The kernel of the output layer, which may be the embedding."""
        return self.embed_tokens.embedding[...].T if self.config.tied else self.lm_head.kernel[...]


def _check_tokens(tokens: Array) -> None:
    if jnp.ndim(tokens) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers of shape (B, T), got {tokens.dtype}{list(jnp.shape(tokens))}")


def as_connection(connection: Any, options: dict[str, Any]) -> MHCConfig | StreamConfig:
    """The config of a connection that is given by its name or config; keywords change single options.

    Raises:
        ValueError: the name is of none, a residual connection is given options, or an option is out of range.
        TypeError: a keyword is not an option of the connection.
    """
    if connection == "residual":
        if options:
            raise ValueError(f"connection: 'residual' has no options, got {sorted(options)}")
        return MHCConfig(mode="residual", max_history=1)
    named = {"history": MHCConfig(), "streams": StreamConfig()}
    config = named.get(connection, connection) if isinstance(connection, str) else connection
    if not isinstance(config, (MHCConfig, StreamConfig)):
        raise ValueError(f"connection must be one of {('residual', *named)} or a config of one, got {connection!r}")
    config = resolve(config, None, **options)
    if isinstance(config, MHCConfig) and config.auto_project:
        raise ValueError("auto_project: the layers of a decoder have one width")
    return config


def _state(x: States) -> States:
    """What passes between branches, where a mesh wants it."""
    return split(x, "batch", "sequence")


def _inside(x: States) -> States:
    """The same as a branch reads it, all of whose devices have the tokens that they compute a part of."""
    return split(x, "batch", "context")


def _heads(x: Array, config: DecoderConfig) -> Array:
    return x.reshape(*x.shape[:-1], -1, config.head_width)


@cache  # the same function, so that modules are equal
def _placed(name: str) -> Any:
    """What brings the arrays of a layer of this name to one dtype, and its kernel to where it is used."""

    def promoted(arrays: tuple[Any, ...], *, dtype: Any = None) -> tuple[Any, ...]:
        x, kernel, bias = promote_dtype(arrays, dtype=dtype)
        return x, at_hand(kernel, *PARAMETERS[f"{name}/kernel"]), bias

    return promoted


def _norm(config: DecoderConfig, features: int, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(features, epsilon=config.norm_epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


@cache  # policies are equal only if they are the same, and so is what JAX has compiled for them
def _policy(remat: tuple[str, ...] | None) -> Any:
    if remat is None:
        return None
    if unknown := sorted(set(remat) - set(REMAT_NAMES)):
        raise ValueError(f"remat must name some of {REMAT_NAMES}, got {unknown}")
    return jax.checkpoint_policies.save_only_these_names(*remat)
