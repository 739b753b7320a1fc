"""Verdicts of check_model_stability on thirty models, healthy and sick, and the layers that it names."""

import pytest
import torch
from torch import nn

from mhc_torch import (
    HistoryBuffer,
    HyperConnections,
    MatrixMHCSkip,
    MHCBasicBlock,
    MHCConv2d,
    MHCSequential,
    MHCSkip,
    StreamStack,
    check_model_stability,
    inject_mhc,
    share_history,
)

WIDTH = 16
GROWTH, GRADIENT, DRIFT = "buffer growth", "gradient path", "spectral drift"


def linear(gain=1.0):
    layer = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        layer.weight.mul_(gain)
    return layer


def normed(activation=nn.GELU):
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), activation())


def stack(depth, branch=normed, **settings):
    return MHCSequential([branch() for _ in range(depth)], **settings)


def changed(model, change):
    """`model` after `change(layer number, branch, skip)` of each of its layers."""
    with torch.no_grad():
        for index, (branch, skip) in enumerate(zip(model.wrapped_modules, model.skip_layers, strict=True)):
            change(index, branch, skip)
    return model


def scaled(model, gain, only=None):
    """The linear layers of the branches, or of branch `only`, times `gain`."""

    def scale(index, branch, _):
        if only in (None, index):
            for layer in branch.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(gain)

    return changed(model, scale)


def gates(model, logit):
    return changed(model, lambda _, branch, skip: skip.gate_logit.fill_(logit))


def logits(model, spread):
    return changed(model, lambda _, branch, skip: skip.mixing_logits.normal_(0, spread))


def nan_in(model, layer):
    return changed(model, lambda index, branch, _: branch[1].bias.fill_(torch.nan) if index == layer else None)


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


class ByHand(nn.Module):
    """Layers and skips that mix what `history(states, layer)` makes of the states up to there."""

    def __init__(self, history, depth=6, skip=MHCSkip):
        super().__init__()
        self.layers = nn.ModuleList(normed() for _ in range(depth))
        self.skips = nn.ModuleList(skip(max_history=4) for _ in range(depth))
        self.history = history

    def forward(self, x):
        states = [x]
        for index, (layer, skip) in enumerate(zip(self.layers, self.skips, strict=True)):
            states.append(skip(layer(states[-1]), self.history(states, index)))
        return states[-1]


class ShortBuffer(nn.Module):
    """A buffer of two states under skips that would mix four."""

    def __init__(self):
        super().__init__()
        self.layers, self.skips = nn.ModuleList(normed() for _ in range(6)), nn.ModuleList(MHCSkip() for _ in range(6))
        self.buffer = HistoryBuffer(2)

    def forward(self, x):
        self.buffer.clear()
        self.buffer.append(x)
        for layer, skip in zip(self.layers, self.skips, strict=True):
            x = skip(layer(x), self.buffer.get())
            self.buffer.append(x)
        return x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = normed()

    def forward(self, x):
        return x + self.branch(x)


def residual(depth):
    return nn.Sequential(*[Residual() for _ in range(depth)])


