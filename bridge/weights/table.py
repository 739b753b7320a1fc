"""The declared rules: which module of Flax and `mhc_jax` is which module of PyTorch and `mhc_torch`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from flax import nnx
from torch import nn

import mhc_jax.models as jax_models
import mhc_jax.nn as jax_mhc
import mhc_torch as torch_mhc
import mhc_torch.models as torch_models
from bridge.weights import recurrent, wrapped  # noqa: F401 - declare more rules
from bridge.weights.rules import Child, Entry, Leaf, Refused, Setting, equal, register
from mhc_jax.nn import connected as jax_connected
from mhc_jax.nn import hyper_connections as jax_streams
from mhc_torch import connected as torch_connected
from mhc_torch.history.width_map import WidthMap
from mhc_torch.nn import hyper_connections as torch_streams


def _per_axis(ours: str, theirs: str) -> Setting:
    def of(module: Any) -> tuple[int, ...]:
        # Flax writes "1 along each axis" as None, 1 or (1, 1), torch as (1, 1).
        value = getattr(module, ours) or 1
        return (value,) * len(module.kernel_size) if isinstance(value, int) else tuple(value)

    return Setting(ours, of, lambda module: getattr(module, theirs))


def _torch_epsilon(module: Any) -> float:
    # None, in RMSNorm, is the epsilon of the dtype of the input.
    return torch.finfo(torch.float32).eps if module.eps is None else module.eps


def _transposed(module: nnx.ConvTranspose, _: nn.Module) -> tuple[Leaf, ...]:
    # torch's kernel is that of the convolution whose gradient it is, and so is flax's when `transpose_kernel` is set;
    # otherwise flax correlates with the kernel as it stands, and torch with its mirror image.
    layout = "... out in -> in out ..." if module.transpose_kernel else "... in out -> in out ~..."
    return (Leaf("kernel", "weight", layout),)


def _general(module: nnx.LinearGeneral, _: nn.Module) -> tuple[Leaf, ...]:
    inputs = " ".join(f"in{i}" for i in range(len(module.in_features)))
    outputs = " ".join(f"out{i}" for i in range(len(module.out_features)))
    return (
        Leaf("kernel", "weight", f"{inputs} {outputs} -> ({outputs}) ({inputs})"),
        Leaf("bias", "bias", f"{outputs} -> ({outputs})"),
    )


def _einsum(module: nnx.Einsum, _: nn.Linear) -> tuple[Entry, ...]:
    operands, result = module.einsum_str.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    if both := [axis for axis in kernel if axis in inputs and axis in result]:
        return (Refused(f"axes {both} of {module.einsum_str!r} are neither summed nor new, which no nn.Linear can do"),)
    summed = " ".join(axis for axis in inputs if axis in kernel)
    new = " ".join(axis for axis in result if axis in kernel)
    layout = f"{' '.join(kernel)} -> ({new}) ({summed})"
    return Leaf("kernel", "weight", layout), Leaf("bias", "bias", "... -> (...)")


def _slope(module: nnx.PReLU, _: nn.PReLU) -> tuple[Entry, ...]:
    # One slope is a number in flax, and in torch as many numbers as there are slopes.
    return (Leaf("negative_slope", "weight", "... -> ..." if module.negative_slope.shape else "-> ()"),)


def _spatial(dims: int) -> tuple[Setting, ...]:
    """Of dropouts of whole channels, which flax has last."""
    rate, axes = equal("rate", "p"), tuple(range(1, 1 + dims))

    def shared(module: nnx.Dropout) -> tuple[int, ...]:
        return tuple(sorted(axis % (dims + 2) for axis in module.broadcast_dims))

    return rate, Setting("broadcast_dims", shared, lambda _: axes)


def _attention(_: nnx.MultiHeadAttention, module: nn.MultiheadAttention) -> tuple[Leaf, ...]:
    layout = "in head dim -> (head dim) in"
    out = Leaf("out.kernel", "out_proj.weight", "head dim out -> out (head dim)")
    entries = [out, Leaf("out.bias", "out_proj.bias")]
    for i, name in enumerate(("query", "key", "value")):
        if module.in_proj_weight is None:  # keys or values of another width than the queries
            entries.append(Leaf(f"{name}.kernel", f"{name[0]}_proj_weight", layout))
        else:
            entries.append(Leaf(f"{name}.kernel", "in_proj_weight", layout, (i, 3)))
        entries.append(Leaf(f"{name}.bias", "in_proj_bias", "head dim -> (head dim)", (i, 3)))
    return tuple(entries)


def _variance(epsilon: float, groups: torch.Tensor) -> float:
    """What a normalization of rows loses: Flax takes the variance as E[x²] - E[x]²."""
    ratio = groups.mean(-1).square() / (groups.var(-1, unbiased=False) + epsilon)
    return 1.0 + ratio.max().item() if ratio.numel() else 1.0


def _layer_norm(module: nn.LayerNorm, x: torch.Tensor) -> float:
    return _variance(module.eps, x.flatten(-len(module.normalized_shape)))


def _group_norm(module: nn.GroupNorm, x: torch.Tensor) -> float:
    return _variance(module.eps, x.reshape(len(x) * module.num_groups, -1))


def _instance_norm(module: Any, x: torch.Tensor) -> float:
    return _variance(module.eps, x.flatten(2))


def _batch_norm(module: Any, x: torch.Tensor) -> float:
    return _variance(module.eps, x.transpose(0, 1).flatten(1)) if module.training else 1.0


def _inner_products(_: nn.Module, inputs: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> float:
    """The logits' gradient is a difference of inner products of cotangent and states, which nearly cancel where one
    weight is close to 1. Such a product of n random signs is about |cotangent|·|state|/√n.
    """
    states = max(np.linalg.norm(x) for x in inputs)
    return float(np.linalg.norm(cotangents[0]) * states / np.sqrt(max(x.size for x in inputs)))


_SCALE = Leaf("scale", "weight")
_EPSILON = Setting("epsilon", lambda module: module.epsilon, _torch_epsilon)
# Flax weighs the old value with `momentum`, torch the new one; torch has None for the mean over all batches.
_MOMENTUM = Setting("momentum", lambda m: m.momentum, lambda m: None if m.momentum is None else 1 - m.momentum)
_STRIDES, _DILATION = _per_axis("strides", "stride"), _per_axis("kernel_dilation", "dilation")

register(nnx.Linear, nn.Linear, Leaf("kernel", "weight", "in out -> out in"))
register(nnx.LinearGeneral, nn.Linear, by=_general)
register(nnx.Einsum, nn.Linear, by=_einsum)
register(nnx.PReLU, nn.PReLU, by=_slope)
register(nnx.Embed, nn.Embedding, Leaf("embedding", "weight"))
register(nnx.LayerNorm, nn.LayerNorm, _SCALE, settings=(_EPSILON,), cancellation=_layer_norm)
register(nnx.RMSNorm, nn.RMSNorm, _SCALE, settings=(_EPSILON,))
register(
    nnx.GroupNorm,
    nn.GroupNorm,
    _SCALE,
    settings=(_EPSILON, equal("num_groups", "num_groups")),
    cancellation=_group_norm,
)
for _instance in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
    register(nnx.InstanceNorm, _instance, _SCALE, settings=(_EPSILON,), cancellation=_instance_norm)
register(nnx.Dropout, nn.Dropout, settings=_spatial(0))
for _dims, _channels in enumerate((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), 1):
    register(nnx.Dropout, _channels, settings=_spatial(_dims))
register(
    nnx.MultiHeadAttention,
    nn.MultiheadAttention,
    by=_attention,
    settings=(
        equal("num_heads", "num_heads"),
        equal("dropout_rate", "dropout"),
        Setting("add_zero_attn", lambda _: False, lambda module: module.add_zero_attn),
    ),
)

for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    _kernel = Leaf("kernel", "weight", "... in out -> out in ...")
    register(nnx.Conv, _conv, _kernel, settings=(_STRIDES, _DILATION, equal("feature_group_count", "groups")))
for _transpose in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(nnx.ConvTranspose, _transpose, by=_transposed, settings=(_STRIDES, _DILATION))
for _norm in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
    register(
        nnx.BatchNorm,
        _norm,
        *(_SCALE, Leaf("mean", "running_mean"), Leaf("var", "running_var")),
        settings=(_EPSILON, _MOMENTUM),
        torch_only=("num_batches_tracked",),
        cancellation=_batch_norm,
    )


def _mixing(module: Any) -> dict[str, Any]:
    """The options of a history mix that change its function."""
    config = module.config
    names = ["mode", "prune_threshold", "stochastic", *config.projection.options]
    names += ["constraint"] * (config.mode == "mhc")
    return {name: getattr(config, name) for name in names}


def _stream_options(module: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(module.config).items() if name != "start"}  # the parameters tell


def _width_map(_: nnx.Linear, module: WidthMap) -> tuple[Leaf, ...]:
    return (Leaf("kernel", "weight", "in out -> out in () ()" if module.weight.ndim == 4 else "in out -> out in"),)


_MIXING = Setting("mixing", _mixing, _mixing)
_DETACH = Setting("detach_history", lambda m: m.config.detach_history, lambda m: m.history_buffer.detach_history)
_STREAMS = Setting("streams", _stream_options, _stream_options)
_STACK_MIXING = Setting("mixing", _mixing, lambda module: _mixing(module.skip_layers[0]))

register(jax_mhc.MHCSkip, torch_mhc.MHCSkip, settings=(_MIXING,), terms=_inner_products)
register(nnx.Linear, WidthMap, by=_width_map)
register(
    jax_mhc.MatrixMHCSkip,
    torch_mhc.MatrixMHCSkip,
    settings=(equal("doubly_stochastic", "doubly_stochastic"), equal("iterations", "iterations")),
    terms=_inner_products,
)
register(jax_mhc.MHCSequential, torch_mhc.MHCSequential, settings=(_DETACH,))
register(
    jax_mhc.MHCStack,
    torch_mhc.MHCSequential,
    Child("layers", "wrapped_modules.*"),
    Leaf("mixing_logits", "skip_layers.*.mixing_logits"),
    Leaf("gate_logit", "skip_layers.*.gate_logit"),
    settings=(_DETACH, _STACK_MIXING),
)
# The blocks of image networks have the same names on both sides, and so have hyper-connections.
register(jax_streams.ConnectionMaps, torch_streams.ConnectionMaps, settings=(_STREAMS,))
# They write nothing of their own: a place is where a branch stands in its stack, which torch counts.
register(jax_connected.BranchHistory, torch_connected.BranchHistory, settings=(_MIXING,), jax_only=("place",))
register(jax_streams.StreamHead, torch_streams.StreamHead, settings=(_STREAMS,))
register(jax_streams.StreamStack, torch_streams.StreamStack, Child("layers", "layers.*"))


def _decoder(jax_module: jax_models.Decoder, _: torch_models.Decoder) -> tuple[Child | Leaf, ...]:
    # torch has a tied output layer under two names, as transformers.
    tied = (Leaf("embed_tokens.embedding", "lm_head.weight"),) if jax_module.config.tied else ()
    body = Child("embed_tokens", "model.embed_tokens"), Child("stack", "model.layers"), Child("norm", "model.norm")
    return *body, *tied


def _decoder_layers(jax_module: Any, torch_module: Any) -> tuple[Child | Leaf, ...]:
    """Of a decoder's stack as a chain, which is how it is verified."""
    history = isinstance(jax_module, jax_mhc.MHCSequential)
    layers = "wrapped_modules" if history else "layers"
    entries: list[Child | Leaf] = [Child(f"{layers}.{i}", str(i)) for i in range(len(torch_module))]
    for i in range(len(torch_module) if history else 0):
        entries += [Leaf(f"skip_layers.{i}.{name}", f"{i}.skip.{name}") for name in ("mixing_logits", "gate_logit")]
    return tuple(entries)


