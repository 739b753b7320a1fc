"""Triton's kernels of history in its interpreter, against float64."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mhc_torch import MHCSequential, MHCSkip, native
from mhc_torch.kernels import choice
from mhc_torch.kernels import history_mix as kernels

CASES = [
    (4, (3, 5), torch.float32),
    (3, (2, 700), torch.bfloat16),
    (64, (1, 33), torch.float32),
    (1, (1025,), torch.float16),
    (7, (), torch.float32),
]
DIGITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def example(k, shape, dtype):
    torch.manual_seed(k)
    states = [torch.randn(shape).to(dtype) for _ in range(k)]
    if len(shape) == 2:  # one whose numbers are not in a row
        states[0] = states[0].mT.contiguous().mT
    return torch.randn(shape).to(dtype), states, torch.randn(k) / k


def agree(found, exact, digits):
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=digits * max(1, exact.abs().max().item()))


@pytest.mark.parametrize(("k", "shape", "dtype"), CASES, ids=str)
def test_a_mix_and_its_derivatives(k, shape, dtype):
    x, states, weights = example(k, shape, dtype)
    stacked = torch.stack(states).double()
    mixed = kernels.mix(x, states, weights)
    assert mixed.dtype == dtype
    agree(mixed, x.double() + torch.tensordot(weights.double(), stacked, 1), DIGITS[dtype])
    d_states, d_weights = kernels.mix_backward(x, states, weights)
    for found, weight in zip(d_states, weights.double(), strict=True):
        assert found.dtype == dtype
        agree(found, weight * x.double(), DIGITS[dtype])
    agree(d_weights, (stacked * x.double()).reshape(k, -1).sum(1), 1e-6)


@pytest.mark.parametrize(("k", "shape", "dtype"), CASES, ids=str)
def test_what_goes_back_through_a_stack(k, shape, dtype):
    latest, cotangents, column = example(k, shape, dtype)
    cotangents = torch.stack(cotangents).float().reshape(k, -1)
    result, products = kernels.window_backward(cotangents, column, latest)
    assert result.dtype == dtype
    agree(result, (column.double() @ cotangents.double()).reshape(shape), DIGITS[dtype])
    agree(products, cotangents.double() @ latest.double().flatten(), 1e-6)


def test_the_shapes_of_operators_without_numbers():
    x, states, weights = example(3, (2, 5), torch.float32)
    for operator, arguments in (
        (kernels.mix, (x, states, weights)),
        (kernels.mix_backward, (x, states, weights)),
        (kernels.window_backward, (torch.stack(states).flatten(1), weights, x)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def launched(monkeypatch):
    """As on a GPU: kernels mix wherever weights are tensors. The names of those that ran."""
    names = []

    def by_name(name):
        operator = getattr(kernels, name)
        return lambda *arguments: (names.append(name), operator(*arguments))[1]

    monkeypatch.setattr(kernels, "mixes", lambda x, states, weights: isinstance(weights[0], torch.Tensor))
    monkeypatch.setattr(native, "nodes", lambda: None)  # those are for the CPU alone
    for name in ("mix", "mix_backward", "window_backward"):
        monkeypatch.setattr(kernels, name, by_name(name))
    return names


def outcome(call, *leaves):
    y = call()
    return y, *torch.autograd.grad(y.square().sum(), leaves)


def test_a_stack_goes_back_by_kernels(launched, monkeypatch):
    torch.manual_seed(0)
    network = MHCSequential([nn.Linear(5, 5) for _ in range(6)], max_history=3, init="uniform")
    x = torch.randn(4, 5, requires_grad=True)
    ours = outcome(lambda: network(x), x, *network.parameters())
    assert launched == ["window_backward"] * 6
    monkeypatch.setattr(kernels, "mixes", lambda *_: False)
    for found, expected in zip(ours, outcome(lambda: network(x), x, *network.parameters()), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_sum_by_itself_mixes_by_kernels(launched, monkeypatch):
    torch.manual_seed(0)
    skip = MHCSkip(max_history=3, init="uniform")
    x, *states = torch.randn(4, 2, 5, requires_grad=True).unbind()

    def run():
        return outcome(lambda: skip(x, states), x, *states, *skip.parameters())

    ours = run()
    assert launched == ["mix", "mix_backward"]
    monkeypatch.setattr(kernels, "mixes", lambda *_: False)
    for found, expected in zip(ours, run(), strict=True):
        torch.testing.assert_close(found, expected)


def test_which_windows_kernels_mix(monkeypatch):
    # Of tensors that are only described, which are a class of tensors.
    with FakeTensorMode():
        x, nothing = torch.empty(3, device="cuda"), torch.empty(0, device="cuda")
    monkeypatch.setattr(choice, "followed", lambda _: False)
    assert kernels.mixes(x, [x] * kernels.MOST, [x])
    assert not kernels.mixes(x, [x] * (kernels.MOST + 1), [x])
    assert not kernels.mixes(nothing, [nothing], [x])
    assert not kernels.mixes(torch.ones(3), [torch.ones(3)], torch.ones(1))  # on a CPU nobody has asked for them
