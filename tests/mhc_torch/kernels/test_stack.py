"""Stacks of streams whose boundaries are kernels of Triton."""

import pytest
import torch
from torch import nn

from mhc_torch.nn import HyperConnections, StreamStack
from tests.kept import check_stack


def stack(block_length, implementation="triton"):
    torch.manual_seed(0)
    options = {"implementation": implementation, "iterations": 2}
    layers = [HyperConnections(nn.Linear(32, 32, bias=False), 32, layer_index=i, **options) for i in range(4)]
    return StreamStack(layers, block_length=block_length)


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_kernels_keep_no_streams_inside_of_a_block(block_length):
    # Triton's interpreter holds on to what it was given last: streams, raw logits and a norm.
    held = 2 * 4 * 32 + 4 * (24 + 1)
    check_stack(stack, block_length, depth=4, tokens=16, width=32, n=4, held=held)


@pytest.mark.parametrize("block_length", [1, 4])
def test_a_stack_of_kernels_is_the_stack(block_length):
    outcomes = []
    for implementation in ("triton", "torch"):
        network = stack(block_length, implementation)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
        y = network(torch.linspace(-1, 1, 96).reshape(3, 32))
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), list(network.parameters()))])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())
