"""Layers of users on the dashboard: those that have only logits, those that no history reaches, and none at all."""

import warnings

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from mhc_torch import MHCConv2d, MHCLightningCallback, MHCSequential, MHCSkip, extract_mixing_weights, inject_mhc
from mhc_torch import mhc_compatible as compatible
from mhc_torch.monitoring.diagnostics import gradient_norms, row_figures
from tests.mhc_torch.lightning_models import WIDTH, Classifier, blocks, loader, trainer


@compatible
class Logits(nn.Module):
    """Document 002: the callback "only inspects and logs the `logits` of layers that are declared @mhc_compatible"."""

    def __init__(self, *shape):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(float(torch.Size(shape).numel())).reshape(shape))

    def forward(self, x):
        return x * self.logits.softmax(-1).sum()


def test_a_marked_class_with_logits_alone_is_shown():
    model = nn.Sequential(Logits(3), Logits(2, 2), nn.Linear(2, 2))
    weights = extract_mixing_weights(model)
    assert list(weights) == ["0", "1.0", "1.1"]
    torch.testing.assert_close(weights["0"], torch.tensor([0.0, 1.0, 2.0]).softmax(0))
    torch.testing.assert_close(weights["1.1"], torch.tensor([2.0, 3.0]).softmax(0))
    figures = row_figures(model)
    assert figures["0/entropy"] == pytest.approx(-(weights["0"] * weights["0"].log()).sum().item())
    assert set(figures) == {"0/entropy", "1.0/entropy", "1.1/entropy"}
    (model[0].logits * torch.tensor([3.0, 0, 4])).sum().backward()
    assert gradient_norms(model)["0/logits_grad_norm"] == pytest.approx(5)


def test_what_is_not_marked_or_no_vector_is_not_shown():
    bare = type("Bare", (nn.Module,), {})()
    bare.logits = nn.Parameter(torch.zeros(3))
    labels = compatible(type("Labels", (nn.Module,), {"logits": None}))()
    scalar = Logits()
    assert extract_mixing_weights(nn.ModuleList([bare, labels, scalar])) == {}


@compatible
class Forgotten(nn.Module):
    """The layer of document 002 in a container that passes nothing."""

    def __init__(self):
        super().__init__()
        self.skip = MHCSkip()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, history=None):
        return self.skip(self.layer(x), history or [])


def said(model, epochs=2, **settings):
    """What the callback warned of in a training of two epochs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[MHCLightningCallback()], max_epochs=epochs, **settings).fit(model, loader(2))
    return [str(w.message) for w in caught if "no state reached" in str(w.message) or "MHCLightning" in str(w.message)]


def test_skips_that_no_history_reaches_are_named_once():
    model = Classifier()
    model.net = nn.Sequential(Forgotten(), MHCSequential(blocks(2)), Forgotten())
    (message,) = said(model)
    assert message.startswith("no state reached net.0.skip, net.2.skip in the first batch")


def test_a_model_without_a_mixing_layer_is_named_once():
    model = Classifier()
    model.net = nn.Linear(WIDTH, WIDTH)
    (message,) = said(model)
    assert message.startswith("MHCLightningCallback found no mixing layer in Classifier")


HEALTHY = {
    "stack": lambda: MHCSequential(blocks(2)),
    "stack that passes": lambda: MHCSequential([Forgotten(), Forgotten()]),
    # The first target of each width has no history by design.
    "injected": lambda: inject_mhc(nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)), nn.Linear),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (1, 1, WIDTH)), MHCConv2d(1, 1, 3, padding=1), nn.Flatten()),
}


@pytest.mark.parametrize("net", HEALTHY)
def test_nothing_is_said_of_layers_that_mix(net):
    model = Classifier()
    model.net = HEALTHY[net]()
    assert said(model) == []


def test_a_dashboard_of_idle_skips_alone_trains_on(tmp_path):
    """Before: ValueError from numpy at the first step, when there is no weight at all to draw."""
    model = Classifier()
    model.net = nn.Sequential(Forgotten())
    assert len(said(model, epochs=1, logger=CSVLogger(tmp_path, "", ""))) == 1
