"""What each of two processes of test_sharded.py runs: models sharded or side by side, against the same model whole."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mhc_torch import HyperConnections, MHCSequential, extract_mixing_weights
from mhc_torch.nn.hyper_connections import StreamStack


def stack(**settings):
    return MHCSequential([nn.Linear(4, 4) for _ in range(5)], **settings)


def streams(**settings):
    return StreamStack([HyperConnections(nn.Linear(4, 4), 4, layer_index=k) for k in range(4)], **settings)


MODELS = {
    "history": stack,
    "window of one": lambda: stack(max_history=1),
    "sparse": lambda: stack(constraint="sparse", init="uniform"),
    "residual": lambda: stack(mode="residual"),
    "gates": lambda: stack(use_gating=True, init="uniform"),
    "streams": streams,
    "blocks of streams": lambda: streams(block_length=2),
}


def run(rank, file, how):
    """Each kind of model in turn: starting processes takes longer than all the rest."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for kind, make in MODELS.items():
            torch.manual_seed(0)
            compare(make(), torch.randn(4, 4), rank, mesh, kind, how)
    finally:
        dist.destroy_process_group()


def compare(whole, x, rank, mesh, kind, how):
    model = copy.deepcopy(whole)
    own = slice(2 * rank, 2 * rank + 2)
    if how == "dtensor":
        distribute_module(model, mesh)
        output = model(distribute_tensor(x, mesh, [Shard(0)]))
        torch.testing.assert_close(output.full_tensor(), whole(x))
    elif how == "ddp":
        # The first layer of a stack of history has one state alone, and its logits no gradient.
        side_by_side = DistributedDataParallel(model, find_unused_parameters=not isinstance(model, StreamStack))
        output = side_by_side(x[own])
        torch.testing.assert_close(output, whole(x)[own])
    else:
        gates = {p for name, p in model.named_parameters() if name.endswith("gate_logit")}
        for gate in gates:
            gate.register_post_accumulate_grad_hook(average)
        parts = model.layers if isinstance(model, StreamStack) else [*model.skip_layers, *model.wrapped_modules]
        for part in parts if how == "each part" else ():
            fully_shard(part, mesh=mesh, ignored_params=gates)
        fully_shard(model, mesh=mesh, ignored_params=gates)
        output = model(x[own])
        torch.testing.assert_close(output, whole(x)[own])
    output.square().mean().backward()
    whole(x).square().mean().backward()
    for (name, ours), alone in zip(model.named_parameters(), whole.parameters(), strict=True):
        if alone.grad is not None:
            found = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
            torch.testing.assert_close(found, alone.grad, msg=lambda why, name=name: f"{kind}, {name}: {why}")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in whole.state_dict().items()}
    if not isinstance(model, StreamStack):
        torch.testing.assert_close(extract_mixing_weights(model), extract_mixing_weights(whole))


def average(gate):
    dist.all_reduce(gate.grad)
    gate.grad /= dist.get_world_size()