def _residual_logits(jax_module: Any, torch_module: torch_models.decoder.DecoderStack) -> tuple[str, ...]:
    # In mode "residual" no logit is used, and a torch decoder has none, as Llama.
    if torch_module.connection is not None or jax_module.config.mode != "residual":
        return ()
    if isinstance(jax_module, jax_mhc.MHCStack):
        return ("mixing_logits",)
    return tuple(f"skip_layers.{i}.mixing_logits" for i in range(len(torch_module)))


def _connected(module: torch_models.decoder.DecoderStack) -> Any:
    return _mixing(module[0].skip) if hasattr(module[0], "skip") else {"mode": "residual"}


def _history(module: Any) -> dict[str, Any]:
    return {"mode": "residual"} if module.config.mode == "residual" else _mixing(module)


_SIZES = Setting("sizes", lambda m: asdict(m.config), lambda m: asdict(m.config))
register(
    jax_models.Decoder,
    torch_models.Decoder,
    by=_decoder,
    settings=(_SIZES,),
)
_STACK = torch_models.decoder.DecoderStack
register(
    jax_mhc.MHCStack,
    _STACK,
    Child("layers", "*"),
    Leaf("mixing_logits", "*.skip.mixing_logits"),
    Leaf("gate_logit", "*.skip.gate_logit"),
    settings=(Setting("mixing", _history, _connected),),
    jax_only=_residual_logits,
)
register(jax_mhc.MHCSequential, _STACK, by=_decoder_layers, jax_only=_residual_logits)
register(jax_mhc.StreamStack, _STACK, Child("layers", "*"))
register(jax_streams.StreamChain, _STACK, by=_decoder_layers)
