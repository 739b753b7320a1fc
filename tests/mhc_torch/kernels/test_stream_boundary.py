"""Triton's kernels of streams in its interpreter, against the equations in float64, token by token and by autograd."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mhc_torch.kernels import stream_boundary as kernels
from mhc_torch.nn import HyperConnections
from mhc_torch.streams import StreamConfig, boundary, read, write
from tests import streams_reference as reference

SHORT = {"iterations": 3}
# Streams, tokens, width, dtype, options: odd sizes, tails of tokens and of features, several programs.
CASES = [
    (4, (7,), 64, torch.float32, {}),
    (4, (2, 17), 40, torch.float32, SHORT),
    (4, (35,), 72, torch.bfloat16, SHORT),
    (2, (5,), 33, torch.float16, SHORT),
    (1, (3, 1), 32, torch.float32, {}),
    (3, (5,), 37, torch.bfloat16, {"order": "rows", "iterations": 4}),
    (5, (3,), 40, torch.float32, SHORT | {"epsilon": 1e-3, "pre_epsilon": 0.1, "post_scale": 1.5}),
    (6, (2,), 32, torch.bfloat16, SHORT | {"order": "rows", "epsilon": 1e-3, "post_epsilon": 0.1}),
    (16, (1,), 32, torch.float32, {"iterations": 1}),
    (4, (3,), 32, torch.float32, {"iterations": 1, "norm_epsilon": 0.1}),
]
DIGITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def example(n, lead, width, dtype):
    """phi, alpha, bias, streams, output, post and res, of which H_res is far from symmetric."""
    torch.manual_seed(n)
    m = n * n + 2 * n
    normal = [torch.randn(*shape) for shape in ((n * width, m), (3,), (m,), (*lead, n, width), (*lead, width))]
    normal[0] /= (n * width) ** 0.5
    maps = [torch.randn(*lead, n), torch.randn(*lead, n, n)]
    return [*normal[:3], *(tensor.to(dtype) for tensor in normal[3:]), *maps]


def equations(phi, alpha, bias, streams, output, post, res, config, *, reading=True):
    """What a boundary is, by operations that autograd follows, in the dtype of the arguments."""
    new = streams
    if output is not None:
        new = (streams if res is None else res @ streams) + post[..., None] * output[..., None, :]
    if not reading:
        return (new,)
    n, flat = config.streams, new.flatten(-2)
    normed = flat / (flat.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt()
    logits = normed @ phi * alpha[[0] * n + [1] * n + [2] * n * n] + bias
    pre = torch.sigmoid(logits[..., :n]) + config.read_epsilon
    following = config.post_scale * torch.sigmoid(logits[..., n : 2 * n]) + config.post_epsilon
    matrix = logits[..., 2 * n :].unflatten(-1, (n, n))
    first, second = (-2, -1) if config.order == "columns" else (-1, -2)
    matrix = torch.softmax(matrix, first) + config.epsilon
    matrix = matrix / (matrix.sum(second, keepdim=True) + config.epsilon)
    for _ in range(config.iterations - 1):
        for axis in (first, second):
            matrix = matrix / (matrix.sum(axis, keepdim=True) + config.epsilon)
    return new, (pre[..., None] * new).sum(-2), following, matrix


def leaves(tensors, dtype=None):
    return [None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]


def agree(results, expected, digits):
    for found, exact in zip(results, expected, strict=True):
        assert found.shape == exact.shape
        error = (found.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max().clamp(min=1e-3)
        assert error < digits


def compare(function, exact, arguments, digits):
    """Values, and gradients of the same cotangents."""
    inputs, doubles = leaves(arguments), leaves(arguments, torch.float64)
    results, expected = function(*inputs), exact(*doubles)
    agree(results, expected, digits)
    torch.manual_seed(1)
    cotangents = [torch.randn_like(result) for result in results]
    torch.autograd.backward(results, cotangents)
    torch.autograd.backward(expected, [cotangent.double() for cotangent in cotangents])
    present = [(i, d) for i, d in zip(inputs, doubles, strict=True) if i is not None]
    assert all(i.grad.dtype == i.dtype for i, _ in present)
    agree(*zip(*((i.grad, d.grad) for i, d in present), strict=True), digits)


@pytest.mark.parametrize(("n", "lead", "width", "dtype", "options"), CASES)
def test_a_boundary_is_the_equations_and_so_are_its_gradients(n, lead, width, dtype, options):
    config = StreamConfig(n, **options)

    def by_kernels(*arguments):
        return boundary(*arguments, config, implementation="triton")

    compare(by_kernels, lambda *a: equations(*a, config), example(n, lead, width, dtype), DIGITS[dtype])


def test_a_boundary_is_the_reference_token_by_token():
    config = StreamConfig(4)
    arguments = example(4, (3,), 32, torch.float32)
    new, x, post, res = boundary(*arguments, config, implementation="triton")
    phi, alpha, bias, streams, output, old_post, old_res = (a.double().numpy() for a in arguments)
    for t in range(3):
        merged = old_res[t] @ streams[t] + np.outer(old_post[t], output[t])
        pre, following, residual = reference.maps(phi, alpha, bias, merged, **reference.options(config))
        for found, exact in zip((new, x, post, res), (merged, pre @ merged, following, residual), strict=True):
            np.testing.assert_allclose(found[t], exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixes", [True, False])
def test_a_write_is_the_equation(n, dtype, mixes):
    config = StreamConfig(n)
    *_, streams, output, post, res = example(n, (3,), 40, dtype)

    def by_kernels(*arguments):
        return (write(*arguments, implementation="triton"),)

    def exact(*arguments):
        return equations(None, None, None, *arguments, config, reading=False)

    compare(by_kernels, exact, [streams, output, post, res if mixes else None], DIGITS[dtype])


@pytest.mark.parametrize(("n", "dtype"), [(3, torch.bfloat16), (6, torch.float32)])
def test_a_read_is_the_equations(n, dtype):
    config = StreamConfig(n, **SHORT)

    def by_kernels(*arguments):
        return read(*arguments, config, implementation="triton")

    def exact(*arguments):
        return equations(*arguments, None, None, None, config)[1:]

    compare(by_kernels, exact, example(n, (3,), 40, dtype)[:4], DIGITS[dtype])


def test_a_boundary_that_mixes_nothing():
    config = StreamConfig(4, **SHORT)

    def by_kernels(*arguments):
        return boundary(*arguments, None, config, implementation="triton")

    *arguments, _ = example(4, (3,), 40, torch.float32)
    compare(by_kernels, lambda *a: equations(*a, None, config), arguments, DIGITS[torch.float32])


@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_sinkhorn_bears_logits_of_any_size(order, epsilon):
    config = StreamConfig(3, epsilon=epsilon, order=order)
    arguments = example(3, (2,), 32, torch.float32)
    arguments[2] = arguments[2] * 60
    inputs = leaves(arguments)
    results = boundary(*inputs, config, implementation="triton")
    agree(results, equations(*(a.double() for a in arguments), config), 1e-4 if epsilon else 2e-3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad([r.sum() for r in results], inputs))


def test_tensors_need_not_lie_side_by_side():
    config = StreamConfig(4, **SHORT)
    arguments = example(4, (3,), 32, torch.float32)
    apart = [torch.stack([a, a], -1)[..., 0] for a in arguments]
    assert not any(a.is_contiguous() for a in apart)
    for found, exact in zip(
        boundary(*apart, config, implementation="triton"),
        boundary(*arguments, config, implementation="triton"),
        strict=True,
    ):
        torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_of_no_tokens_there_is_nothing():
    config = StreamConfig(4)
    inputs = leaves(example(4, (2, 0), 32, torch.float32))
    results = boundary(*inputs, config, implementation="triton")
    assert [tuple(r.shape) for r in results] == [(2, 0, 4, 32), (2, 0, 32), (2, 0, 4), (2, 0, 4, 4)]
    gradients = torch.autograd.grad([r.sum() for r in results], inputs)
    assert not any(gradient.any() for gradient in gradients)


def layer():
    """Of few streams: Triton's interpreter takes its time."""
    torch.manual_seed(0)
    made = HyperConnections(nn.Linear(32, 32), 32, streams=2, iterations=2, implementation="triton")
    for parameter in (made.phi, made.alpha, made.bias):
        nn.init.normal_(parameter)
    return made


