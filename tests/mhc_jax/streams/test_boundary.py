"""The boundary of streams: the equations, `write` followed by `read`, and its kernels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from mhc_jax import streams
from mhc_jax.kernels import stream_boundary as kernels
from mhc_jax.kernels import stream_boundary_gpu as gpu_kernels
from mhc_jax.streams import StreamConfig, StreamParams, boundary, flat_boundary
from tests import streams_reference as reference
from tests.lowering import lowered_for

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
    StreamConfig(3, order="rows", iterations=2, norm="rms_outside", norm_epsilon=0.3),
    StreamConfig(3, "identity", norm="streams"),
]


def example(config, lead, width):
    """Arguments of a boundary in float64, and cotangents of what it returns. H_res is far from symmetric."""
    rng = np.random.default_rng(0)
    n, features = config.streams, config.streams * width
    phi, alpha = (
        (rng.normal(size=(features, config.logits)) / features**0.5, rng.normal(size=3))
        if config.dynamic
        else (None, None)
    )
    params = StreamParams(phi, alpha, rng.normal(size=config.logits))
    shapes = (*lead, n, width), (*lead, width), (*lead, n), (*lead, n, n)
    x, y, post, res = (rng.normal(size=shape) for shape in shapes)
    *cotangents, d_res = (rng.normal(size=shape) for shape in shapes)
    if config.constraint == "identity":  # None is H_res as the branch before has it, too
        res = d_res = None
    return (params, x, y, post, res), (*cotangents, d_res)


def composed(params, x, y, post, res, config):
    new = streams.write(x, y, post, res)
    return new, *streams.read(params, new, config)


def fused(params, x, y, post, res, config, implementation=None):
    return boundary(params, x, y, post, res, config, implementation=implementation)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(function, config, arguments, cotangents):
    results, pullback = jax.vjp(lambda *a: function(*a, config), *arguments)
    return results, pullback(cotangents)


def equations(params, x, y, post, res, config):
    """Token by token, index by index."""
    options = reference.options(config)
    if mixes := res is not None:
        results = [np.empty(a.shape) for a in (x, y, post, res)]
    else:
        results, res = [np.empty(a.shape) for a in (x, y, post)], np.tile(np.eye(len(x[0])), (len(x), 1, 1))
    for t in range(len(x)):
        new = np.array(
            [post[t, i] * y[t] + sum(res[t, i, j] * x[t, j] for j in range(len(x[t]))) for i in range(len(x[t]))]
        )
        pre, next_post, next_res = reference.maps(*params, new, **options)
        for result, value in zip(results, (new, pre @ new, next_post, next_res), strict=mixes):
            result[t] = value
    return results


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_boundary_and_gradients_are_those_of_the_equations(config):
    arguments, cotangents = example(config, (2,), 3)
    with jax.enable_x64(True):
        results, gradients = jax.tree.map(np.asarray, value_and_gradients(fused, config, arguments, cotangents))
    for result, expected in zip(jax.tree.leaves(results), equations(*arguments, config), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)

    rng = np.random.default_rng(1)
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), arguments)

    def moved(step):
        values = equations(*jax.tree.map(lambda a, b: a + step * b, arguments, directions), config)
        return sum(np.sum(c * v) for c, v in zip(jax.tree.leaves(cotangents), values, strict=True))

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradients, directions)))
    np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_is_write_and_then_read(config):
    with jax.enable_x64(True):
        arguments, cotangents = example(config, (2, 3), 7)
        ours = value_and_gradients(fused, config, arguments, cotangents)
        theirs = value_and_gradients(composed, config, arguments, cotangents)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


def test_flat_streams_are_the_same():
    config = StreamConfig(2)
    (params, x, y, post, res), _ = jax.tree.map(jnp.float32, example(config, (3,), 4))
    new, *others = flat_boundary(params, x.reshape(3, 8), y, post, res, config)
    expected, *expected_others = boundary(params, x, y, post, res, config)
    np.testing.assert_array_equal(new.reshape(3, 2, 4), expected)
    for a, b in zip(others, expected_others, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def small_tiles(monkeypatch):
    """Kernels cut few tokens and features in many tiles and steps."""
    monkeypatch.setattr(kernels, "TOKENS", 16)
    monkeypatch.setattr(kernels, "FEATURES", 128)
    monkeypatch.setattr(gpu_kernels, "TOKENS", 16)


@pytest.fixture(params=["tpu", "gpu"])
def platform(request, monkeypatch):
    """Whose kernels are interpreted."""
    if request.param == "gpu":
        monkeypatch.setattr(kernels, "forward", gpu_kernels.forward)
        monkeypatch.setattr(kernels, "backward", gpu_kernels.backward)
    return request.param


@pytest.mark.parametrize(
    ("config", "lead", "width", "dtype"),
    [
        (StreamConfig(4, iterations=2), (5, 11), 200, jnp.bfloat16),
        (StreamConfig(3, iterations=2, epsilon=1e-3), (2, 3), 40, jnp.float32),
        (StreamConfig(2, "none"), (33,), 130, jnp.float32),
        (StreamConfig(1, iterations=1), (), 20, jnp.float32),
        (StreamConfig(9, "kronecker"), (3,), 20, jnp.bfloat16),
        (StreamConfig(5, iterations=1), (9,), 40, jnp.float32),
        (StreamConfig(2, "identity", pre_epsilon=0.1, post_scale=0.7), (9,), 20, jnp.float32),
    ],
    ids=str,
)
def test_kernels_compute_the_same(config, lead, width, dtype, small_tiles, platform):
    (params, x, y, post, res), cotangents = jax.tree.map(np.float32, example(config, lead, width))
    arguments = params, jnp.asarray(x, dtype), jnp.asarray(y, dtype), post, res
    cotangents = *(jnp.asarray(c, dtype) for c in cotangents[:2]), *cotangents[2:]
    outcome = value_and_gradients(partial(fused, implementation="pallas"), config, arguments, cotangents)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (arguments, cotangents))
        expected = value_and_gradients(fused, config, *exact)
    error = 1e-2 if dtype == jnp.bfloat16 else 2e-6
    for a, b, like in zip(
        jax.tree.leaves(outcome), jax.tree.leaves(expected), jax.tree.leaves((cotangents, arguments)), strict=True
    ):
        assert a.dtype == like.dtype
        np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=error * np.abs(b).max())


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_what_arrives_at_the_streams_is_summed_before_it_is_rounded(implementation):
    # What arrives from the streams behind and from the branch cancels to a 200th, which a rounded summand would bury.
    config = StreamConfig(2, iterations=1, norm_epsilon=1.0)
    (params, x, y, post, res), (_, d_input, *_) = jax.tree.map(jnp.float32, example(config, (4,), 24))
    params = params._replace(phi=params.phi * 0)
    x, y, d_input = (a.astype(jnp.bfloat16) for a in (x, y, d_input))
    pre, _, _ = streams.maps(params, streams.write(x, y, post, res), config)
    d_new = (-pre[..., None] * d_input[..., None, :].astype(jnp.float32)).astype(jnp.bfloat16)
    arguments, cotangents = (params, x, y, post, res), (d_new, d_input, post * 0, res * 0)
    function = partial(fused, implementation=implementation)
    _, (_, d_streams, d_output, *_) = value_and_gradients(function, config, arguments, cotangents)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (arguments, cotangents))
        _, (_, expected, expected_output, *_) = value_and_gradients(fused, config, *exact)
    for a, b in ((d_streams, expected), (d_output, expected_output)):
        np.testing.assert_allclose(np.float64(a), b, rtol=0, atol=0.02 * np.abs(b).max())


def test_turns_of_the_kernels_do_not_race(small_tiles, monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    checked = pltpu.InterpretParams(detect_races=True)
    for name in ("forward", "backward"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, kernel=kernel, interpret=None, **k: kernel(*a, interpret=checked, **k)
        )
    config = StreamConfig(2, "kronecker")
    (params, x, y, post, res), cotangents = jax.tree.map(jnp.float32, example(config, (64,), 200))
    arguments = params, x, y, post, res
    outcome = value_and_gradients(partial(fused, implementation="pallas"), config, arguments, cotangents)
    expected = value_and_gradients(fused, config, arguments, cotangents)
    for a, b in zip(jax.tree.leaves(outcome), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    assert not interpreter.races.races_found


@pytest.mark.parametrize("config", [StreamConfig(4), StreamConfig(2, "permutations")], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_lower_for_a_tpu_and_a_gpu(dtype, config, small_tiles):
    arguments, cotangents = jax.tree.map(np.float32, example(config, (40,), 200))
    params, x, y, post, res = arguments
    arguments = params, x.astype(dtype), y.astype(dtype), post, res
    cotangents = *(c.astype(dtype) for c in cotangents[:2]), *cotangents[2:]
    function = partial(value_and_gradients, partial(fused, implementation="pallas"), config)
    names = "boundary_forward", "boundary_backward"
    for_tpu, for_gpu = (lowered_for(platform, function, arguments, cotangents) for platform in ("tpu", "cuda"))
    assert all(name in for_tpu and name in for_gpu for name in names)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_backward_keeps_the_streams_the_output_and_numbers_of_the_maps(implementation):
    config = StreamConfig(4, iterations=1)
    (params, x, y, post, res), _ = jax.tree.map(jnp.float32, example(config, (16,), 64))
    _, pullback = jax.vjp(lambda *a: fused(*a, config, implementation), params, x, y, post, res)
    kept = {id(leaf): leaf.size for leaf in jax.tree.leaves(pullback)}
    phi = 4 * 64 * config.logits
    assert sorted(size for size in kept.values() if size > 16 * config.logits) == sorted([x.size, y.size, phi])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": jnp.ones((3, 5))}, ValueError, r"of 2 that is \(3, 4\), its output has \(3, 5\)"),
        (
            {"streams": jnp.ones((3, 2, 4), jnp.bfloat16)},
            TypeError,
            "must fit into the streams, bfloat16, and has float32",
        ),
        ({"post": jnp.ones((3, 3))}, ValueError, r"shapes \(3, 2\) and \(3, 2, 2\), got \(3, 3\)"),
        ({"res": jnp.ones((3, 2))}, ValueError, r"got \(3, 2\) and \(3, 2\)"),
        ({"streams": jnp.ones((3, 3, 4))}, ValueError, r"streams must have shape \(..., 2, width\)"),
        ({"implementation": "triton"}, ValueError, "implementation must be 'xla', 'pallas' or None, got 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    config = StreamConfig(2)
    (params, x, y, post, res), _ = jax.tree.map(jnp.float32, example(config, (3,), 4))
    arguments = {"params": params, "streams": x, "output": y, "post": post, "res": res, "config": config}
    with pytest.raises(error, match=message):
        boundary(**(arguments | change))


def test_what_the_kernels_cannot_do_is_refused():
    config = StreamConfig(6, "permutations")
    (params, *others), _ = jax.tree.map(jnp.float32, example(config, (2,), 4))
    with pytest.raises(ValueError, match=r"at most 1024 logits of all streams, .* got 6 \* 736: use .*kronecker"):
        boundary(params, *others, config, implementation="pallas")
    with jax.enable_x64(True):
        (params, *others), _ = jax.tree.map(jnp.asarray, example(StreamConfig(2), (2,), 4))
        with pytest.raises(TypeError, match="bfloat16 or float32, got float64: use implementation='xla'"):
            boundary(params, *others, StreamConfig(2), implementation="pallas")


def test_no_tokens_and_vmap(platform):
    config = StreamConfig(2, iterations=1)
    (params, *others), _ = jax.tree.map(jnp.float32, example(config, (0,), 4))
    assert boundary(params, *others, config, implementation="pallas")[0].shape == (0, 2, 4)
    (params, *others), _ = jax.tree.map(jnp.float32, example(config, (3, 2), 4))
    mapped = jax.vmap(lambda *a: fused(params, *a, config, "pallas"))(*others)
    for a, b in zip(mapped, fused(params, *others, config), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block_length", [1, 2])
def test_a_scan_over_boundaries_is_the_scan_over_layers(block_length):
    config, depth, width = StreamConfig(3, iterations=3), 4, 6
    rng = np.random.default_rng(0)

    def maps():
        shapes = (3 * width, config.logits), (3,), (config.logits,)
        return StreamParams(*(rng.normal(size=(depth, *shape)) / 4 for shape in shapes))

    functions = (lambda w, h: jnp.tanh(h @ w)), (lambda w, h: h * jnp.sin(h @ w))
    params = [(maps(), rng.normal(size=(depth, width, width))) for _ in functions]
    x, cotangent = rng.normal(size=(2, 7, width))

    def over_boundaries(params, x):
        def layer(params):
            return [
                streams.Connected(partial(function, w), maps, config, "xla")
                for function, (maps, w) in zip(functions, params, strict=True)
            ]

        return streams.apply_branches(layer, params, x, 3, block_length=block_length)

    def over_layers(params, x):
        def layer(params, wide):
            for function, (maps, w) in zip(functions, params, strict=True):
                wide = streams.wrap(partial(function, w), config)(maps, wide)
            return wide

        return streams.reduce(streams.scan_layers(layer, params, streams.expand(x, 3), block_length=block_length))

    outcomes = []
    with jax.enable_x64(True):
        for function in (over_boundaries, over_layers):
            result, pullback = jax.vjp(function, params, x)
            outcomes.append((result, pullback(cotangent)))
            kept = [leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.ndim > 1]
            # The streams of every layer's two branches, or of every second layer once; for the rest branches' outputs.
            wide = [shape for shape in kept if shape[-2:] == (7, 18) or shape[-3:] == (7, 3, width)]
            if function is over_boundaries:
                last = [(7, 3, width)]
                layers = [(4, 7, 3, width)] * 2 if block_length == 1 else [(2, 7, 3, width)]
                assert sorted(wide) == sorted(last + layers)
    for ours, theirs in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("constraint", ["sinkhorn", "identity"])
@pytest.mark.parametrize("block_length", [1, 2])
def test_a_scan_of_a_single_pass_is_the_chain_of_its_layers(block_length, constraint):
    config, depth, width = StreamConfig(3, constraint, iterations=3, single_pass=True), 4, 6
    rng = np.random.default_rng(0)
    shapes = (3 * width, config.logits), (3,), (config.logits,)
    maps = StreamParams(*(rng.normal(size=(depth, *shape)) / 4 for shape in shapes))
    params, (x, cotangent) = (maps, rng.normal(size=(depth, width, width))), rng.normal(size=(2, 7, width))

    def scanned(params, x):
        def layer(params):
            maps, w = params
            return [streams.Connected(lambda h: jnp.tanh(h @ w), maps, config)]

        return streams.apply_branches(layer, params, x, 3, block_length=block_length)

    def chained(params, x):
        wide = streams.expand(x, 3)
        pre = streams.first_read(wide)
        for maps, w in zip(map(StreamParams._make, zip(*params[0], strict=True)), params[1], strict=True):
            wide, pre = streams.single_pass(lambda h, w=w: jnp.tanh(h @ w), config)(maps, wide, pre)
        return streams.collapse(pre, wide)

    with jax.enable_x64(True):
        outcomes = []
        for function in (scanned, chained):
            result, pullback = jax.vjp(function, params, x)
            outcomes.append((result, pullback(cotangent)))
    for ours, theirs in zip(*map(jax.tree.leaves, outcomes), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * max(1, np.abs(theirs).max()))


def test_a_single_pass_is_of_all_branches_or_of_none():
    def layer(maps):
        configs = StreamConfig(2, single_pass=True), StreamConfig(2)
        return [streams.Connected(jnp.tanh, maps, config) for config in configs]

    maps = jax.tree.map(lambda leaf: leaf[None], streams.init_params(StreamConfig(2), 4))
    with pytest.raises(ValueError, match=r"single_pass must be the same of all branches"):
        streams.apply_branches(layer, maps, jnp.ones((3, 4)), 2)


def test_in_a_block_no_branch_runs_twice_though_it_has_the_width_of_all_streams_inside():
    config, depth, width = StreamConfig(3, "none", dynamic=False), 4, 6
    maps = jax.vmap(lambda index: streams.init_params(config, width, index))(jnp.arange(depth))
    params = maps, jnp.ones((depth, width, 3 * width)), jnp.ones((depth, 3 * width, width))

    def layer(params):
        maps, up, down = params
        return [streams.Connected(lambda h: jnp.sin(h @ up) @ down, maps, config)]

    run = partial(streams.apply_branches, layer, streams=3, block_length=2)
    _, pullback = jax.vjp(lambda params, x: run(params, x), params, jnp.ones((7, width)))
    # The branch's output, out of which the streams inside of a block are made again.
    kept = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    assert (2, 2, 7, width) in kept
