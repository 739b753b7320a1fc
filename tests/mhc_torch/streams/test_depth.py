"""Stacks of streams by boundaries, and what their backward pass keeps."""

import copy

import pytest
import torch
from torch import nn

from mhc_torch.models import Decoder, DecoderConfig
from mhc_torch.nn.hyper_connections import HyperConnections, StreamStack
from mhc_torch.streams import StreamConfig, apply_branches, expand, optimal_block_length, reduce
from tests.kept import Kept, check_stack

WIDTH, DEPTH = 6, 6


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x, shift=0.0, *, scale=1.0):
        self.calls += 1
        return scale * torch.tanh(self.inner(x) + shift)


class Other(nn.Module):
    """A layer of streams that is no chain."""

    def forward(self, streams, shift=0.0, *, scale=1.0):
        return streams.roll(1, -2) * scale + shift


class Own(HyperConnections):
    """A subclass with a forward of its own."""

    def forward(self, streams, *args, **kwargs):
        return 2 * super().forward(streams, *args, **kwargs)


def stack(config=None, block_length=1, layers=(HyperConnections,) * DEPTH):
    torch.manual_seed(0)
    config = config or StreamConfig(3)
    made = [
        kind(Branch(), WIDTH, config=config, layer_index=i) if issubclass(kind, HyperConnections) else kind()
        for i, kind in enumerate(layers)
    ]
    network = StreamStack(made, config=config, block_length=block_length).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def in_turn(network, x, *args, **kwargs):
    wide = expand(x, network.streams)
    for layer in network.layers:
        wide = layer(wide, *args, **kwargs)
    return reduce(wide)


def outcome(call, network):
    x = torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).reshape(5, WIDTH).requires_grad_()
    y = call(x, 0.1, scale=0.9)
    return y, *torch.autograd.grad(y.square().sum(), [x, *network.parameters()])


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1, b.abs().max().item()))


CONFIGS = [
    StreamConfig(3),
    StreamConfig(2, "identity"),
    StreamConfig(2, "none", dynamic=False),
    StreamConfig(3, norm="streams", iterations=2),
]


@pytest.mark.parametrize("block_length", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_stack_is_its_layers_in_turn(config, block_length):
    network = stack(config, block_length)
    expected = outcome(lambda *a, **k: in_turn(network, *a, **k), network)
    assert_same(outcome(network, network), expected)


@pytest.mark.parametrize("block_length", [1, 2])
@pytest.mark.parametrize(
    "layers",
    [(Other, HyperConnections, HyperConnections, Own, HyperConnections, HyperConnections, HyperConnections, Other), ()],
    ids=str,
)
def test_layers_of_other_kinds_run_as_they_are(layers, block_length):
    network = stack(None, block_length, layers)
    assert_same(outcome(network, network), outcome(lambda *a, **k: in_turn(network, *a, **k), network))


@pytest.mark.parametrize("block_length", [1, 3])
def test_hooks_of_layers_and_of_branches_run(block_length):
    network = stack(None, block_length)
    expected = outcome(network, network)
    seen = []
    network.layers[1].branch.register_forward_hook(lambda *_: seen.append("branch"))
    network(torch.ones(2, WIDTH, dtype=torch.float64))
    assert seen == ["branch"]
    for name, register in {
        "forward": network.layers[2].register_forward_hook,
        "pre": network.layers[2].register_forward_pre_hook,
        "backward": network.layers[3].register_full_backward_hook,
    }.items():
        register(lambda *_, name=name: seen.append(name))
    assert_same(outcome(network, network), expected)
    assert seen == ["branch", "branch", "pre", "forward", "backward"]
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        network(torch.ones(2, WIDTH, dtype=torch.float64))
    assert seen.count(HyperConnections) == DEPTH


def test_a_forward_that_was_put_in_its_place_is_called():
    network = stack()
    network.layers[0].forward = lambda streams, *args, **kwargs: streams
    y = network(x := torch.ones(2, WIDTH, dtype=torch.float64))
    assert network.layers[0].branch.calls == 0
    torch.testing.assert_close(y, in_turn(network, x))


@pytest.mark.parametrize("block_length", [1, 2, 6])
def test_in_a_block_no_branch_runs_twice(block_length):
    network = stack(None, block_length)
    outcome(network, network)
    assert [layer.branch.calls for layer in network.layers] == [1] * DEPTH


def test_streams_as_many_as_their_features():
    # H_res has their shape then, and must not be taken for them.
    config = StreamConfig(3)
    layers = [HyperConnections(nn.Linear(3, 3), 3, config=config, layer_index=i) for i in range(4)]
    plain, blocks = (StreamStack(layers, config=config, block_length=length).double() for length in (1, 4))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 3, dtype=torch.float64)
    expected, found = (
        torch.autograd.grad(network(x).square().sum(), [*network.parameters()]) for network in (plain, blocks)
    )
    assert_same(found, expected)


