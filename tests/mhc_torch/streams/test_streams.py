import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mhc_torch import streams
from mhc_torch.nn.hyper_connections import HyperConnections, StreamHead
from mhc_torch.streams import StreamConfig
from mhc_torch.streams.starts import STARTS
from tests import streams_reference as reference

CONSTRAINTS = ["sinkhorn", "permutations", "kronecker", "none", "identity"]
CONFIGS = [
    *(StreamConfig(n, constraint) for n, constraint in itertools.product([1, 3, 4], CONSTRAINTS[:-1])),
    *(StreamConfig(constraint=constraint, dynamic=False) for constraint in CONSTRAINTS),
    StreamConfig(16),
    StreamConfig(12, "kronecker"),
    StreamConfig(iterations=3, epsilon=1e-3, norm_epsilon=0.1),
    # What public models do otherwise.
    StreamConfig(3, order="rows", iterations=2, epsilon=1e-3, pre_epsilon=0.05),
    StreamConfig(3, "permutations", post_scale=0.7, post_epsilon=0.1, norm="rms_outside", norm_epsilon=0.3),
    StreamConfig(3, "identity", norm="streams", norm_epsilon=0.1),
]


class Branch(nn.Module):
    def forward(self, x):
        return torch.tanh(1.5 * x)


def random_layer(config, width=5, branch=None, dtype=torch.float64):
    """A layer whose H_res is far from symmetric."""
    torch.manual_seed(0)
    layer = HyperConnections(branch or Branch(), width, config=config).to(dtype)
    for parameter in (layer.phi, layer.alpha, layer.bias):
        if parameter is not None:
            nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_layer_is_the_equation_of_the_paper(config):
    layer = random_layer(config)
    x = torch.randn(3, config.streams, 5, dtype=torch.float64)
    parameters = (None if p is None else p.detach().numpy() for p in (layer.phi, layer.alpha, layer.bias))
    expected = reference.layer(*parameters, x.numpy(), lambda h: np.tanh(1.5 * h), **reference.options(config))
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_new_float64_network_is_the_residual_network_in_float64(constraint, start):
    """In float64 to the accuracy of float64, though streams are read unevenly and H_res mixes them."""
    x = torch.randn(2, 5, dtype=torch.float64)
    expected, wide = x, streams.expand(x, 3)
    for index in range(4):
        layer = HyperConnections(Branch(), 5, streams=3, constraint=constraint, start=start, layer_index=index)
        layer.double().reset_parameters()
        expected, wide = expected + Branch()(expected), layer(wide)
    torch.testing.assert_close(streams.reduce(wide), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("constraint", ["sinkhorn", "permutations", "kronecker"])
def test_mixed_maps_of_streams_learn(constraint):
    """H_res moves as the other maps do; with the start "identity" it hardly leaves it."""
    moved = {}
    for start in STARTS:
        torch.manual_seed(0)
        layers = nn.ModuleList(
            HyperConnections(nn.Linear(6, 6), 6, constraint=constraint, start=start, layer_index=i) for i in range(4)
        )
        before = [layer.resting_maps().res for layer in layers]
        optimizer = torch.optim.Adam([p for layer in layers for p in layer.parameters(recurse=False)], lr=0.02)
        x, y = torch.randn(32, 6), torch.randn(32, 6)
        for _ in range(30):
            wide = streams.expand(x, 4)
            for layer in layers:
                wide = layer(wide)
            optimizer.zero_grad()
            (streams.reduce(wide) - y).square().mean().backward()
            optimizer.step()
        moved[start] = max(
            (layer.resting_maps().res - old).abs().max().item() for layer, old in zip(layers, before, strict=True)
        )
    assert moved["mixed"] > 0.03
    assert moved["identity"] < 0.01


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_agree_with_finite_differences(config):
    layer = random_layer(config, width=3)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, config.streams, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_second_derivatives_agree_with_finite_differences(constraint):
    layer = random_layer(StreamConfig(2, constraint, iterations=3, epsilon=1e-3), width=2)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_new_network_is_the_residual_network(n, constraint):
    torch.manual_seed(0)
    config = StreamConfig(n, constraint)
    residual = torch.randn(6, 8)
    wide = streams.expand(residual, n)
    for layer in range(7):
        branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        residual = residual + branch(residual)
        wide = HyperConnections(branch, 8, config=config, layer_index=layer)(wide)
    torch.testing.assert_close(streams.reduce(wide), residual, atol=5e-6, rtol=0)
    torch.testing.assert_close(streams.reduce(wide, "sum"), n * residual, atol=5e-5, rtol=0)
    torch.testing.assert_close(StreamHead(8, config=config)(wide), residual, atol=5e-6, rtol=0)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_maps_of_bfloat16_streams_are_computed_in_float32(constraint):
    layer = random_layer(StreamConfig(4, constraint), width=64, dtype=torch.float32)
    x = torch.randn(3, 4, 64).bfloat16().requires_grad_()
    parameters = layer.phi, layer.alpha, layer.bias
    for low, high in zip(
        streams.maps(*parameters, x, layer.config), streams.maps(*parameters, x.float(), layer.config), strict=True
    ):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, high, rtol=1e-6, atol=0)
    result = layer(x)
    result.sum().backward()
    assert result.dtype == x.grad.dtype == torch.bfloat16
    assert layer.phi.grad.dtype == torch.float32


