"""What is extracted from the mixing layers: the live weights, their entropy, gradient norms by layer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mhc_torch import HistoryBuffer, MatrixMHCSkip, MHCSequential, MHCSkip, extract_mixing_weights, mhc_compatible
from mhc_torch.monitoring.connection import entropy
from mhc_torch.monitoring.diagnostics import gradient_norms, reset_history


def softmax(logits):
    powers = [math.exp(v - max(logits)) for v in logits]
    return [p / sum(powers) for p in powers]


def latest(logits):
    return [0.0] * (len(logits) - 1) + [1.0]


def blend(epsilon, logits):
    return [(1 - epsilon) * a + epsilon * b for a, b in zip(softmax(logits), latest(logits), strict=True)]


def with_random_logits(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, softmax),
        ({"temperature": 0.5}, lambda z: softmax([2 * v for v in z])),
        ({"mode": "hc", "constraint": "identity"}, softmax),
        ({"constraint": "identity", "epsilon": 0.3}, lambda z: blend(0.3, z)),
        ({"prune_threshold": 0.3}, lambda z: [a if a >= 0.3 else 0.0 for a in softmax(z)]),
        ({"mode": "residual"}, latest),
    ],
)  # fmt: skip
def test_weights_are_projected_as_the_forward_does(settings, expected):
    # Published 0.5.5: the Lightning callback logs a plain softmax whatever the constraint.
    model = with_random_logits(MHCSequential([nn.Identity() for _ in range(4)], max_history=3, **settings))
    weights = extract_mixing_weights(model)
    assert list(weights) == [f"skip_layers.{i}" for i in range(4)]
    for depth, (alpha, skip) in enumerate(zip(weights.values(), model.skip_layers, strict=True)):
        live = min(depth + 1, 3)
        np.testing.assert_allclose(alpha, expected(skip.mixing_logits[-live:].tolist()), atol=1e-6)
        assert not alpha.requires_grad


def test_only_live_states_have_weights():
    # Published 0.5.5: always max_history weights, those of states that do not exist among them.
    skip = MHCSkip(max_history=4, init="uniform")
    x = torch.ones(2, 3)
    skip(x, [x, x])
    assert extract_mixing_weights(skip)["MHCSkip"].tolist() == [0.5, 0.5]


def test_matrix_skips_are_there_with_the_row_that_makes_the_output():
    # Published 0.5.5: matrix skips are left out.
    model = nn.ModuleDict({"mix": with_random_logits(MatrixMHCSkip(max_history=3))})
    basis = list(torch.eye(3))
    output = model["mix"](torch.zeros(3), basis)
    torch.testing.assert_close(extract_mixing_weights(model)["mix"], output.detach())


def test_a_custom_mixing_layer_is_seen_when_it_is_marked():
    class Plain(nn.Module):
        def mixing_weights(self):
            return torch.tensor([0.25, 0.75])

    marked = mhc_compatible(type("Marked", (Plain,), {}))
    model = nn.ModuleDict({"plain": Plain(), "marked": marked()})
    assert {name: alpha.tolist() for name, alpha in extract_mixing_weights(model).items()} == {"marked": [0.25, 0.75]}


def test_names_do_not_depend_on_compilation():
    stack = MHCSequential([nn.Identity() for _ in range(2)])
    names = {f"stack.skip_layers.{i}" for i in range(2)}
    assert extract_mixing_weights(nn.ModuleDict({"stack": stack})).keys() == names
    assert extract_mixing_weights(nn.ModuleDict({"stack": torch.compile(stack)})).keys() == names


def test_a_model_without_history_has_no_weights():
    assert extract_mixing_weights(nn.Linear(2, 2)) == {}


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8).filter(lambda v: sum(v) > 0.1))
def test_entropy(values):
    alpha = [v / sum(values) for v in values]
    found = entropy(torch.tensor(alpha, dtype=torch.float64)).item()
    assert found == pytest.approx(sum(-a * math.log(a) for a in alpha if a > 0), abs=1e-9)
    assert -1e-9 <= found <= math.log(len(alpha)) + 1e-9


def test_entropy_of_a_pruned_weight_is_zero():
    assert entropy(torch.tensor([0.0, 1.0, 0.0])).item() == 0.0


def test_gradient_norms_of_branches_and_logits():
    torch.manual_seed(0)
    model = MHCSequential([nn.Linear(3, 3) for _ in range(3)], max_history=2, init="uniform")
    model(torch.randn(4, 3)).square().sum().backward()
    norms = gradient_norms(nn.ModuleDict({"net": model}))
    assert len(norms) == 6
    for i, (branch, skip) in enumerate(zip(model.wrapped_modules, model.skip_layers, strict=True)):
        flat = np.concatenate([p.grad.numpy().ravel() for p in branch.parameters()])
        assert norms[f"net.skip_layers.{i}/grad_norm"] == pytest.approx(np.linalg.norm(flat), rel=1e-5)
        logits = np.linalg.norm(skip.mixing_logits.grad.numpy())
        assert norms[f"net.skip_layers.{i}/logits_grad_norm"] == pytest.approx(logits, rel=1e-5)
    assert norms["net.skip_layers.2/logits_grad_norm"] > 0


def test_gradient_norms_elsewhere_are_those_of_the_module_that_holds_the_skip():
    layer = nn.ModuleDict({"skip": MHCSkip(), "linear": nn.Linear(2, 2)})
    layer["linear"].weight.grad = torch.full((2, 2), 2.0)
    assert gradient_norms(nn.ModuleList([layer])) == {"0.skip/grad_norm": 4.0, "0.skip/logits_grad_norm": 0.0}


def test_reset_reaches_every_buffer_and_every_own_clear_history():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.states = [1]
            self.buffer = HistoryBuffer()

        def clear_history(self):
            self.states.clear()

    model = nn.Sequential(Own(), nn.Sequential(Own()))
    owners = [model[0], model[1][0]]
    for own in owners:
        own.buffer.append(torch.ones(1))
    reset_history(model)
    assert all(len(own.buffer) == 0 and own.states == [] for own in owners)
