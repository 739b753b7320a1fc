"""check_model_stability finds the three faults it looks for, and leaves the model as it was."""

import copy
import math

import pytest
import torch
from torch import nn

from mhc_torch import HistoryBuffer, MHCSequential, MHCSkip, check_model_stability


def stack(depth=6, width=8):
    torch.manual_seed(0)
    return MHCSequential([nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])


def verdicts(report):
    return {check.name: check.holds for check in report.checks}


@pytest.mark.parametrize("depth", [1, 6, 50])
def test_a_healthy_stack_passes(depth):
    report = check_model_stability(stack(depth))
    assert report
    assert list(verdicts(report)) == ["buffer growth", "gradient path", "spectral drift"]


def test_the_report_prints_as_a_table():
    lines = str(check_model_stability(stack())).splitlines()
    assert lines[0].split() == ["check", "figure", "bound", "verdict"]
    assert [line.split()[-1] for line in lines[1:]] == ["ok", "ok", "ok"]


def test_a_history_that_nobody_fills_is_found():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.skip = nn.Linear(4, 4), MHCSkip()

        def forward(self, x):
            return self.skip(self.layer(x), [])

    report = check_model_stability(Forgetful())
    assert not report
    assert verdicts(report) == {"buffer growth": False, "gradient path": True, "spectral drift": True}


def test_a_history_kept_between_forwards_counts():
    class Manual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.skip, self.buffer = nn.Linear(4, 4), MHCSkip(), HistoryBuffer()

        def forward(self, x):
            out = self.skip(self.layer(x), self.buffer.get())
            self.buffer.append(out)
            return out

    model = Manual()
    assert check_model_stability(model)
    assert len(model.buffer) == 0


class Cut(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize("branches", [[Cut()], [nn.Identity(), Cut()]])
def test_a_cut_gradient_is_found(branches):
    model = nn.Sequential(MHCSequential([nn.Linear(4, 4)]), *branches)
    assert verdicts(check_model_stability(model))["gradient path"] is False


@pytest.mark.parametrize(("scale", "figure_is_finite"), [(1e3, True), (math.nan, False), (math.inf, False)])
def test_exploding_activations_are_found(scale, figure_is_finite):
    model = MHCSequential([nn.Linear(8, 8) for _ in range(6)])
    with torch.no_grad():
        for branch in model.wrapped_modules:
            branch.weight.mul_(scale)
    report = check_model_stability(model)
    assert verdicts(report)["spectral drift"] is False
    assert math.isfinite(report.checks[2].value) == figure_is_finite


def test_vanishing_activations_are_found():
    model = MHCSequential([nn.Linear(8, 8) for _ in range(6)], use_gating=True)
    with torch.no_grad():
        for branch, skip in zip(model.wrapped_modules, model.skip_layers, strict=True):
            branch.weight.mul_(1e-2)
            branch.bias.zero_()
            skip.gate_logit.fill_(-20.0)
    assert verdicts(check_model_stability(model))["spectral drift"] is False


def test_token_inputs_are_checked_through_the_parameters():
    model = nn.Sequential(nn.Embedding(11, 8), stack())
    assert check_model_stability(model)
    assert check_model_stability(model, torch.tensor([[1, 2, 3]]))


def test_inputs_as_tuple_and_as_keywords():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = stack()

        def forward(self, x, *, scale):
            return {"out": self.net(x * scale)}

    assert check_model_stability(Two(), {"x": torch.randn(3, 8), "scale": torch.tensor(2.0)})
    assert check_model_stability(stack(), (torch.randn(3, 8),))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(8), stack(), nn.Dropout()).train()
    model[1].eval()
    model[1].wrapped_modules[0][1].weight.grad = torch.ones(8, 8)
    x = torch.randn(4, 8)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_model_stability(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True]
    assert model[1].wrapped_modules[0][1].weight.grad.eq(1).all()
    assert not x.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_history_is_refused():
    with pytest.raises(ValueError, match="no history and no stream to check"):
        check_model_stability(nn.Linear(3, 3))