def convolutions():
    blocks = [nn.Conv2d(3, 4, 3), *[MHCBasicBlock(4, 4) for _ in range(3)], MHCBasicBlock(4, 8, stride=2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def streams(depth):
    return StreamStack([HyperConnections(normed(), WIDTH, layer_index=i) for i in range(depth)])


# name: how to build it, and of the checks that fail the layer that each names.
HEALTHY = {
    "one layer": lambda: stack(1),
    "six layers": lambda: stack(6),
    "fifty layers": lambda: stack(50),
    "fifty layers, uniform": lambda: stack(50, init="uniform"),
    "fifty layers, window of 8": lambda: stack(50, max_history=8, init="uniform"),
    "fifty layers, sparse": lambda: stack(50, constraint="sparse", init="uniform"),
    "fifty layers, identity": lambda: stack(50, constraint="identity"),
    "fifty layers, gated": lambda: stack(50, use_gating=True),
    "fifty layers, residual": lambda: stack(50, mode="residual"),
    "fifty layers, learned": lambda: logits(stack(50), 2.0),
    "fifty layers, pruned": lambda: logits(stack(50, prune_threshold=0.1), 1.0),
    "fifty linear layers without norm": lambda: stack(50, linear),
    "fifty layers with tanh": lambda: stack(50, lambda: normed(nn.Tanh)),
    "fifty layers and a head of tiny weights": lambda: nn.Sequential(stack(50), linear(1e-6)),
    "fifty layers of a large input": lambda: nn.Sequential(linear(1e5), stack(50)),
    "three detached layers": lambda: stack(3, detach_history=True),
    "two stacks in a row": lambda: nn.Sequential(stack(6), nn.LayerNorm(WIDTH), stack(6)),
    "two stacks in direct succession": lambda: nn.Sequential(stack(6), stack(6)),
    "two by hand in direct succession": lambda: nn.Sequential(*[ByHand(lambda states, _: states) for _ in range(2)]),
    "tokens": lambda: nn.Sequential(nn.Embedding(11, WIDTH), stack(12), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)),
    "a kept history": lambda: stack(6, clear_history_each_forward=False),
    "checkpointing": lambda: stack(6, use_checkpointing=True),
    "matrix skips by hand": lambda: ByHand(lambda states, _: states, skip=MatrixMHCSkip),
    "convolutions": convolutions,
    "convolutions with one history": lambda: share_history(convolutions()),
    "convolutions with a history each": lambda: nn.Sequential(*[MHCConv2d(3, 3, 3, padding=1) for _ in range(6)]),
    "injected with a history each": lambda: inject_mhc(residual(5), nn.Linear, history_scope="module"),
    "injected": lambda: inject_mhc(residual(12), Residual, preserve_function=True),
    "fifty layers of streams": lambda: streams(50),
}
SICK = {
    "fifty detached layers": (lambda: stack(50, linear, detach_history=True), {GRADIENT: "the input"}),
    "fifty detached layers, tanh": (
        lambda: stack(50, lambda: nn.Sequential(linear(), nn.Tanh()), detach_history=True),
        {GRADIENT: "the input"},
    ),
    "thirty layers of closed gates": (
        lambda: gates(stack(30, lambda: linear(0.3), use_gating=True), -20.0),
        {GRADIENT: "the input", DRIFT: "skip_layers.0"},
    ),
    "a cut behind the stack": (lambda: nn.Sequential(stack(3), Cut()), {GRADIENT: "0.skip_layers.2"}),
    "a cut between two stacks, tokens": (
        lambda: nn.Sequential(nn.Embedding(11, WIDTH), stack(3), Cut(), stack(3)),
        {GRADIENT: "1.skip_layers.2"},
    ),
    "a history that nobody fills": (lambda: ByHand(lambda *_: []), {GROWTH: "skips.0"}),
    "a history that forgets all but the latest": (lambda: ByHand(lambda states, _: states[-1:]), {GROWTH: "skips.3"}),
    "a history that is lost at one layer": (
        lambda: ByHand(lambda states, index: states[-1:] if index == 4 else states),
        {GROWTH: "skips.4"},
    ),
    "a buffer shorter than the window": (ShortBuffer, {GROWTH: "skips.3"}),
    "one layer explodes": (lambda: scaled(stack(6, linear), 1e3, only=2), {DRIFT: "skip_layers.2"}),
    "every layer doubles": (lambda: scaled(stack(20, linear), 4.0), {DRIFT: "skip_layers.19"}),
    "NaN in one layer": (lambda: nan_in(stack(6), 3), {GRADIENT: "skip_layers.5", DRIFT: "skip_layers.3"}),
}


def checked(build):
    torch.manual_seed(0)
    report = check_model_stability(build())
    return report, {check.name: check.layer for check in report.checks if not check.holds}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_passes(name):
    report, _ = checked(HEALTHY[name])
    assert report, f"{name}\n{report}"


@pytest.mark.parametrize("name", SICK)
def test_a_sick_model_fails_where_it_is_sick(name):
    build, expected = SICK[name]
    report, found = checked(build)
    assert found == expected, f"{name}\n{report}"
    for layer in expected.values():
        assert f"FAILED at {layer}" in str(report)