def test_autocast_leaves_maps_and_streams_in_float32():
    layer = random_layer(StreamConfig(4), width=8, branch=nn.Linear(8, 8), dtype=torch.float32)
    x = torch.randn(3, 4, 8)
    exact = layer(x)
    maps = streams.maps(layer.phi, layer.alpha, layer.bias, x, layer.config)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x)
        under_autocast = streams.maps(layer.phi, layer.alpha, layer.bias, x, layer.config)
    assert result.dtype == torch.float32
    for low, high in zip(under_autocast, maps, strict=True):
        torch.testing.assert_close(low, high, rtol=0, atol=0)
    torch.testing.assert_close(result, exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph_exports_and_copies(constraint):
    layer = random_layer(StreamConfig(4, constraint, iterations=3), dtype=torch.float32)
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), x)[0], gradient)
    torch.testing.assert_close(torch.export.export(layer, (x.detach(),)).module()(x.detach()), expected)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)


def test_backward_keeps_the_streams_once():
    layer = HyperConnections(nn.Identity(), 64, streams=4)
    x = torch.randn(32, 4, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in parameters)
    # The streams, the branch's output (a quarter of them) and some numbers a token.
    assert 32 * 4 * 64 * 2 <= total <= 32 * (5 * 64 * 2 + 4 * 150)


def test_bad_input_is_refused():
    layer = HyperConnections(nn.Identity(), 8, streams=4)
    x = torch.ones(3, 4, 8)
    with pytest.raises(ValueError, match=r"streams must have shape \(..., 4, width\), got \(3, 8\)"):
        layer(torch.ones(3, 8))
    with pytest.raises(
        ValueError,
        match=r"phi must have shape \(36, 24\) .* width 9, got \(32, 24\): it was made for width 8",
    ):
        layer(torch.ones(3, 4, 9))
    with pytest.raises(TypeError, match=r"floating dtype, got torch.int64"):
        layer(x.long())
    with pytest.raises(ValueError, match=r"keep the shape of its input \(3, 8\), its output has \(3, 4\)"):
        HyperConnections(nn.Linear(8, 4), 8)(x)
    with pytest.raises(TypeError, match=r"fit into the streams, torch.bfloat16, and has torch.float32"):
        streams.write(x.bfloat16(), x[:, 0], torch.ones(3, 4), torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="streams must be between 1 and 16, got 0"):
        HyperConnections(nn.Identity(), 8, streams=0)
    with pytest.raises(ValueError, match="streams must be at least 1, got 0"):
        streams.expand(x, 0)
    with pytest.raises(ValueError, match=r"streams must have shape \(..., 4, width\), got \(3, 2, 16\)"):
        StreamHead(8)(torch.ones(3, 2, 16))
    with pytest.raises(ValueError, match=r"phi must have shape \(36, 4\) for streams of width 9, got \(32, 4\)"):
        StreamHead(8)(torch.ones(3, 4, 9))
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        HyperConnections(nn.Identity(), 0)
    with pytest.raises(ValueError, match="7! permutations"):
        StreamConfig(7, "permutations")
    with pytest.raises(ValueError, match="how must be 'mean' or 'sum'"):
        streams.reduce(x, "max")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e13, 1e19, 1e25, 1e36])