def test_streams_written_again_are_let_go_on_the_way_back():
    depth, streams = 16, 4 * 4 * 64 * 32  # bytes
    found = []

    def branch(x):
        y = x.tanh()
        y.register_hook(lambda _: found.append(kept.bytes()))
        return y

    config = StreamConfig(4, dynamic=False)
    connections = [HyperConnections(nn.Identity(), 32, config=config, layer_index=i) for i in range(depth)]
    layers = [[connection.connecting(branch)] for connection in connections]
    with Kept([]) as kept:
        apply_branches(layers, torch.randn(64, 4, 32), block_length=depth).sum().backward()
    assert len(found) == depth
    # At the last layer all of them are there; near the first, what branches put out, and few streams.
    assert found[0] >= depth * streams
    assert found[-3] <= 0.75 * depth * streams


@pytest.mark.parametrize("block_length", [1, 2])
def test_second_derivatives_and_second_passes(block_length):
    network = stack(StreamConfig(2, iterations=2), block_length)
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)

    def second(call):
        (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *network.parameters()])

    assert_same(second(network), second(lambda x: in_turn(network, x)))
    y = network(x).sin().sum()
    once, twice = (torch.autograd.grad(y, [x, *network.parameters()], retain_graph=True) for _ in range(2))
    assert_same(once, twice)


@pytest.mark.parametrize("block_length", [1, 2])
def test_transforms_of_torch_func(block_length):
    network = stack(None, block_length)
    x = torch.randn(3, WIDTH, dtype=torch.float64)

    def loss(x):
        return network(x).square().sum()

    (expected,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (x,))[1], (expected * x).sum())


@pytest.mark.parametrize("block_length", [1, 2])
@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph_exports_and_copies(block_length):
    torch._dynamo.reset()
    network = StreamStack(
        [HyperConnections(nn.Linear(WIDTH, WIDTH), WIDTH, layer_index=i) for i in range(4)], block_length=block_length
    )
    x = torch.randn(3, WIDTH)
    expected = network(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    derived = torch.autograd.grad(compiled.square().sum(), list(network.parameters()))
    torch.testing.assert_close(derived, gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.export.export(network, (x,)).module()(x), expected)
    twin = copy.deepcopy(network)
    torch.testing.assert_close(twin(x), expected)
    assert twin.block_length == block_length
    assert [*network.state_dict()][:4] == [f"layers.0.{name}" for name in ("phi", "alpha", "bias", "branch.weight")]


@pytest.mark.parametrize("block_length", [1, 2])
def test_autocast_leaves_maps_and_streams_in_float32(block_length):
    network = stack(None, block_length).float()
    x = torch.randn(3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = network(x), in_turn(network, x)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_bytes_that_are_kept_of_a_layer(block_length):
    def make(block_length):
        branches = [nn.Linear(128, 128, bias=False) for _ in range(8)]
        layers = [HyperConnections(branch, 128, layer_index=i) for i, branch in enumerate(branches)]
        return StreamStack(layers, block_length=block_length)

    check_stack(make, block_length, depth=8, tokens=64, width=128, n=4)


def test_the_saved_tensors_of_a_layer_are_its_streams_its_output_and_numbers_of_the_maps():
    tokens, width, n = 64, 128, 4
    layers = [HyperConnections(nn.Identity(), width, layer_index=i) for i in range(6)]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network = StreamStack(layers, n)
        network(torch.randn(tokens, width, dtype=torch.bfloat16))
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    least = 6 * tokens * 2 * (n + 1) * width
    assert least <= sum(kept.values()) <= least + 6 * tokens * 4 * (n * n + 2 * n + 60)


@pytest.mark.parametrize(("checkpointing", "block_length"), [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_a_decoder_by_boundaries_is_the_decoder_of_layers(checkpointing, block_length):
    config = DecoderConfig(11, features=8, mlp_features=12, depth=3, num_heads=2)
    torch.manual_seed(0)
    model = Decoder(config, "streams", streams=3, use_checkpointing=checkpointing, block_length=block_length).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, 11, (2, 7))

    def run():
        loss = model.loss(tokens)
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    ours = run()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: None)  # layer by layer, then
    assert_same(ours, run())


def test_optimal_block_length():
    assert [optimal_block_length(4, depth) for depth in (1, 24, 30, 60)] == [1, 4, 5, 6]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="block_length must be at least 1, got 0"):
        StreamStack([], block_length=0)
    with pytest.raises(ValueError, match="block_length is of use to connection='streams' alone, got 2"):
        Decoder(DecoderConfig(5, features=4, mlp_features=6, depth=1, num_heads=2), block_length=2)
    network = stack(StreamConfig(2, single_pass=True))
    with pytest.raises(ValueError, match=r"config\.single_pass must be False here, got True"):
        network(torch.ones(2, WIDTH, dtype=torch.float64))
