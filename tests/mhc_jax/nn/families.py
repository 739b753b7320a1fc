"""Models as people have them in NNX, for test_retrofit.py: their names, and how they hold and call their layers."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.models import Decoder, DecoderConfig

WIDTH, TOKENS = 16, 30


def attend(query, key, value, *, mask=None, **_):
    """In the dtype of its inputs, where `jax.nn.dot_product_attention` has weights in float32."""
    key, value = (jnp.broadcast_to(x, (*x.shape[:2], *query.shape[2:])) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class RMSNorm(nnx.Module):
    def __init__(self, dim, *, param_dtype, rngs):
        self.w = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.w[...]


class Attention(nnx.Module):
    """Puts out its cache first, then the state, as Tunix has it."""

    def __init__(self, *, param_dtype, rngs):
        kind = {"use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
        self.q_proj = nnx.LinearGeneral(WIDTH, (2, 8), **kind)
        self.k_proj = nnx.LinearGeneral(WIDTH, (1, 8), **kind)
        self.v_proj = nnx.LinearGeneral(WIDTH, (1, 8), **kind)
        self.o_proj = nnx.LinearGeneral((2, 8), WIDTH, axis=(-2, -1), **kind)

    def __call__(self, x, segment_pos, cache, attn_mask):
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if cache is not None:
            start = (0, cache["end_index"], 0, 0)
            key = jax.lax.dynamic_update_slice(cache["k"], key, start)
            value = jax.lax.dynamic_update_slice(cache["v"], value, start)
            cache = {"k": key, "v": value, "end_index": cache["end_index"] + x.shape[1]}
        mixed = attend(query, key, value, mask=attn_mask[:, None])
        return cache, self.o_proj(mixed)


class MLP(nnx.Module):
    def __init__(self, *, param_dtype, rngs):
        kind = {"use_bias": False, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj, self.up_proj = nnx.Linear(WIDTH, 24, **kind), nnx.Linear(WIDTH, 24, **kind)
        self.down_proj = nnx.Linear(24, WIDTH, **kind)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    def __init__(self, *, param_dtype, rngs, remat=False):
        self.input_layernorm = RMSNorm(WIDTH, param_dtype=param_dtype, rngs=rngs)
        self.attn = Attention(param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(WIDTH, param_dtype=param_dtype, rngs=rngs)
        self.mlp = MLP(param_dtype=param_dtype, rngs=rngs)
        self.remat = remat

    def block(self, x, segment_pos, cache, attn_mask):
        cache, attended = self.attn(self.input_layernorm(x), segment_pos, cache, attn_mask)
        attended += x
        return cache, attended + self.mlp(self.post_attention_layernorm(attended))

    def __call__(self, x, segment_pos, cache, attn_mask):
        if not self.remat:
            return self.block(x, segment_pos, cache, attn_mask)
        graph, state = nnx.split(self)
        return jax.checkpoint(lambda state, *args: nnx.merge(graph, state).block(*args))(
            state, x, segment_pos, cache, attn_mask
        )


class Embedder(nnx.Module):
    def __init__(self, *, param_dtype, rngs):
        self.input_embedding = nnx.Param(rngs.normal((TOKENS, WIDTH), param_dtype))

    def encode(self, tokens):
        return self.input_embedding[tokens]

    def decode(self, x):
        return x @ self.input_embedding[...].T


class Qwen3(nnx.Module):
    """A list of layers, a cache that is passed along."""

    def __init__(self, depth=2, *, param_dtype=jnp.float32, remat=False, rngs):
        self.embedder = Embedder(param_dtype=param_dtype, rngs=rngs)
        self.layers = nnx.List(DecoderLayer(param_dtype=param_dtype, remat=remat, rngs=rngs) for _ in range(depth))
        self.final_norm = RMSNorm(WIDTH, param_dtype=param_dtype, rngs=rngs)

    def init_cache(self, batch, size):
        empty = jnp.zeros((batch, size, 1, 8), self.embedder.input_embedding.dtype)
        return [{"k": empty, "v": empty, "end_index": 0} for _ in self.layers]

    def __call__(self, tokens, cache=None):
        before = 0 if cache is None else cache[0]["end_index"]
        positions = jnp.broadcast_to(before + jnp.arange(tokens.shape[1]), tokens.shape)
        seen = jnp.arange(tokens.shape[1] if cache is None else cache[0]["k"].shape[1])
        mask = seen <= positions[..., None]
        x, new = self.embedder.encode(tokens), []
        for i, layer in enumerate(self.layers):
            layer_cache, x = layer(x, positions, None if cache is None else cache[i], mask)
            new.append(layer_cache)
        logits = self.embedder.decode(self.final_norm(x))
        return logits if cache is None else (logits, new)


class Encoder1DBlock(nnx.Module):
    """A block of ViT; its layers are scanned."""

    def __init__(self, *, param_dtype=jnp.float32, rngs):
        kind = {"param_dtype": param_dtype, "rngs": rngs}
        self.layer_norm1, self.layer_norm2 = nnx.LayerNorm(WIDTH, **kind), nnx.LayerNorm(WIDTH, **kind)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, attention_fn=attend, **kind)
        self.mlp = nnx.Sequential(nnx.Linear(WIDTH, 24, **kind), nnx.gelu, nnx.Linear(24, WIDTH, **kind))
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.layer_norm1(x))
        return x + self.dropout(self.mlp(self.layer_norm2(x)))


BRANCHES = {"attention": ("layer_norm1", "attention"), "mlp": ("layer_norm2", "dropout")}


class ViT(nnx.Module):
    def __init__(self, depth=2, *, param_dtype=jnp.float32, rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap
        def layers(rngs):
            return Encoder1DBlock(param_dtype=param_dtype, rngs=rngs)

        self.patches = nnx.Linear(5, WIDTH, param_dtype=param_dtype, rngs=rngs)
        self.layers = layers(rngs)
        self.norm = nnx.LayerNorm(WIDTH, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, images):
        @partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return layer(x)

        return self.norm(run(self.patches(images), self.layers))


class BertLayer(nnx.Module):
    """Norms after the sums, branches that begin with a linear layer, and a mask before the state."""

    def __init__(self, *, param_dtype=jnp.float32, rngs):
        kind = {"param_dtype": param_dtype, "rngs": rngs}
        self.query, self.value = nnx.Linear(WIDTH, 8, **kind), nnx.Linear(8, WIDTH, **kind)
        self.intermediate, self.output = nnx.Linear(WIDTH, 24, **kind), nnx.Linear(24, WIDTH, **kind)
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, **kind), nnx.LayerNorm(WIDTH, **kind)

    def __call__(self, hidden_states, attention_mask=None, *, note=None):
        mixed = jnp.tanh(self.query(hidden_states)).mean(1, keepdims=True)
        hidden_states = self.norm1(hidden_states + self.value(mixed + attention_mask))
        return {
            "note": note,
            "state": self.norm2(hidden_states + self.output(nnx.gelu(self.intermediate(hidden_states)))),
        }


POST_NORM = {"attention": ("query", "value"), "mlp": ("intermediate", "output")}


class Bert(nnx.Module):
    def __init__(self, depth=2, *, param_dtype=jnp.float32, rngs):
        self.embed = nnx.Embed(TOKENS, WIDTH, param_dtype=param_dtype, rngs=rngs)
        self.encoder = nnx.List(BertLayer(param_dtype=param_dtype, rngs=rngs) for _ in range(depth))

    def __call__(self, tokens):
        x, mask = self.embed(tokens), jnp.zeros((*tokens.shape[:1], tokens.shape[1], 8))
        for layer in self.encoder:
            # The state by name, and not first.
            x = layer(attention_mask=mask, hidden_states=x)["state"]
        return x


def decoder(*, param_dtype=jnp.float32, rngs):
    sizes = {"features": WIDTH, "mlp_features": 24, "depth": 2, "num_heads": 2, "num_kv_heads": 1}
    return Decoder(DecoderConfig(TOKENS, **sizes), param_dtype=param_dtype, rngs=rngs)


# By name: the model, what `retrofit` has to be told of it, and its blocks in turn.
FAMILIES = {
    "qwen3": (Qwen3, {}),
    "vit": (ViT, {"ends": ("patches", "norm")}),
    "bert": (Bert, {}),
    "decoder": (decoder, {}),
}


def learned(name, dtype=jnp.float32):
    """A model whose parameters, norms and biases too, are anything."""
    model = FAMILIES[name][0](param_dtype=dtype, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.3 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, drawn))
    model.eval()
    return model


def inputs(name, dtype=jnp.float32):
    key = jax.random.key(2)
    return jax.random.normal(key, (2, 4, 5), dtype) if name == "vit" else jax.random.randint(key, (2, 5), 1, TOKENS)
