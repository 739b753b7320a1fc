import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import streams
from mhc_jax.streams import StreamConfig, StreamParams
from mhc_jax.streams.starts import STARTS
from tests import streams_reference as reference
from tests.compiles import counted

CONSTRAINTS = ["sinkhorn", "permutations", "kronecker", "none", "identity"]


def example(config, width=5, tokens=3, seed=0):
    """Random parameters (so that H_res is far from symmetric) and streams, in float64 numpy."""
    rng = np.random.default_rng(seed)
    features = config.streams * width
    phi, alpha = (rng.normal(size=(features, config.logits)), rng.normal(size=3)) if config.dynamic else (None, None)
    return StreamParams(phi, alpha, rng.normal(size=config.logits)), rng.normal(size=(tokens, config.streams, width))


def branch(x):
    return np.tanh(1.5 * x) if isinstance(x, np.ndarray) else jnp.tanh(1.5 * x)


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


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_layer_is_the_equation_of_the_paper(config):
    params, x = example(config)
    with jax.enable_x64(True):
        result = jax.jit(streams.wrap(branch, config))(params, x)
    np.testing.assert_allclose(
        result, reference.layer(*params, x, branch, **reference.options(config)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_agree_with_finite_differences(config):
    params, x = example(config, width=3, tokens=2)
    weights, *directions = (
        np.random.default_rng(seed).normal(size=leaf.shape) for seed, leaf in enumerate(jax.tree.leaves((x, params, x)))
    )
    directions = jax.tree.unflatten(jax.tree.structure((params, x)), directions)

    def moved(step):
        moved_params, moved_x = jax.tree.map(lambda a, b: a + step * b, (params, x), directions)
        return np.sum(weights * reference.layer(*moved_params, moved_x, branch, **reference.options(config)))

    with jax.enable_x64(True):
        objective = jax.jit(
            jax.grad(lambda p, x: jnp.sum(weights * streams.wrap(branch, config)(p, x)), argnums=(0, 1))
        )
        gradients = jax.tree.map(np.asarray, objective(params, x))
    slope = sum(np.sum(a * b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(directions), strict=True))
    np.testing.assert_allclose(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("constraint", ["sinkhorn", "permutations", "kronecker"])
def test_residual_maps_are_doubly_stochastic(constraint):
    config = StreamConfig(4, constraint, iterations=500)
    params, x = example(config)
    res = streams.maps(StreamParams(*map(jnp.asarray, params)), jnp.asarray(x), config).res
    assert np.all(res >= 0)
    np.testing.assert_allclose(res.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(res.sum(-2), 1, atol=1e-3 if constraint == "sinkhorn" else 1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("start", STARTS)
def test_a_new_network_is_the_residual_network(n, constraint, start):
    config = StreamConfig(n, constraint, start=start)
    x = jax.random.normal(jax.random.key(0), (6, 8))
    weights = 0.5 * jax.random.normal(jax.random.key(1), (7, 8, 8))
    residual, wide = x, streams.expand(x, n)
    for layer, w in enumerate(weights):
        residual = residual + jnp.tanh(residual @ w)
        params = streams.init_params(config, 8, layer)
        wide = streams.wrap(lambda h, w=w: jnp.tanh(h @ w), config)(params, wide)
    # The rows of a mixture of 5! permutations sum to 1 as well as 120 weights in float32 do.
    exactness = 5e-6 if start == "identity" else 2e-5
    np.testing.assert_allclose(streams.reduce(wide), residual, atol=exactness)
    np.testing.assert_allclose(streams.reduce(wide, "sum"), n * residual, atol=10 * exactness)
    np.testing.assert_allclose(
        streams.head(streams.init_head_params(config, 8), wide, config), residual, atol=exactness
    )


def test_streams_of_a_new_network_get_different_gradients():
    config = StreamConfig(4)
    layers = [streams.init_params(config, 8, layer) for layer in range(2)]

    def loss(layers):
        wide = streams.expand(jax.random.normal(jax.random.key(0), (6, 8)), 4)
        for params in layers:
            wide = streams.wrap(jnp.tanh, config)(params, wide)
        return jnp.sum(streams.reduce(wide) ** 2)

    post = jax.jit(jax.grad(loss))(layers)[0].bias[4:8]
    assert np.ptp(post) > 0.1 * np.max(np.abs(post))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_maps_of_bfloat16_streams_are_computed_in_float32(constraint):
    config = StreamConfig(4, constraint)
    params, x = example(config, width=64)
    params = StreamParams(*(jnp.asarray(p, jnp.float32) for p in params))
    x = jnp.asarray(x, jnp.bfloat16)
    for low, high in zip(
        streams.maps(params, x, config), streams.maps(params, x.astype(jnp.float32), config), strict=True
    ):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, high, rtol=1e-6)
    result, pullback = jax.vjp(streams.wrap(jnp.tanh, config), params, x)
    d_params, d_x = pullback(result)
    assert result.dtype == d_x.dtype == jnp.bfloat16
    assert all(d.dtype == jnp.float32 for d in d_params)


def test_streams_of_any_number_of_token_axes():
    config = StreamConfig(2)
    params, x = example(config, tokens=12)
    params = StreamParams(*(jnp.asarray(p, jnp.float32) for p in params))
    x = jnp.asarray(x, jnp.float32)
    layer = streams.wrap(branch, config)
    expected = layer(params, x)
    np.testing.assert_allclose(layer(params, x.reshape(3, 2, 2, 2, 5)).reshape(expected.shape), expected, rtol=1e-5)
    np.testing.assert_allclose(layer(params, x[0]), expected[0], rtol=1e-5)


def test_blocks_keep_fewer_streams_and_change_nothing_else():
    config, depth, width = StreamConfig(4), 16, 64
    weights = 0.1 * jax.random.normal(jax.random.key(0), (depth, width, width))
    params = jax.vmap(lambda layer: streams.init_params(config, width, layer))(jnp.arange(depth))
    params = params._replace(phi=0.1 * jax.random.normal(jax.random.key(1), params.phi.shape))
    x = jax.random.normal(jax.random.key(2), (512, width))

    def layer(layer_params, wide):
        params, weight = layer_params
        return streams.wrap(lambda h: jnp.tanh(h @ weight), config)(params, wide)

    def run(block_length):
        def loss(params):
            return jnp.sum(streams.scan_layers(layer, params, streams.expand(x, 4), block_length=block_length) ** 2)

        traced = jax.jit(jax.grad(loss)).trace((params, weights))
        compiled = traced.lower().compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return compiled((params, weights)), memory, str(traced.jaxpr).count("= tanh")

    kept, kept_bytes, kept_branches = run(1)
    assert streams.optimal_block_length(4, depth) == 4
    recomputed, recomputed_bytes, recomputed_branches = run(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * abs(b).max()), recomputed, kept)
    assert recomputed_bytes < 0.8 * kept_bytes
    assert recomputed_branches == kept_branches == 1, "a branch must not run twice"
    with pytest.raises(ValueError, match="block_length must divide the depth 16, got 3"):
        run(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"streams": 0}, "streams must be between 1 and 16, got 0"),
        ({"streams": 17}, "streams must be between 1 and 16, got 17"),
        ({"constraint": "simplex"}, "constraint must be .* got 'simplex'"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"streams": 7, "constraint": "permutations"}, "7! permutations"),
        ({"streams": 14, "constraint": "kronecker"}, "7! permutations"),
    ],
)
def test_impossible_configs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig(**arguments)


