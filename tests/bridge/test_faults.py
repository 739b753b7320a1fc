"""Planted faults: `verify` must find each of them, and name the layer it is in."""

import copy
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from flax import nnx
from torch import nn

import bridge
from mhc_torch import streams
from tests.bridge import pairs

Models = tuple[nnx.Module, nn.Module]


def transpose(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.T.contiguous()


def swap(a: nn.Module, b: nn.Module) -> None:
    state = copy.deepcopy(a.state_dict())
    a.load_state_dict(b.state_dict())
    b.load_state_dict(state)


def flip_bit(weight: torch.Tensor, bit: int) -> None:
    weight.data.view(torch.int32).view(-1)[3] ^= 1 << bit


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    setattr(module, name, value)


def replace_forward(module: nn.Module, forward: Callable) -> None:
    module.forward = types.MethodType(forward, module)


def tanh_gelu(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x)), approximate="tanh"))


def no_residual(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def residual_after_norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = self.norm(x)
    return x + self.fc2(nn.functional.gelu(self.fc1(x)))


def layers_exchanged(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + self.fc1(nn.functional.gelu(self.fc2(self.norm(x))))


def no_gradient(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.detach() + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def half_precision(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x)).half().to(x.dtype)))


def scaled_by_a_hair(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + (1 + 1e-7) * self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def not_a_number(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
    return x + torch.where(y == y.max(), torch.nan, y)


def older_state(self: nn.Module, x: torch.Tensor, history: list[torch.Tensor], *rest: object) -> torch.Tensor:
    return type(self).forward(self, x, history[:-1] or history)


def residual_map_transposed(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    pre, post, res = streams.maps(self.phi, self.alpha, self.bias, x, self.config)
    return streams.write(x, self.branch(streams.collapse(pre, x)), post, res.mT)


def four_heads(model: nn.Module) -> None:
    model.attention.num_heads, model.attention.head_dim = 4, 2


def warmer(skip: nn.Module) -> None:
    skip.config = replace(skip.config, temperature=1.01)


# What is planted in the torch model of a pair, and the layer that has to be named.
CHAIN = {
    "transposed square kernel": (lambda m: transpose(m.blocks[1].fc1), "blocks.1.fc1"),
    "swapped layers of equal shape": (lambda m: swap(m.blocks[0].fc2, m.blocks[1].fc2), "blocks.0.fc2", "blocks.1.fc2"),
    "swapped blocks": (lambda m: swap(m.blocks[0].fc1, m.blocks[0].fc2), "blocks.0.fc1", "blocks.0.fc2"),
    "epsilon of a layer norm": (lambda m: set_attribute(m.blocks[1].norm, "eps", 1e-6), "blocks.1.norm"),
    "lowest bit of a weight": (lambda m: flip_bit(m.blocks[1].fc2.weight, 0), "blocks.1.fc2"),
    "sign bit of a bias": (lambda m: flip_bit(m.head.bias, 31), "head"),
    "GELU by tanh": (lambda m: replace_forward(m.blocks[1], tanh_gelu), "blocks.1"),
    "missing residual": (lambda m: replace_forward(m.blocks[0], no_residual), "blocks.0"),
    "residual after the norm": (lambda m: replace_forward(m.blocks[1], residual_after_norm), "blocks.1"),
    "layers called in the other order": (lambda m: replace_forward(m.blocks[1], layers_exchanged), "blocks.1"),
    "detached residual": (lambda m: replace_forward(m.blocks[1], no_gradient), "blocks.1"),
    "step in half precision": (lambda m: replace_forward(m.blocks[0], half_precision), "blocks.0"),
    "factor below float32's precision": (lambda m: replace_forward(m.blocks[1], scaled_by_a_hair), "blocks.1"),
    "NaN": (lambda m: replace_forward(m.blocks[1], not_a_number), "blocks.1"),
}
MIXED = {
    "weights off by one history index": (
        lambda m: m.stack.skip_layers[2].mixing_logits.data.copy_(m.stack.skip_layers[2].mixing_logits.data.roll(1)),
        "stack.skip_layers.2",
    ),
    "history off by one state": (lambda m: replace_forward(m.stack.skip_layers[1], older_state), "stack.skip_layers.1"),
    "temperature": (lambda m: warmer(m.stack.skip_layers[1]), "stack.skip_layers.1"),
    "iterations of Sinkhorn": (lambda m: set_attribute(m.matrix, "iterations", 1), "matrix"),
    "detached history": (lambda m: set_attribute(m.stack.history_buffer, "detach_history", True), "stack"),
}
IMAGE = {
    "momentum of a batch norm": (lambda m: set_attribute(m.norm, "momentum", 0.11), "norm"),
    "running statistics": (lambda m: m.norm.running_var.mul_(1.001), "norm"),
    "mirrored convolution": (lambda m: set_attribute(m.conv.weight, "data", m.conv.weight.data.flip(2, 3)), "conv"),
    "groups of a group norm": (lambda m: set_attribute(m.group, "num_groups", 4), "group"),
    "padding": (lambda m: set_attribute(m.conv, "padding_mode", "reflect"), "conv"),
}
TOKENS = {
    "queries and keys exchanged": (
        lambda m: m.attention.in_proj_weight.data[:16].copy_(m.attention.in_proj_weight.data[:16].roll(8, 0)),
        "attention",
    ),
    "number of heads": (
        lambda m: (set_attribute(m.attention, "num_heads", 4), set_attribute(m.attention, "head_dim", 2)),
        "attention",
    ),
    "row of an embedding": (lambda m: m.embed.weight.data[3].mul_(1.0001), "embed"),
}


@pytest.mark.parametrize("make", [pairs.chain, pairs.mixed, pairs.image, pairs.tokens], ids=lambda make: make.__name__)
def test_every_planted_fault_is_named_at_its_layer(make: Callable[[], Models]) -> None:
    faults = {pairs.chain: CHAIN, pairs.mixed: MIXED, pairs.image: IMAGE, pairs.tokens: TOKENS}[make]
    wrong = {}
    for name, (plant, *layers) in faults.items():
        jax_model, torch_model = make()
        plant(torch_model)
        report = bridge.verify(jax_model, torch_model, **pairs.inputs(make))
        if report.ok or sorted(report.faults) != sorted(layers):
            wrong[name] = report.faults
    assert not wrong


def test_a_fault_in_one_layer_of_streams_is_named_at_that_layer() -> None:
    jax_model, torch_model = pairs.streams()
    transposed = torch_model.layers[1]
    replace_forward(transposed, residual_map_transposed)
    report = bridge.verify(jax_model, torch_model, **pairs.inputs(pairs.streams))
    assert list(report.faults) == ["layers.1"]
    compared = {row.path for row in report.rows if row.check == "layer alone: value" and row.ok}
    assert {"layers.0", "layers.0.branch", "layers.1.branch"} <= {path.rstrip(".") for path in compared}
