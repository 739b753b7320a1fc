"""A Qwen3 in NNX under the names of the one in transformers, as a user would write it, and the tiny pair of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import bridge


class Norm(nnx.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        self.weight = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.epsilon)
        return self.weight[...] * wide.astype(x.dtype)


class Attention(nnx.Module):
    def __init__(self, c, rngs: nnx.Rngs) -> None:
        sizes = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        for name, heads in sizes.items():
            linear = nnx.Linear(c.hidden_size, heads * c.head_dim, use_bias=False, rngs=rngs)
            setattr(self, f"{name}_proj", linear)
        self.o_proj = nnx.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, use_bias=False, rngs=rngs)
        self.q_norm, self.k_norm = (Norm(c.head_dim, c.rms_norm_eps) for _ in range(2))
        self.size, self.groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
        self.theta = c.rope_parameters["rope_theta"]

    def __call__(self, x):
        def heads(y):
            return y.reshape(*x.shape[:2], -1, self.size)

        q, k = self.q_norm(heads(self.q_proj(x))), self.k_norm(heads(self.k_proj(x)))
        frequencies = 1 / self.theta ** (jnp.arange(0, self.size, 2, dtype=jnp.float32) / self.size)
        angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
        angle = jnp.concatenate([angle, angle], -1)

        def turned(y):
            a, b = jnp.split(y, 2, axis=-1)
            other = jnp.concatenate([-b, a], -1)
            return y * jnp.cos(angle).astype(y.dtype) + other * jnp.sin(angle).astype(y.dtype)

        q, k = turned(q), jnp.repeat(turned(k), self.groups, 2)
        v = jnp.repeat(heads(self.v_proj(x)), self.groups, 2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * self.size**-0.5
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
        return self.o_proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1))


class Mlp(nnx.Module):
    def __init__(self, c, rngs: nnx.Rngs) -> None:
        self.gate_proj = nnx.Linear(c.hidden_size, c.intermediate_size, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(c.hidden_size, c.intermediate_size, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(c.intermediate_size, c.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, c, rngs: nnx.Rngs) -> None:
        self.self_attn, self.mlp = Attention(c, rngs), Mlp(c, rngs)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)

    def __call__(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nnx.Module):
    def __init__(self, c, rngs: nnx.Rngs) -> None:
        self.embed_tokens = nnx.Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.layers = nnx.List([Layer(c, rngs) for _ in range(c.num_hidden_layers)])
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def __call__(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Qwen3(nnx.Module):
    def __init__(self, c, rngs: nnx.Rngs) -> None:
        self.model = Body(c, rngs)
        self.lm_head = nnx.Linear(c.hidden_size, c.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        return {"logits": self.lm_head(self.model(tokens))}


def pair(seed: int = 0) -> tuple[nnx.Module, torch.nn.Module, np.ndarray]:
    """The two models with equal weights, and tokens."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        **{"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for leaf in theirs.parameters():
            leaf.add_(torch.randn(leaf.shape) * 0.3)
    tokens = np.random.default_rng(seed).integers(0, 17, (2, 6))
    return bridge.convert(theirs, Qwen3(config, nnx.Rngs(0))), theirs, tokens
