"""Pairs of small models, equal by construction in both frameworks, for the tests of verification and calls."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

import bridge
import mhc_jax.nn
import mhc_torch

WIDTH = 8


class JaxBlock(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, width: int = WIDTH, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.fc1 = nnx.Linear(width, width, rngs=rngs)
        self.fc2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm(x)), approximate=False))


class TorchBlock(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class JaxChain(nnx.Module):
    """Blocks one after the other, and a head."""

    def __init__(self, depth: int = 2, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([JaxBlock(rngs=rngs) for _ in range(depth)])
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TorchChain(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TorchBlock() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class JaxMixed(nnx.Module):
    """Embedding, a scanned stack with history mixing, a matrix skip, a head."""

    def __init__(self, depth: int = 3, *, rngs: nnx.Rngs, **options: object) -> None:
        self.embed = nnx.Linear(6, WIDTH, rngs=rngs)
        self.stack = mhc_jax.nn.MHCStack(lambda r: JaxBlock(rngs=r), depth, rngs=rngs, **options)
        self.matrix = mhc_jax.nn.MatrixMHCSkip(2, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        start = self.embed(x)
        return self.head(self.matrix(self.stack(start), [start, 2 * start]))


class TorchMixed(nn.Module):
    def __init__(self, depth: int = 3, **options: object) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.stack = mhc_torch.MHCSequential([TorchBlock() for _ in range(depth)], **options)
        self.matrix = mhc_torch.MatrixMHCSkip(2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = self.embed(x)
        return self.head(self.matrix(self.stack(start), [start, 2 * start]))


class JaxImage(nnx.Module):
    """Convolution, batch norm, group norm, pooling."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), padding="SAME", rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), strides=2, padding=1, feature_group_count=2, rngs=rngs)
        self.group = nnx.GroupNorm(4, num_groups=2, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.conv(x)))
        x = jax.nn.silu(self.group(self.conv2(x)))
        return self.head(x.mean((1, 2)))


class TorchImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.group = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.norm(self.conv(x)), inplace=True)
        x = nn.functional.silu(self.group(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class JaxTokens(nnx.Module):
    """Embedding, causal attention, RMS norm, tied head."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        h = self.norm(x)
        mask = jnp.tril(jnp.ones((tokens.shape[-1],) * 2, bool))
        x = x + self.drop(self.attention(h, mask=mask))
        return self.embed.attend(x)


class TorchTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        h = self.norm(x)
        mask = torch.ones((tokens.shape[-1],) * 2, dtype=torch.bool).triu(1)
        x = x + self.drop(self.attention(h, h, h, attn_mask=mask, need_weights=False)[0])
        return x @ self.embed.weight.T


def randomized(jax_model: nnx.Module, torch_model: nn.Module, seed: int) -> tuple[nnx.Module, nn.Module]:
    """Both models with the same random weights, none of them 0 or 1 as initial values are."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, leaf in torch_model.state_dict().items():
            if leaf.is_floating_point():
                spread = rng.standard_normal(leaf.shape) / max(1, leaf[:1].numel()) ** 0.5
                leaf.copy_(torch.tensor(np.exp(0.3 * spread) if "var" in name else spread))
    return bridge.convert(torch_model, jax_model), torch_model


def chain(seed: int = 0) -> tuple[nnx.Module, nn.Module]:
    return randomized(JaxChain(rngs=nnx.Rngs(0)), TorchChain(), seed)


def mixed(seed: int = 0, **options: object) -> tuple[nnx.Module, nn.Module]:
    return randomized(JaxMixed(rngs=nnx.Rngs(0), **options), TorchMixed(**options), seed)


def image(seed: int = 0) -> tuple[nnx.Module, nn.Module]:
    return randomized(JaxImage(rngs=nnx.Rngs(0)), TorchImage(), seed)


def tokens(seed: int = 0) -> tuple[nnx.Module, nn.Module]:
    return randomized(JaxTokens(rngs=nnx.Rngs(0)), TorchTokens(), seed)


def streams(seed: int = 0) -> tuple[nnx.Module, nn.Module]:
    """A scanned stack of hyper-connections around linear layers."""

    def layer(rngs: nnx.Rngs, index: jax.Array) -> nnx.Module:
        linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        return mhc_jax.nn.HyperConnections(linear, WIDTH, streams=2, iterations=2, layer_index=index)

    layers = (mhc_torch.HyperConnections(nn.Linear(WIDTH, WIDTH), WIDTH, streams=2, iterations=2) for _ in range(2))
    jax_model = mhc_jax.nn.StreamStack(layer, depth=2, streams=2, rngs=nnx.Rngs(0))
    return randomized(jax_model, mhc_torch.StreamStack(layers, streams=2), seed)


def inputs(make: Callable, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a pair, as the arguments of `bridge.verify`."""
    rng = np.random.default_rng(seed)
    if make is tokens:
        return {"inputs": rng.integers(0, 11, (2, 5))}
    if make is image:
        pixels = rng.standard_normal((3, 6, 6, 3)).astype(np.float32)
        return {"inputs": pixels, "torch_inputs": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
    return {"inputs": rng.standard_normal((4, 6 if make is mixed else WIDTH)).astype(np.float32)}