def test_bad_input_is_refused():
    config = StreamConfig(4)
    params = streams.init_params(config, 8)
    x = jnp.ones((3, 4, 8))
    layer = streams.wrap(lambda h: h, config)
    with pytest.raises(ValueError, match=r"streams must have shape \(..., 4, width\), got \(3, 8\)"):
        layer(params, jnp.ones((3, 8)))
    with pytest.raises(
        ValueError,
        match=r"phi must have shape \(36, 24\) .* width 9, got \(32, 24\): it was made for width 8",
    ):
        layer(params, jnp.ones((3, 4, 9)))
    with pytest.raises(TypeError, match="floating dtype, got int32"):
        layer(params, x.astype(int))
    with pytest.raises(TypeError, match="floating dtype, got float8_e4m3fn: 16 bits"):
        layer(params, x.astype(jnp.float8_e4m3fn))
    with pytest.raises(ValueError, match="params must hold arrays with one leading axis, the depth"):
        streams.scan_layers(lambda params, x: x, {}, x)
    with pytest.raises(ValueError, match=r"keep the shape of its input \(3, 8\), its output has \(3, 4\)"):
        streams.wrap(lambda h: h[:, :4], config)(params, x)
    with pytest.raises(TypeError, match="must fit into the streams, bfloat16, and has float32"):
        streams.wrap(lambda h: h.astype(float), config)(params, x.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="how must be 'mean' or 'sum', got 'max'"):
        streams.reduce(x, "max")
    with pytest.raises(ValueError, match="streams must be at least 1, got 0"):
        streams.expand(x, 0)
    head = streams.init_head_params(config, 8)
    with pytest.raises(ValueError, match=r"streams must have shape \(..., 4, width\), got \(3, 2, 16\)"):
        streams.head(head, jnp.ones((3, 2, 16)), config)
    with pytest.raises(ValueError, match=r"phi must have shape \(36, 4\) for streams of width 9, got \(32, 4\)"):
        streams.head(head, jnp.ones((3, 4, 9)), config)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        streams.init_params(config, 0)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("norm_epsilon", "scales"), [(1e-6, [1e-4, 1.0, 3e19, 1e30, 1e35]), (0.0, [1e-33, 1e-30, 1e-19, 1.0, 1e35])]
)
def test_maps_of_streams_whose_squares_leave_float32(norm_epsilon, scales, implementation):
    config = StreamConfig(2, iterations=2, norm_epsilon=norm_epsilon)
    params, x = example(config, tokens=len(scales))
    x = np.float32(x * np.reshape(scales, (-1, 1, 1)))
    single = StreamParams(*(jnp.asarray(p, jnp.float32) for p in params))
    layer = streams.wrap(lambda h: h, config, implementation=implementation)
    # Each token as one of ordinary size: what the derivative by the parameters is then, is told by float64.
    with jax.enable_x64(True):
        exact = jax.jit(
            jax.vmap(jax.value_and_grad(lambda p, x: jnp.sum(streams.read(p, x, config)[2][0]), (0, 1)), (None, 0))
        )
        _, gradients = exact(StreamParams(*map(jnp.asarray, params)), jnp.asarray(x, jnp.float64))
        d_exact, dx_exact = jax.tree.map(np.asarray, gradients)  # outside of x64 jax would round them

    def residual(p, x):
        return jnp.sum(streams.read(p, x, config, implementation=implementation)[2][0])

    d, dx = jax.jit(jax.vmap(jax.grad(residual, (0, 1)), (None, 0)))(single, jnp.asarray(x))
    np.testing.assert_allclose(d.phi, d_exact.phi, rtol=1e-3, atol=1e-5)
    for token, scale in enumerate(scales):
        np.testing.assert_allclose(scale * np.float64(dx[token]), scale * dx_exact[token], rtol=1e-2, atol=1e-4)
    expected = reference.layer(*params, np.float64(x), lambda h: h, **reference.options(config))
    result = jax.jit(layer)(single, jnp.asarray(x))
    for token in range(len(scales)):
        np.testing.assert_allclose(result[token], expected[token], rtol=0, atol=1e-5 * np.abs(expected[token]).max())


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_hessians(implementation):
    config = StreamConfig(2, iterations=2)
    params, x = example(config, width=2, tokens=1)

    with jax.enable_x64(True):
        phi, alpha, bias = map(jnp.asarray, params)
        x = jnp.asarray(x)

        def loss(bias, implementation):
            layer = streams.wrap(branch, config, implementation=implementation)
            return jnp.sum(jnp.sin(layer(StreamParams(phi, alpha, bias), x)))

        hessian = jax.jit(jax.hessian(loss), static_argnums=1)(bias, implementation)
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        steps = 1e-6 * np.eye(len(bias))
        differences = [(gradient(bias + s, "xla") - gradient(bias - s, "xla")) / 2e-6 for s in steps]
    np.testing.assert_allclose(hessian, np.stack(differences), atol=1e-8)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_no_tokens(implementation):
    config = StreamConfig(2, iterations=2)
    params, x = streams.init_params(config, 8), jnp.ones((0, 2, 8))
    out, pullback = jax.vjp(streams.wrap(jnp.tanh, config, implementation=implementation), params, x)
    d_params, d_x = pullback(out)
    assert out.shape == d_x.shape == x.shape
    assert all(not leaf.any() for leaf in d_params)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_a_second_call_outside_jit_compiles_nothing(implementation):
    config = StreamConfig(2, iterations=2)
    params = jax.vmap(lambda layer: streams.init_params(config, 4, layer))(jnp.arange(2))
    shared, x = jnp.ones(4), jnp.ones((3, 2, 4))

    def layer(params, x):
        return streams.wrap(lambda h: h * shared, config, implementation=implementation)(params, x)

    def step():
        return jax.value_and_grad(lambda params: jnp.sum(streams.scan_layers(layer, params, x)))(params)

    first = jax.tree.map(lambda leaf: leaf[0], params)
    layer(first, x), step()
    with counted() as compiled:
        layer(first, x), step()
    assert not compiled
    shared = 3 * shared  # which the same function object closes over
    np.testing.assert_allclose(streams.scan_layers(layer, params, x), 16 * x, rtol=1e-2)


@pytest.mark.parametrize("norm", ["rms_outside", "streams"])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_other_norms_have_derivatives_over_the_range_of_the_dtype(norm, size):
    config = StreamConfig(3, "identity", norm=norm, norm_epsilon=0.0)
    params, x = example(config)

    def gradient(dtype):
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, size * x))
        return jax.grad(lambda params, x: jnp.sum(streams.wrap(lambda h: h, config)(params, x)), 1)(*given)

    with jax.enable_x64(True):
        exact = gradient(jnp.float64)
    np.testing.assert_allclose(gradient(jnp.float32), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
