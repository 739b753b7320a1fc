"""The boundary of streams: the equations, and `write` followed by `read`."""

import numpy as np
import pytest
import torch

from mhc_torch import streams
from mhc_torch.streams import StreamConfig, boundary, read, write
from tests import streams_reference as reference

CONFIGS = [
    StreamConfig(4),
    StreamConfig(3, iterations=3, epsilon=1e-3, norm_epsilon=0.1),
    StreamConfig(1, iterations=1),
    StreamConfig(3, "permutations"),
    StreamConfig(4, "kronecker"),
    StreamConfig(2, "none"),
    StreamConfig(2, dynamic=False),
    StreamConfig(16, "kronecker"),
    StreamConfig(16, iterations=2),
    StreamConfig(3, "identity", pre_epsilon=0.1, post_scale=0.7, post_epsilon=0.1),
    StreamConfig(3, "identity", dynamic=False),
    StreamConfig(3, order="rows", iterations=2, norm="rms_outside", norm_epsilon=0.3),
    StreamConfig(3, "identity", norm="streams"),
]


def example(config, lead, width, dtype=torch.float64):
    """Arguments of a boundary, and cotangents of what it returns. H_res is far from symmetric."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, features = config.streams, config.streams * width
    maps = (normal(features, config.logits) / features**0.5, normal(3)) if config.dynamic else (None, None)
    shapes = (*lead, n, width), (*lead, width), (*lead, n), (*lead, n, n)
    x, y, post, res = (normal(*shape) for shape in shapes)
    *cotangents, d_res = (normal(*shape) for shape in shapes)
    if config.constraint == "identity":  # None is H_res as the branch before has it, too
        res = d_res = None
    arguments, cotangents = (*maps, normal(config.logits), x, y, post, res), (*cotangents, d_res)
    wide = {3, 4} | {0, 1}  # positions of streams and output among the arguments, and among the cotangents

    def cast(tensors, positions):
        low = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        return tuple(None if t is None else t.to(dtype if i in positions else low) for i, t in enumerate(tensors))

    return cast(arguments, wide - {0, 1}), cast(cotangents, {0, 1})


def composed(phi, alpha, bias, x, y, post, res, config):
    new = write(x, y, post, res)
    return new, *read(phi, alpha, bias, new, config)


def some(tensors):
    return [tensor for tensor in tensors if tensor is not None]


def value_and_gradients(function, config, arguments, cotangents):
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in arguments]
    results = some(function(*leaves, config))
    return results, torch.autograd.grad(results, some(leaves), some(cotangents))


def equations(phi, alpha, bias, x, y, post, res, config):
    """Token by token, index by index."""
    if mixes := res is not None:
        results = [np.empty(a.shape) for a in (x, y, post, res)]
    else:
        results, res = [np.empty(a.shape) for a in (x, y, post)], np.tile(np.eye(len(x[0])), (len(x), 1, 1))
    for t in range(len(x)):
        n = len(x[t])
        new = np.array([post[t, i] * y[t] + sum(res[t, i, j] * x[t, j] for j in range(n)) for i in range(n)])
        pre, next_post, next_res = reference.maps(phi, alpha, bias, new, **reference.options(config))
        for result, value in zip(results, (new, pre @ new, next_post, next_res), strict=mixes):
            result[t] = value
    return results


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_boundary_and_gradients_are_those_of_the_equations(config):
    arguments, cotangents = example(config, (2,), 3)
    results, gradients = value_and_gradients(boundary, config, arguments, cotangents)

    def by_hand(tensors):
        return equations(*(None if t is None else t.numpy() for t in tensors), config)

    for result, expected in zip(results, by_hand(arguments), strict=True):
        np.testing.assert_allclose(result.detach(), expected, rtol=1e-12, atol=1e-12)
    directions = [None if a is None else torch.randn_like(a) for a in arguments]

    def moved(step):
        values = by_hand([a if a is None else a + step * d for a, d in zip(arguments, directions, strict=True)])
        return sum((c.numpy() * v).sum() for c, v in zip(some(cotangents), values, strict=True))

    slope = sum((g * d).sum().item() for g, d in zip(gradients, some(directions), strict=True))
    assert slope == pytest.approx((moved(1e-5) - moved(-1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_write_and_then_read(config):
    arguments, cotangents = example(config, (2, 3), 7)
    ours, theirs = (value_and_gradients(f, config, arguments, cotangents) for f in (boundary, composed))
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


@pytest.mark.parametrize("config", [StreamConfig(2, iterations=3), *CONFIGS[5:7], *CONFIGS[-4:]], ids=str)
def test_second_derivatives_agree_with_finite_differences(config):
    arguments, _ = example(config, (2,), 2)
    arguments = [None if a is None else a.requires_grad_() for a in arguments]

    def run(*tensors):
        given = iter(tensors)
        return tuple(some(boundary(*(None if a is None else next(given) for a in arguments), config)))

    assert torch.autograd.gradgradcheck(run, some(arguments), fast_mode=True)


def test_second_derivatives_where_one_argument_depends_on_another():
    config = StreamConfig(2, iterations=2)
    (phi, alpha, bias, x, y, post, res), _ = example(config, (3,), 2)
    x = x.requires_grad_()

    def gradient(function):
        new, h, *_ = function(phi, alpha, bias, x, x.sum(1) * y, post, res, config)
        (first,) = torch.autograd.grad(new.square().sum() + h.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(gradient(boundary), gradient(composed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [CONFIGS[1], *CONFIGS[5:7], *CONFIGS[-3:]], ids=str)
def test_transforms_of_torch_func(config):
    arguments, _ = example(config, (3,), 4)
    maps, (x, y, post, res) = arguments[:3], arguments[3:]

    def loss(x):
        return sum(result.square().sum() for result in some(boundary(*maps, x, y, post, res, config)))

    (expected,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    _, change = torch.func.jvp(loss, (x,), (x.sin(),))
    torch.testing.assert_close(change, (expected * x.sin()).sum())
    in_dims = 0, 0, 0, None if res is None else 0
    mapped = torch.func.vmap(lambda *old: tuple(some(boundary(*maps, *old, config))), in_dims)(x, y, post, res)
    for a, b in zip(mapped, some(boundary(*arguments, config)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_have_maps_in_float32(dtype):
    config = StreamConfig(3)
    low = value_and_gradients(boundary, config, *example(config, (2, 5), 24, dtype))
    exact = value_and_gradients(boundary, config, *(
        tuple(None if t is None else t.double() for t in tensors) for tensors in example(config, (2, 5), 24, dtype)
    ))  # fmt: skip
    kinds = [dtype, dtype, torch.float32, torch.float32]
    assert [result.dtype for result in low[0]] == kinds
    assert [g.dtype for g in low[1]] == [torch.float32] * 3 + kinds
    for a, b in zip([*low[0], *low[1]], [*exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-2 * b.abs().max().item())


def test_what_arrives_at_the_streams_is_summed_before_it_is_rounded():
    # What arrives from the streams behind and from the branch cancels to a 200th, which a rounded summand would bury.
    config = StreamConfig(2, iterations=1, norm_epsilon=1.0)
    (phi, alpha, bias, x, y, post, res), (_, d_input, d_post, d_res) = example(config, (4,), 24, torch.bfloat16)
    pre = streams.maps(phi * 0, alpha, bias, x, config).pre
    d_new = (-pre[..., None] * d_input[..., None, :].float()).bfloat16()
    arguments, cotangents = (phi * 0, alpha, bias, x, y, post, res), (d_new, d_input, d_post * 0, d_res * 0)
    _, gradients = value_and_gradients(boundary, config, arguments, cotangents)
    exact = [tuple(tensor.double() for tensor in tensors) for tensors in (arguments, cotangents)]
    _, expected = value_and_gradients(boundary, config, *exact)
    for a, b in zip(gradients[3:5], expected[3:5], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize("scale", [1e13, 1e19, 1e25, 1e36])
def test_streams_whose_squares_leave_float32(scale):
    config = StreamConfig(3)
    (phi, alpha, bias, x, y, post, res), (d_new, d_input, *rest) = example(config, (4,), 5, torch.float32)
    x, y = x * scale, y * scale
    x[0], y[0] = x[0] / scale, y[0] / scale  # and one token that is no other than most are
    arguments, cotangents = (phi, alpha, bias, x, y, post, res), (d_new / scale, d_input / scale, *rest)
    ours = value_and_gradients(boundary, config, arguments, cotangents)
    exact = [tuple(tensor.double() for tensor in tensors) for tensors in (arguments, cotangents)]
    theirs = value_and_gradients(boundary, config, *exact)
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        for found, wanted in zip(a.double(), b, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_autocast_changes_nothing():
    config = StreamConfig(3)
    arguments, cotangents = example(config, (4,), 5, torch.float32)
    exact = value_and_gradients(boundary, config, arguments, cotangents)
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(boundary, config, arguments, cotangents)
    for a, b in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS[1:8:2] + CONFIGS[-2:], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_compiles_as_one_graph_and_exports(config):
    arguments, cotangents = example(config, (2, 3), 7, torch.float32)
    expected, gradients = value_and_gradients(boundary, config, arguments, cotangents)
    torch._dynamo.reset()
    compiled = torch.compile(boundary, fullgraph=True, backend="aot_eager")
    results, derived = value_and_gradients(compiled, config, arguments, cotangents)
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(derived, gradients, rtol=1e-4, atol=1e-5)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return tuple(some(boundary(*tensors, config)))

    exported = torch.export.export(Module(), arguments).module()(*arguments)
    torch.testing.assert_close(list(exported), [result.detach() for result in expected])


@pytest.mark.parametrize(
    "config", [StreamConfig(4), StreamConfig(4, "identity"), *CONFIGS[6:7], *CONFIGS[-2:]], ids=str
)
def test_backward_keeps_the_streams_the_output_and_numbers_of_the_maps(config):
    (phi, alpha, bias, x, y, post, res), _ = example(config, (16,), 256, torch.bfloat16)
    arguments = [None if a is None else a.requires_grad_() for a in (phi, alpha, bias, x, y, post, res)]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = boundary(*arguments, config)
    for tensor in (phi, alpha, bias, x, y):
        if tensor is not None:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert results[0].untyped_storage().data_ptr() not in kept
    assert sum(kept.values()) <= 16 * 4 * 200


def test_what_does_not_fit_is_refused():
    config = StreamConfig(2)
    (phi, alpha, bias, x, y, post, res), _ = example(config, (3,), 4, torch.float32)
    given = {"phi": phi, "alpha": alpha, "bias": bias, "streams": x, "output": y, "post": post, "res": res}
    for change, error, message in (
        ({"output": torch.ones(3, 5)}, ValueError, r"its input \(3, 4\), its output has \(3, 5\)"),
        ({"streams": x.bfloat16()}, TypeError, "fit into the streams, torch.bfloat16, and has torch.float32"),
        ({"post": torch.ones(3, 3)}, ValueError, r"shapes \(3, 2\) and \(3, 2, 2\), got \(3, 3\)"),
        ({"res": torch.ones(3, 2)}, ValueError, r"got \(3, 2\) and \(3, 2\)"),
        ({"streams": torch.ones(3, 3, 4)}, ValueError, r"streams must have shape \(..., 2, width\)"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(8,\), got \(3,\)"),
        ({"implementation": "xla"}, ValueError, "implementation must be 'torch', 'triton' or None, got 'xla'"),
        ({"implementation": "triton"}, ValueError, "implementation='triton' cannot run: .*'torch' can"),
        ({"config": StreamConfig(2, single_pass=True)}, ValueError, "config.single_pass must be False here, got True"),
    ):
        with pytest.raises(error, match=message):
            boundary(**{"config": config} | given | change)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0)])
def test_one_token_and_none(lead):
    config = StreamConfig(3)
    arguments, cotangents = example(config, lead, 4)
    results, gradients = value_and_gradients(boundary, config, arguments, cotangents)
    assert [r.shape for r in results] == [c.shape for c in cotangents]
    assert [g.shape for g in gradients] == [a.shape for a in arguments]


def test_shapes_alone_on_the_meta_device():
    config = StreamConfig(3)
    arguments, _ = example(config, (2,), 4, torch.float32)
    moved = [a.to("meta").requires_grad_() for a in arguments]
    sum(result.sum() for result in boundary(*moved, config)).backward()
    assert [a.grad.shape for a in moved] == [a.shape for a in arguments]
