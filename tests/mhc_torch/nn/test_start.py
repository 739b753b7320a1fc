"""From the start "mixed", with a rate of their own, mixing weights decide for some states while the network learns."""

import pytest
import torch
from torch import nn

from mhc_torch import MHCSequential, extract_mixing_weights, parameter_groups


def trained(init, connection_lr, constraint="simplex"):
    """Mean entropy of the full windows before and after a short training, and the loss."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(8)]
    model = nn.Sequential(MHCSequential(layers, init=init, constraint=constraint), nn.Linear(16, 4))
    x = torch.randn(64, 16)
    target = x[:, :4].argmax(1)
    groups = parameter_groups(model, lr=3e-3, connection_lr=connection_lr, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    entropies, losses = [], []
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(x), target)
        rows = [row for row in extract_mixing_weights(model).values() if len(row) == 4]
        entropies.append(torch.special.entr(torch.stack(rows)).sum(-1).mean().item())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return entropies, losses


@pytest.mark.parametrize("constraint", ["simplex", "identity", "sparse"])
def test_entropy_falls_while_the_loss_does(constraint):
    entropies, losses = trained("mixed", 2e-2, constraint)
    assert losses[-1] < losses[0] / 4
    assert 0.6 < entropies[0] < 1.1
    assert entropies[-1] < entropies[0] * 0.8


def test_the_residual_start_keeps_its_name_and_stays_residual():
    entropies, _ = trained("identity", 3e-3)
    assert max(entropies) < 0.005


def test_logits_and_gates_of_history_have_their_own_rate_and_no_decay():
    model = MHCSequential([nn.Linear(4, 4) for _ in range(2)], use_gating=True)
    weights, connections = parameter_groups(model, lr=1e-3, connection_lr=2e-2, weight_decay=0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in connections["params"]} == {
        f"skip_layers.{i}.{name}" for i in range(2) for name in ("mixing_logits", "gate_logit")
    }
    assert (connections["lr"], connections["weight_decay"]) == (2e-2, 0.0)
    assert {names[p] for p in weights["params"]} == {
        f"wrapped_modules.{i}.{n}" for i in range(2) for n in ("weight", "bias")
    }
    assert (weights["lr"], weights["weight_decay"]) == (1e-3, 0.1)
