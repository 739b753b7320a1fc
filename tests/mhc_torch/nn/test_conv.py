"""Conv blocks: a residual block alone, a history when they share one."""

import copy

import pytest
import torch
from torch import nn

from mhc_torch import MHCBasicBlock, MHCBottleneck, MHCConv2d, share_history


def resnet():
    torch.manual_seed(0)
    return nn.Sequential(
        MHCConv2d(3, 8, 3, padding=1),
        MHCBasicBlock(8, 8),
        MHCBasicBlock(8, 8),
        MHCBasicBlock(8, 16, stride=2),
        MHCBottleneck(16, 4),
    )


def test_a_block_alone_is_a_residual_block():
    block = MHCBasicBlock(4, 4).eval()
    x = torch.randn(2, 4, 5, 5)
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(branch + x))
    block = MHCBottleneck(4, 2, stride=2).eval()
    branch = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
    torch.testing.assert_close(block(x), torch.relu(block.bn3(block.conv3(branch)) + block.downsample(x)))
    conv = MHCConv2d(4, 6, 3, stride=2, padding=1)
    torch.testing.assert_close(conv(x), conv.conv(x) + conv.projection(x))
    assert MHCConv2d(4, 4, 3)(x).shape == (2, 4, 3, 3)  # nothing of this shape to mix


def test_shared_history_is_the_formula():
    torch.manual_seed(0)
    blocks = [MHCConv2d(4, 4, 3, padding=1) for _ in range(3)]
    for block in blocks:
        nn.init.zeros_(block.skip.mixing_logits)
    x = torch.randn(2, 4, 5, 5)
    states = [x]
    for block in blocks:
        states.append(block.conv(states[-1]) + sum(states) / len(states))
    torch.testing.assert_close(share_history(nn.Sequential(*blocks))(x), states[-1])


def test_shared_history_lasts_one_forward():
    model = share_history(resnet())
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    assert [block.skip.live for block in model] == [1, 2, 3, 1, 2]
    assert all(p.grad is not None for p in model.parameters())
    assert all(block.skip.mixing_logits.grad.abs().max() > 0 for block in model if block.skip.live > 1)
    model.eval()
    assert torch.equal(model(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(model(x[:1]), model(x)[:1])


def test_compiles_and_exports_whole():
    model = share_history(resnet()).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_history_kept_across_forwards_when_asked_for():
    model = share_history(nn.Sequential(MHCBasicBlock(4, 4)), clear_on_forward=False).eval()
    x = torch.randn(2, 4, 5, 5)
    first = model(x)
    assert not torch.equal(model(x), first)
    model[0].clear_history()
    assert torch.equal(model(x), first)


def test_an_input_that_cannot_join_does_not_spoil_the_output():
    # Its sum is beyond the range of float16.
    conv = MHCConv2d(4, 8, 3).half()
    nn.init.ones_(conv.projection.weight)
    assert conv(torch.full((2, 4, 20, 20), 100.0).half()).isfinite().all()


def test_sharing_needs_blocks():
    with pytest.raises(ValueError, match="got Linear"):
        share_history(nn.Linear(2, 2))
