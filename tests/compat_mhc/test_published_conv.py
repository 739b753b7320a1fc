"""Conv blocks of the published package (`mhc` 0.5.5): the same numbers, or a refusal that says why."""

import mhc.layers
import pytest
import torch
from torch import nn

import bridge
import mhc_torch


@pytest.mark.parametrize(("name", "width"), [("MHCBasicBlock", 8), ("MHCBottleneck", 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks_give_the_numbers_of_the_first_published_forward(name, width, stride):
    torch.manual_seed(0)
    theirs = getattr(mhc.layers, name)(8, width, stride).double().eval()
    ours = getattr(mhc_torch, name)(8, width, stride).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("deep", [False, True])
def test_a_published_conv_is_refused_with_the_reason(deep, tmp_path):
    """Before: it was loaded, and the output differed by up to 3.7."""
    theirs = mhc.layers.MHCConv2d(2, 2, 3, padding=1)
    ours = mhc_torch.MHCConv2d(2, 2, 3, padding=1)
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(theirs(x), theirs.conv(x))
    torch.testing.assert_close(ours(x), ours.conv(x) + x)
    if deep:
        theirs, ours = nn.Sequential(nn.ReLU(), theirs), nn.Sequential(nn.ReLU(), ours)
    reason = r"MHCConv2d of the mhc package: its first forward is conv\(x\) alone"
    with pytest.raises(RuntimeError, match=reason):
        ours.load_state_dict(theirs.state_dict())
    nn.init.zeros_(next(ours.parameters()))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.ckpt")
    with pytest.raises(ValueError, match=reason):
        bridge.load(tmp_path / "theirs.ckpt", ours)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items()), "nothing is written"

    ours.load_state_dict(dict(theirs.state_dict()))
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_a_conv_of_ours_loads(tmp_path):
    first, second = (nn.Sequential(mhc_torch.MHCConv2d(2, 3, 3, stride=2)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    torch.save(first.state_dict(), tmp_path / "ours.pt")
    third = bridge.load(tmp_path / "ours.pt", nn.Sequential(mhc_torch.MHCConv2d(2, 3, 3, stride=2)))
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(first(x), second(x))
    assert torch.equal(first(x), third(x))
