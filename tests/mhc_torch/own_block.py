"""A block as a user has it, and what two processes of test_retrofit.py do with a model of it."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mhc_torch import connection_parameters, register_block, retrofit

WIDTH = 16


class Block(nn.Module):
    """A user's own: takes more than its state, puts out a tuple, and drops out before the sums."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, state, factor, *, note=None):
        state = state + self.dropout(factor * self.mix(self.norm1(state)))
        return state + self.dropout(torch.tanh(self.mlp(self.norm2(state)))), note


BRANCHES = {"mix": ("norm1", "dropout"), "mlp": ("norm2", "dropout")}


class Own(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x, factor=1.0):
        for block in self.blocks:
            x, _ = block(x, factor, note="kept")
        return x


def train_in_parallel(rank, file):
    """What each of two processes runs."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        register_block(Block, BRANCHES)
        whole, x = retrofit(Own().eval()), torch.randn(4, WIDTH)
        with torch.no_grad():
            for parameter in connection_parameters(whole):
                parameter.add_(0.1)
        for how in ("ddp", "fsdp"):
            compare(whole, x, rank, how)
    finally:
        dist.destroy_process_group()


def compare(whole, x, rank, how):
    """Gradients of the retrofitted model, shared out, are those of it alone."""
    model = copy.deepcopy(whole)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.blocks:
            fully_shard(layer.hyper_connections.mix, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    own = slice(2 * rank, 2 * rank + 2)
    output = model(x[own])
    torch.testing.assert_close(output, whole(x)[own])
    whole.zero_grad()
    output.square().mean().backward()
    whole(x).square().mean().backward()
    for ours, alone in zip(model.parameters(), whole.parameters(), strict=True):
        found = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(found, alone.grad, rtol=1e-4, atol=1e-6)
