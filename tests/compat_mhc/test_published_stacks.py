"""Stacks whose skips are not all those that MHCSequential made: replaced ones, and layers that mix themselves."""

import mhc.layers
import pytest
import torch
from torch import nn

from mhc_torch import MatrixMHCSkip, MHCSequential, MHCSkip, extract_mixing_weights, mhc_compatible
from mhc_torch.monitoring.diagnostics import composite_gains, gradient_norms

F64 = torch.float64


class Doubles(nn.Module):
    def forward(self, x, history):
        return x + 2 * history[-1]


def loud(base):
    class Loud(base):
        """Written for the published package, whose forward has these two arguments."""

        def forward(self, x, history):
            return 3 * super().forward(x, history)

    return Loud(max_history=3, init="uniform")


def stacks(*replaced, depth=4):
    """The published stack and ours, with the same weights, and with other modules in the place of some skips."""
    torch.manual_seed(0)
    branches = [nn.Linear(3, 3) for _ in range(depth)]
    theirs = mhc.MHCSequential(branches, 3, detach_history=False).double()
    ours = MHCSequential([nn.Linear(3, 3) for _ in range(depth)], 3).double()
    for name, parameter in theirs.named_parameters():
        if "logits" in name:
            nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    for i, (their_skip, our_skip) in enumerate(replaced):
        theirs.skip_layers[2 * i], ours.skip_layers[2 * i] = their_skip.double(), our_skip.double()
    return theirs, ours


REPLACED = {
    "another module": lambda: [(Doubles(), Doubles())],
    "a subclass": lambda: [(loud(mhc.MHCSkip), loud(MHCSkip))],
    "both": lambda: [(loud(mhc.MHCSkip), loud(MHCSkip)), (Doubles(), Doubles())],
    "a matrix": lambda: [(mhc.layers.MatrixMHCSkip(3, False), MatrixMHCSkip(3, False))],
}


@pytest.mark.parametrize("case", REPLACED)
def test_a_replaced_skip_is_called_as_in_the_published_package(case):
    """Before: AttributeError for a module without config, TypeError for a forward without a third argument."""
    replaced = REPLACED[case]()
    for their_skip, our_skip in replaced:
        our_skip.load_state_dict(their_skip.state_dict())
    theirs, ours = stacks(*replaced)
    x = torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)
    (found,), (expected,) = (torch.autograd.grad(m(x).sum(), [m.wrapped_modules[0].weight]) for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", REPLACED)
def test_the_dashboard_goes_on_with_replaced_skips(case):
    _, ours = stacks(*REPLACED[case]())
    ours(torch.randn(2, 3, dtype=F64)).sum().backward()
    known = "a matrix" in case
    assert len(extract_mixing_weights(ours)) >= 2
    assert gradient_norms(ours)["skip_layers.1/grad_norm"] > 0
    assert bool(composite_gains(ours)) == (known or "a subclass" in case)
    if known:  # the weights of each layer sum to 1, so that the skips alone keep a constant signal
        assert composite_gains(ours)["gain_forward"] == pytest.approx(1)


class Halved(MHCSkip):
    """A subclass with the forward of MHCSkip, but other weights."""

    def coefficients(self, logits, gate_logit):
        return super().coefficients(logits, gate_logit) / 2


@pytest.mark.parametrize("place", [0, 2])
def test_weights_of_a_subclass_are_its_own(place):
    """Before: the weights of all layers were those of the first one's class, silently."""
    _, ours = stacks()
    ours.skip_layers[place] = Halved(max_history=3).double()
    x = torch.randn(2, 3, dtype=F64)
    states = [x]
    for branch, skip in zip(ours.wrapped_modules, ours.skip_layers, strict=True):
        weights = skip.mixing_weights(min(len(states), 3)) / (2 if isinstance(skip, Halved) else 1)
        mixed = sum(w * state for w, state in zip(weights, states[-3:], strict=True))
        states.append(branch(states[-1]) + mixed)
    torch.testing.assert_close(ours(x), states[-1])


@mhc_compatible
class Mixes(nn.Module):
    """The layer of document 002."""

    def __init__(self, dim):
        super().__init__()
        self.skip = MHCSkip(max_history=4, init="uniform")
        self.layer = nn.Linear(dim, dim)

    def forward(self, x, history=None):
        return self.skip(self.layer(x), history or [])


@pytest.mark.parametrize("use_checkpointing", [False, True])
def test_a_layer_that_takes_history_gets_it_and_is_mixed_once(use_checkpointing):
    """Before: it was called without, mixed nothing, and the container mixed in its place."""
    torch.manual_seed(0)
    stack = MHCSequential([Mixes(3), nn.Linear(3, 3), Mixes(3)], use_checkpointing=use_checkpointing, init="uniform")
    x = torch.randn(2, 3, requires_grad=True)
    first, second, third = stack.wrapped_modules
    a = first.layer(x) + x
    b = second(a) + (x + a) / 2
    expected = third.layer(b) + (x + a + b) / 3
    torch.testing.assert_close(stack(x), expected)
    assert list(extract_mixing_weights(stack)) == ["wrapped_modules.0.skip", "wrapped_modules.2.skip", "skip_layers.1"]
    stack(x).sum().backward()
    assert third.skip.mixing_logits.grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in stack.parameters())


@pytest.mark.usefixtures("unchecked")
def test_a_layer_that_takes_history_compiles_whole():
    stack, x = MHCSequential([nn.Linear(3, 3), Mixes(3)]), torch.randn(2, 3)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), stack(x))


def test_a_matrix_skip_as_a_layer_gets_the_history():
    torch.manual_seed(0)
    stack = MHCSequential([nn.Linear(3, 3), MatrixMHCSkip(3)])
    x = torch.randn(2, 3)
    a = stack.wrapped_modules[0](x) + x
    torch.testing.assert_close(stack(x), stack.wrapped_modules[1](a, [x, a]))
