"""Injected models of the published package (`mhc` 0.5.5): their weights load here, what they have is in its place."""

import copy
import pickle
import re

import mhc
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
import mhc_jax.nn
from mhc_torch import HistoryBuffer, MHCSkip, inject_mhc
from mhc_torch.injection import published_keys


class Residual(nn.Module):
    """A target with children of its own, one of which has the name, and the key, of what the published package adds."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.skip = MHCSkip(max_history=2)

    def forward(self, x):
        return self.skip(self.norm(x), [x, 2 * x])


def model():
    body = nn.ModuleDict({"deep": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3))})["deep"]
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Residual(), nn.Sequential(body))


TARGETS = [nn.Linear, Residual]


def both(**settings):
    """The published model, with logits that are no longer those of the start, and ours, injected alike."""
    torch.manual_seed(0)
    theirs = mhc.inject_mhc(model(), TARGETS, 3, **settings).double()
    for name, parameter in theirs.named_parameters():
        if "logit" in name:
            nn.init.normal_(parameter)
    torch.manual_seed(1)
    return theirs.eval(), inject_mhc(model(), TARGETS, 3, **settings).double().eval()


@pytest.mark.parametrize("scope", ["module", "global"])
@pytest.mark.parametrize("load", ["load_state_dict", "bridge"])
def test_published_weights_load_and_compute_the_same(scope, load, tmp_path):
    """Before: load_state_dict and bridge.load listed all keys as missing and unexpected."""
    theirs, ours = both(history_scope=scope, use_gating=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = theirs(x)
    assert not torch.allclose(ours(x), expected)
    if load == "bridge":
        torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
        bridge.load(tmp_path / "theirs.pt", ours)
    else:
        ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-14)


def test_ours_load_as_before():
    """A child called `skip` alone does not make a published state dict."""
    _, ours = both()
    state = copy.deepcopy(ours.state_dict())
    assert published_keys(ours, state) == {}
    nn.init.zeros_(ours[0].weight)
    ours.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    plain = model().double()
    nn.init.normal_(plain[2].skip.mixing_logits)
    found = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert {name.rpartition(".")[2] for name in found.missing_keys} == {"mixing_logits"}
    assert torch.equal(ours[2].norm.running_var, plain[2].norm.running_var)
    assert torch.equal(ours[2].skip.mixing_logits, plain[2].skip.mixing_logits)


def test_a_published_key_too_many_is_still_an_error(tmp_path):
    theirs, ours = both()
    state = theirs.state_dict() | {"0.base_module.more": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected"):
        ours.load_state_dict(state)
    torch.save(state, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"0\.more"):
        bridge.load(tmp_path / "more.pt", ours)


def test_what_a_published_wrapper_has_is_reachable():
    theirs, ours = both(history_scope="global")
    assert ours[0].base_module.weight.shape == theirs[0].base_module.weight.shape
    assert isinstance(ours[0].skip, MHCSkip)
    assert isinstance(ours[0].history_buffer, HistoryBuffer)
    assert ours[0].history_buffer is ours[2].history_buffer
    assert ours[2].skip is not ours[2].mhc_skip, "what a target has itself stays"
    names = [name for name, _ in ours.named_parameters()]
    assert len(names) == len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert not any("base_module" in name for name in [*names, *ours.state_dict()])
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin[0].base_module is twin[0]
        assert twin[0].skip is twin[0].mhc_skip
        assert twin[0].skip is not ours[0].skip
        assert twin[0].history_buffer is twin[0].skip.history_buffer
    buffer = ours[0].history_buffer
    buffer.append(torch.zeros(1))
    ours.clear_mhc_history()
    assert len(buffer) == 0


def test_published_weights_convert_to_jax(tmp_path):
    theirs = mhc.inject_mhc(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), nn.Linear, 2)
    ours = inject_mhc(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), nn.Linear, 2)
    rngs = nnx.Rngs(0)
    in_jax = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs))
    for layer in in_jax.layers:
        layer.mhc_skip = mhc_jax.nn.MHCSkip(max_history=2)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    bridge.convert_file(tmp_path / "theirs.pt", tmp_path / "jax.safetensors", in_jax, ours, to="jax")
    bridge.load(tmp_path / "jax.safetensors", in_jax)
    kernel = torch.from_numpy(np.asarray(in_jax.layers[1].kernel[...]))
    assert torch.equal(kernel.T, theirs[1].base_module.weight)


def test_the_class_of_the_published_wrapper_says_what_to_ask_instead():
    with pytest.raises(ImportError, match=re.escape("hasattr(module, 'mhc_skip')")):
        from mhc_torch.utils.injection import InjectedMHC  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Nobody'"):
        from mhc_torch.utils.injection import Nobody  # noqa: F401