@pytest.mark.parametrize("transform", [False, True])
def test_streams_whose_squares_leave_float32(dtype, scale, transform):
    layer = random_layer(StreamConfig(3), dtype=torch.float32)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(4, 3, 5)
    x[1:] *= scale  # and one token that needs no scale
    x = x.to(dtype)
    found = streams.maps(layer.phi, layer.alpha, layer.bias, x, layer.config)
    wanted = streams.maps(exact.phi, exact.alpha, exact.bias, x.double(), layer.config)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)

    def gradients(layer, x):
        def loss(x, phi, alpha, bias):
            maps = streams.maps(phi, alpha, bias, x, layer.config)
            return maps.pre[..., 0].sum() + maps.res[..., 0, 1].sum()

        arguments = (x, layer.phi, layer.alpha, layer.bias)
        if transform:
            return torch.func.grad(loss, argnums=(0, 1, 2, 3))(*(a.detach() for a in arguments))
        x.requires_grad_()
        return torch.autograd.grad(loss(*arguments), arguments)

    error = 1e-4 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(gradients(layer, x), gradients(exact, x.detach().double()), strict=True):
        torch.testing.assert_close(ours.double() * scale, theirs * scale, rtol=error, atol=error)


@pytest.mark.parametrize("config", [*CONFIGS[:12], *CONFIGS[-3:]], ids=str)
def test_transforms_of_torch_func(config):
    layer = random_layer(config, width=3)
    x, tangent = torch.randn(2, 4, config.streams, 3, dtype=torch.float64).unbind()

    def loss(x):
        return layer(x).square().sum()

    expected = layer(x)
    torch.testing.assert_close(torch.func.vmap(lambda row: layer(row))(x), expected)
    (gradient,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), gradient)
    _, change = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(change, (gradient * tangent).sum())
    (second,) = torch.autograd.grad((gradient * tangent).sum(), leaf)
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss), (x,), (tangent,))[1], second)
    head = StreamHead(3, config=config).double()
    torch.testing.assert_close(torch.func.vmap(head)(x), head(x))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0)])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_one_token_and_none(lead, constraint):
    layer = random_layer(StreamConfig(3, constraint))
    x = torch.randn(*lead, 3, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(y.square().sum(), leaves)
    assert y.shape == x.shape
    assert [g.shape for g in gradients] == [p.shape for p in leaves]
    batch = x[None].detach().requires_grad_()
    expected = torch.autograd.grad(layer(batch).square().sum(), [batch, *layer.parameters()])
    torch.testing.assert_close(gradients, (expected[0][0], *expected[1:]))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_shapes_alone_on_the_meta_device(constraint):
    layer = random_layer(StreamConfig(3, constraint), dtype=torch.float32).to("meta")
    x = torch.empty(2, 3, 5, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert StreamHead(5, streams=3).to("meta")(x).shape == (2, 5)


def test_streams_that_torch_cannot_add_are_refused():
    layer = HyperConnections(nn.Identity(), 8)
    with pytest.raises(TypeError, match=r"streams must be bfloat16 or wider, got torch\.float8_e4m3fn"):
        layer(torch.ones(3, 4, 8).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="streams must be a tensor, got float"):
        layer(1.0)