def by_torch(made):
    made = copy.deepcopy(made)
    made.implementation = "torch"
    return made


def gradients_of(function, module, x):
    return torch.autograd.grad(function(x).square().sum(), [x, *module.parameters()])


def test_a_layer_by_kernels_is_the_layer_by_torch():
    made, other = layer(), by_torch(layer())
    x = torch.randn(3, 2, 32, requires_grad=True)
    torch.testing.assert_close(made(x), other(x))
    torch.testing.assert_close(gradients_of(made, made, x), gradients_of(other, other, x), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_a_layer_compiles_as_one_graph_exports_and_is_recomputed():
    made = layer()
    x = torch.randn(3, 2, 32, requires_grad=True)
    expected, gradients = made(x), gradients_of(made, made, x)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    again = gradients_of(compiled, made, x)
    torch.testing.assert_close(again, gradients)
    torch.testing.assert_close(torch.export.export(made, (x.detach(),)).module()(x.detach()), expected)

    def recomputed(x):
        return checkpoint(made, x, use_reentrant=False)

    torch.testing.assert_close(gradients_of(recomputed, made, x), gradients)


def test_autocast_is_of_the_branch_alone():
    made = layer()
    x = torch.randn(3, 2, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, exact = made(x), by_torch(made)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_second_derivatives_are_those_of_torch():
    made = layer()
    x = torch.randn(2, 2, 32, requires_grad=True)

    def penalty(module):
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(penalty(made), penalty(by_torch(made)), rtol=1e-3, atol=1e-2)


def test_vmap_goes_by_the_form_of_torch():
    made = layer()
    made.implementation = None
    x = torch.randn(2, 3, 2, 32)
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x))


