"""State dicts of the published package load as they are and compute the same numbers (data/make_published.py)."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mhc_torch

CASES = torch.load(Path(__file__).parents[1] / "data" / "published.pt", weights_only=True)


def build(case):
    if case["layer"] == "MHCSequential":
        branches = [nn.Linear(3, 3) for _ in range(5)]
        return mhc_torch.MHCSequential(branches, max_history=3, **case["settings"])
    return getattr(mhc_torch, case["layer"])(max_history=3, **case["settings"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["layer"])
def test_same_state_dict_same_numbers(case):
    layer = build(case).double()
    layer.load_state_dict(case["state"], strict=True)
    output = layer(*case["inputs"])
    # The published Sinkhorn adds 1e-9 to its 20 denominators of about 1: its matrix is off by up to 2e-8.
    atol = 2e-8 if case["settings"].get("doubly_stochastic") else 1e-12
    torch.testing.assert_close(output, case["output"], rtol=0, atol=atol * case["output"].abs().max().item())

    named = dict(layer.named_parameters())
    wanted = [named[name] for name in case["gradients"]]
    gradients = torch.autograd.grad(output, wanted, case["cotangent"]) if wanted else ()
    for found, expected in zip(gradients, case["gradients"].values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=10 * atol, atol=10 * atol)


def test_every_mode_and_constraint_is_covered():
    covered = {(case["settings"].get("mode"), case["settings"].get("constraint")) for case in CASES}
    assert covered >= {(mode, c) for mode in ("mhc", "hc", "residual") for c in ("simplex", "identity")}
