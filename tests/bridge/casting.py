"""Pairs of models that fix the precision of their own steps, as public ones do, with every fault that can be planted.

A pair is made with one difference between its sides, or none: each option has a value on the JAX side and one on the
torch side. Softmax, norms and rotary positions are computed in float32 whatever the model is.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

import bridge

WIDTH, HEADS, SIZE = 8, 2, 4


@dataclass(frozen=True)
class Options:
    """What the two sides of a pair must agree on."""

    gelu: str = "erf"
    epsilon: float = 1e-6
    head_epsilon: float = 1e-6
    offset: float = 0.0
    theta: float = 10_000.0
    interleaved: bool = False
    positions_from: int = 0
    rotary_sign: float = 1.0
    rotated: int = SIZE
    scale: float = SIZE**-0.5
    scale_twice: bool = False
    reach: int = 0
    window: int = 0
    masked: float = -1e9
    soft_cap: float = 0.0
    logit_cap: float = 0.0
    residual: float = 1.0
    embed_scale: float = 1.0
    half_softmax: bool = False
    half_norm: bool = False
    half_mlp: bool = False
    mean: bool = False
    value_norm: bool = False
    norm_last: bool = True
    gate_second: bool = False


class _Either:
    """The mathematics of both sides, written once over the few operations that differ."""

    def forward_tokens(self, tokens):
        x = self.embed(tokens) * self.options.embed_scale
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x) if self.options.norm_last else x)
        return _cap(self.xp, logits, self.options.logit_cap)


def _cap(xp, x, cap):
    return cap * xp.tanh(x / cap) if cap else x


def _rotary(xp, x, options, arange, stack):
    """x: (batch, heads, length, size), rotated in float32."""
    half = options.rotated // 2
    frequencies = options.theta ** (-arange(half) / half)
    angle = (arange(x.shape[2]) + options.positions_from)[:, None] * frequencies[None]
    cos, sin = xp.cos(angle), options.rotary_sign * xp.sin(angle)
    kept = x[..., options.rotated :]
    if options.interleaved:
        a, b = x[..., 0 : options.rotated : 2], x[..., 1 : options.rotated : 2]
        turned = stack([a * cos - b * sin, b * cos + a * sin]).reshape(*x.shape[:-1], options.rotated)
    else:
        a, b = x[..., :half], x[..., half : options.rotated]
        turned = xp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return xp.concatenate([turned, kept], -1)


class JaxNorm(nnx.Module):
    def __init__(self, width: int, epsilon: float, options: Options) -> None:
        self.weight = nnx.Param(jnp.ones(width))
        self.epsilon, self.options = epsilon, options

    def __call__(self, x):
        o, wide = self.options, x.astype(jnp.bfloat16 if self.options.half_norm else jnp.float32)
        wide = wide - wide.mean(-1, keepdims=True) if o.mean else wide
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        return ((o.offset + self.weight[...]) * wide).astype(x.dtype)


class TorchNorm(nn.Module):
    def __init__(self, width: int, epsilon: float, options: Options) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon, self.options = epsilon, options

    def forward(self, x):
        o, wide = self.options, x.to(torch.bfloat16 if self.options.half_norm else torch.float32)
        wide = wide - wide.mean(-1, keepdim=True) if o.mean else wide
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return ((o.offset + self.weight) * wide).to(x.dtype)


class JaxAttention(nnx.Module):
    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.q_norm, self.k_norm = (JaxNorm(SIZE, options.head_epsilon, options) for _ in range(2))
        self.options = options

    def __call__(self, x):
        o, length = self.options, x.shape[1]
        q, k, v = (
            jnp.moveaxis(part.reshape(*x.shape[:2], HEADS, SIZE), 1, 2) for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        q, k, v = self.q_norm(q), self.k_norm(k), self.k_norm(v) if o.value_norm else v
        arange = lambda n: jnp.arange(n, dtype=jnp.float32)  # noqa: E731
        stack = lambda parts: jnp.stack(parts, -1)  # noqa: E731
        q, k = (_rotary(jnp, y.astype(jnp.float32), o, arange, stack).astype(x.dtype) for y in (q, k))
        scores = _cap(jnp, q @ jnp.swapaxes(k, -1, -2) * (o.scale * (o.scale if o.scale_twice else 1)), o.soft_cap)
        back = jnp.arange(length)[:, None] - jnp.arange(length)[None]
        seen = (back >= -o.reach) & ((back < o.window) if o.window else True)
        scores = jnp.where(seen, scores, o.masked).astype(jnp.bfloat16 if o.half_softmax else jnp.float32)
        mixed = jax.nn.softmax(scores).astype(x.dtype) @ v
        return self.out(jnp.moveaxis(mixed, 2, 1).reshape(x.shape))


class TorchAttention(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.q_norm, self.k_norm = (TorchNorm(SIZE, options.head_epsilon, options) for _ in range(2))
        self.options = options

    def forward(self, x):
        o, length = self.options, x.shape[1]
        q, k, v = (part.view(*x.shape[:2], HEADS, SIZE).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k, v = self.q_norm(q), self.k_norm(k), self.k_norm(v) if o.value_norm else v
        arange = lambda n: torch.arange(n, dtype=torch.float32)  # noqa: E731
        stack = lambda parts: torch.stack(parts, -1)  # noqa: E731
        q, k = (_rotary(torch, y.float(), o, arange, stack).type_as(x) for y in (q, k))
        scores = _cap(torch, q @ k.transpose(-1, -2) * (o.scale * (o.scale if o.scale_twice else 1)), o.soft_cap)
        back = torch.arange(length)[:, None] - torch.arange(length)[None]
        seen = (back >= -o.reach) & ((back < o.window) if o.window else True)
        scores = scores.masked_fill(~seen, o.masked) if torch.is_tensor(seen) else scores
        mixed = torch.softmax(scores, -1, dtype=torch.bfloat16 if o.half_softmax else torch.float32).to(x.dtype) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class JaxLayer(nnx.Module):
    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (JaxNorm(WIDTH, options.epsilon, options) for _ in range(2))
        self.attention = JaxAttention(options, rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.options = options

    def __call__(self, x):
        o = self.options
        x = o.residual * x + self.attention(self.norm1(x))
        a, b = jnp.split(self.up(self.norm2(x)), 2, axis=-1)
        a, b = (b, a) if o.gate_second else (a, b)
        a = a.astype(jnp.bfloat16 if o.half_mlp else jnp.float32)
        y = {"erf": lambda z: jax.nn.gelu(z, approximate=False), "tanh": jax.nn.gelu, "silu": jax.nn.silu}[o.gelu](a)
        return x + self.down(y.astype(x.dtype) * b)


class TorchLayer(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.norm1, self.norm2 = (TorchNorm(WIDTH, options.epsilon, options) for _ in range(2))
        self.attention = TorchAttention(options)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.options = options

    def forward(self, x):
        o = self.options
        x = o.residual * x + self.attention(self.norm1(x))
        a, b = self.up(self.norm2(x)).chunk(2, -1)
        a, b = (b, a) if o.gate_second else (a, b)
        a = a.to(torch.bfloat16 if o.half_mlp else torch.float32)
        if o.gelu == "silu":
            y = nn.functional.silu(a)
        else:
            y = nn.functional.gelu(a, approximate="none" if o.gelu == "erf" else "tanh")
        return x + self.down(y.to(x.dtype) * b)


class JaxDecoder(nnx.Module, _Either):
    xp = jnp

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.layers = nnx.List([JaxLayer(options, rngs)])
        self.norm = JaxNorm(WIDTH, options.epsilon, options)
        self.head = nnx.Linear(WIDTH, 11, use_bias=False, rngs=rngs)
        self.options = options

    def __call__(self, tokens):
        return self.forward_tokens(tokens)


class TorchDecoder(nn.Module, _Either):
    xp = torch

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList([TorchLayer(options)])
        self.norm = TorchNorm(WIDTH, options.epsilon, options)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.options = options

    def forward(self, tokens):
        return self.forward_tokens(tokens)


def decoders(seed: int = 0, common: Options = Options(), **torch_only: object) -> tuple[nnx.Module, nn.Module]:
    """A pair with the options `common`, and other ones on the torch side."""
    rng = np.random.default_rng(seed)
    torch_model = TorchDecoder(replace(common, **torch_only))
    with torch.no_grad():
        for leaf in torch_model.parameters():
            spread = rng.standard_normal(leaf.shape) / (leaf.shape[-1] ** 0.5 if leaf.ndim > 1 else 3)
            leaf.copy_(torch.tensor(spread + (leaf.ndim == 1)))
    return bridge.convert(torch_model, JaxDecoder(common, nnx.Rngs(0))), torch_model


PARTS = ("", "layers.0", "layers.0.attention")


def parts_with(paths: list[str]) -> list[str]:
    """The parts that hold all these modules, the smallest last."""
    return [part for part in PARTS if all(not part or f"{path}.".startswith(f"{part}.") for path in paths)]


def part(path: str, seed: int = 0, common: Options = Options(), **torch_only: object) -> dict[str, object]:
    """One of PARTS of such a pair with inputs for it, as arguments of `bridge.verify`: less to run than all of it."""
    jax_model, torch_model = decoders(seed, common, **torch_only)
    rng = np.random.default_rng(seed)
    if not path:
        return {"jax_model": jax_model, "torch_model": torch_model, "inputs": rng.integers(0, 11, (2, 5))}
    jax_part = jax_model.layers[0].attention if path.endswith("attention") else jax_model.layers[0]
    x = rng.standard_normal((2, 5, WIDTH)).astype(np.float32)
    return {"jax_model": jax_part, "torch_model": torch_model.get_submodule(path), "inputs": x}


# What differs -> (options of both sides, options of the torch side only, the modules that have to be named).
FAULTS = {
    "GELU by tanh": ({}, {"gelu": "tanh"}, "layers.0"),
    "SiLU for GELU": ({}, {"gelu": "silu"}, "layers.0"),
    "erf for tanh": ({"gelu": "tanh"}, {"gelu": "erf"}, "layers.0"),
    "halves of the gate exchanged": ({}, {"gate_second": True}, "layers.0"),
    "epsilon of all norms": ({}, {"epsilon": 1e-5}, "layers.0.norm1", "layers.0.norm2", "norm"),
    "epsilon of the head norms": (
        {},
        {"head_epsilon": 1e-5},
        *("layers.0.attention.k_norm", "layers.0.attention.q_norm"),
    ),
    "theta of the positions": ({}, {"theta": 10_001.0}, "layers.0.attention"),
    "interleaved pairs": ({}, {"interleaved": True}, "layers.0.attention"),
    "halves for pairs": ({"interleaved": True}, {"interleaved": False}, "layers.0.attention"),
    "turned the other way": ({}, {"rotary_sign": -1.0}, "layers.0.attention"),
    "part of the head rotated": ({}, {"rotated": 2}, "layers.0.attention"),
    "scale of the scores": ({}, {"scale": WIDTH**-0.5}, "layers.0.attention"),
    "scale a hair off": ({}, {"scale": 0.50001}, "layers.0.attention"),
    "scaled twice": ({}, {"scale_twice": True}, "layers.0.attention"),
    "mask off by one": ({}, {"reach": 1}, "layers.0.attention"),
    "mask off by one the other way": ({"reach": 1}, {"reach": 0}, "layers.0.attention"),
    "window off by one": ({"window": 3}, {"window": 4}, "layers.0.attention"),
    "window forgotten": ({"window": 3}, {"window": 0}, "layers.0.attention"),
    "mask that leaks": ({}, {"masked": -9.0}, "layers.0.attention"),
    "soft cap of the scores": ({}, {"soft_cap": 50.0}, "layers.0.attention"),
    "other soft cap": ({"soft_cap": 50.0}, {"soft_cap": 50.1}, "layers.0.attention"),
    "soft cap of the logits": ({}, {"logit_cap": 30.0}, ""),
    "embedding scaled": ({}, {"embed_scale": WIDTH**0.5}, ""),
    "residual a hair off": ({}, {"residual": 1.00001}, "layers.0"),
    "values normed": ({}, {"value_norm": True}, "layers.0.attention"),
    "last norm forgotten": ({}, {"norm_last": False}, ""),
    "softmax in half precision": ({}, {"half_softmax": True}, "layers.0.attention"),
    "activation in half precision": ({}, {"half_mlp": True}, "layers.0"),
}

# (the smallest part they matter in, options that both sides share): every one is a healthy pair.
HEALTHY = (
    ("", {}),
    ("layers.0", {"gelu": "tanh"}),
    ("layers.0", {"gelu": "silu", "theta": 500_000.0}),
    ("layers.0.attention", {"interleaved": True}),
    ("layers.0.attention", {"window": 3, "soft_cap": 50.0}),
    ("", {"logit_cap": 30.0, "embed_scale": WIDTH**0.5, "epsilon": 1e-5}),
    ("layers.0.attention", {"rotated": 2, "head_epsilon": 1e-5}),
    ("layers.0.attention", {"positions_from": 1000}),
    ("layers.0.attention", {"mean": True, "offset": 1.0}),
    ("layers.0.attention", {"half_softmax": True}),
    ("layers.0", {"half_mlp": True}),
    ("layers.0.attention", {"half_norm": True}),
)