def test_the_operators_keep_the_rules_of_torch():
    config = StreamConfig(2, iterations=2)
    phi, alpha, bias, *old = leaves(example(2, (2,), 32, torch.float32))
    torch.library.opcheck(kernels._forward, (*old, phi, alpha, bias, kernels._settings(config)))
    torch.library.opcheck(kernels._forward, (*old[:3], None, None, None, None, []))


def test_launches_are_counted(monkeypatch):
    names = []

    def count(kernel, *rest):
        names.append(kernel.fn.__name__)
        launch(kernel, *rest)

    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", count)
    config = StreamConfig(2, iterations=1)
    inputs = leaves(example(2, (2,), 32, torch.float32))
    results = boundary(*inputs, config, implementation="triton")
    assert names == ["boundary_forward", "maps_forward"]
    names.clear()
    torch.autograd.grad([r.sum() for r in results], inputs)
    assert names == ["maps_backward", "boundary_backward", "parameters_backward"]


@pytest.mark.parametrize(
    ("options", "width", "reason"),
    [
        ({"constraint": "kronecker"}, 32, "constraint='kronecker', only for 'sinkhorn'"),
        ({"norm": "streams"}, 32, "norm='streams', only for 'rms'"),
        ({"dynamic": False}, 32, "maps that are not dynamic"),
        ({}, 24, "a width of 24, only for 32 to 16384"),
    ],
)
def test_what_kernels_lack_is_said(options, width, reason):
    made = HyperConnections(nn.Identity(), width, implementation="triton", **options)
    with pytest.raises(ValueError, match=rf"nothing for {reason}; implementation='torch' can"):
        made(torch.ones(2, 4, width))
    made.implementation = None
    assert made(torch.ones(2, 4, width)).shape == (2, 4, width)
