"""What one device computes, eight compute: values and gradients, on Auto and Explicit axes and in `jax.shard_map`."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mhc_jax import streams
from mhc_jax.history import MHCConfig, apply_layers, apply_layers_carrying, mix
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.nn import HyperConnections, MHCSequential, MHCStack, StreamStack
from mhc_jax.sinkhorn import sinkhorn
from mhc_jax.streams import StreamConfig, StreamParams

WIDTH, TOKENS = 16, (8, 6)
# How batch, sequence and features are split.
ONE, TWO, TOGETHER = ("data", None, None), ("data", "model", None), (("data", "model"), None, None)
FEATURES = ("data", None, "model")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(config):
    rows = config.streams * WIDTH
    dynamic = (draw(1, rows, config.logits) / 4, draw(2, 3)) if config.dynamic else (None, None)
    return StreamParams(*dynamic, draw(3, config.logits))


def example(n):
    """Streams, a branch's output, and its maps."""
    return draw(4, *TOKENS, n, WIDTH), draw(5, *TOKENS, WIDTH), draw(6, *TOKENS, n), draw(7, *TOKENS, n, n)


def single_pass(params, x, config, implementation):
    layer = streams.single_pass(jnp.tanh, config, implementation=implementation)
    return layer(params, x, streams.first_read(x))


def history(kernels, x, logits):
    return apply_layers(lambda kernel, x: jnp.tanh(x * kernel), kernels, x, logits, MHCConfig(max_history=3))


def carrying(kernels, x, logits):
    def branch(kernel, x):
        return jnp.tanh(x * kernel), x.sum()

    return apply_layers_carrying(branch, kernels, x, logits, MHCConfig(max_history=2))


CONFIG = StreamConfig(3, iterations=3)
SMALL = StreamConfig(2, "permutations")
PLAIN = StreamConfig(2, "permutations", norm="rms_outside")
LAST = StreamConfig(2, "permutations", single_pass=True)
STATIC = StreamConfig(2, "identity", dynamic=False)

# Each with its arguments, and with the layout of every one: t the tokens, c features, anything else is not split.
CASES = {
    "read": (lambda i, *a: streams.read(*a, CONFIG, implementation=i), (parameters(CONFIG), example(3)[0]), "- tnc"),
    "write": (lambda i, *a: streams.write(*a, implementation=i), example(3), "tnc tc tn tnn"),
    "boundary": (
        lambda i, *a: streams.boundary(*a, CONFIG, implementation=i),
        (parameters(CONFIG), *example(3)),
        "- tnc tc tn tnn",
    ),
    "mix": (
        lambda i, *a: mix(*a, implementation=i),
        (draw(0, *TOKENS, WIDTH), draw(1, 2, *TOKENS, WIDTH), draw(2, 2)),
        "tc ktc -",
    ),
    "single pass": (
        lambda i, *a: single_pass(*a, LAST, i),
        (parameters(LAST), draw(0, *TOKENS, 2, WIDTH)),
        "- tnc",
    ),
    "head": (
        lambda i, *a: streams.head(*a, CONFIG, implementation=i),
        (streams.HeadParams(draw(1, 3 * WIDTH, 3), draw(2, 1), draw(3, 3)), example(3)[0]),
        "- tnc",
    ),
    "another norm": (
        lambda i, *a: streams.boundary(*a, PLAIN),
        (parameters(PLAIN), *example(2)),
        "- tnc tc tn tnn",
    ),
    "static maps": (
        lambda i, *a: streams.boundary(*a[:-1], None, STATIC),
        (parameters(STATIC), *example(2)),
        "- tnc tc tn tnn",
    ),
    "sinkhorn": (lambda i, logits: sinkhorn(logits, 3), (draw(0, *TOKENS, 3, 3),), "tnn"),
    "history": (lambda i, *a: history(*a), (draw(0, 4, WIDTH), draw(1, *TOKENS, WIDTH), draw(2, 4, 3)), "- tc -"),
    "carrying": (lambda i, *a: carrying(*a), (draw(0, 3, WIDTH), draw(1, *TOKENS, WIDTH), draw(2, 3, 2)), "- tc -"),
}
KERNELS = ["read", "write", "boundary", "mix"]
BY_XLA = [(name, None) for name in CASES]
ALL = [*BY_XLA, *((name, "pallas") for name in KERNELS)]


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def specs(name, layout):
    """Of every array in the arguments of a case."""
    _, arguments, layouts = CASES[name]

    def spec(names):
        entries = {"t": layout[:2], "c": layout[2:]}
        return PartitionSpec(*(e for n in names.replace("-", "") for e in entries.get(n, (None,))))

    places = map(spec, layouts.split())
    return tuple(jax.tree.map(lambda _, s=s: s, a) for s, a in zip(places, arguments, strict=True))


def total(results):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(results))


def loss_of(name, implementation):
    function, arguments, _ = CASES[name]
    gradient = jax.value_and_grad(lambda *a: total(function(implementation, *a)), tuple(range(len(arguments))))
    return gradient, arguments


@cache
def alone(name):
    gradient, arguments = loss_of(name, None)
    return jax.jit(gradient)(*arguments)


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * max(1, np.abs(other).max()))


def check(name, implementation, layout, kind):
    gradient, arguments = loss_of(name, implementation)
    with jax.set_mesh(mesh := mesh_of(kind)):
        places = jax.tree.map(partial(NamedSharding, mesh), specs(name, layout))
        found = jax.jit(gradient)(*jax.device_put(arguments, places))
    assert_same(found, alone(name))
    if kind == AxisType.Explicit:
        for leaf, place in zip(jax.tree.leaves(found[1]), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize("layout", [TWO, FEATURES], ids=["tokens", "features"])
@pytest.mark.parametrize(("name", "implementation"), ALL)
def test_explicit_axes(name, implementation, layout):
    check(name, implementation, layout, AxisType.Explicit)


@pytest.mark.parametrize(("name", "layout"), [("boundary", ONE), ("history", TOGETHER), ("read", TOGETHER)])
def test_explicit_axes_that_split_one_dimension(name, layout):
    check(name, None, layout, AxisType.Explicit)


@pytest.mark.parametrize("layout", [TWO, FEATURES], ids=["tokens", "features"])
@pytest.mark.parametrize("name", ["boundary", "history"])
def test_auto_axes(name, layout):
    check(name, None, layout, AxisType.Auto)


# What "carrying" gives beside a state is a sum over tokens, here those of one device.
@pytest.mark.parametrize(("name", "implementation"), [each for each in ALL if each[0] != "carrying"])
def test_shard_map_with_its_checks(name, implementation):
    gradient, arguments = loss_of(name, implementation)
    given = specs(name, TWO)

    @partial(jax.shard_map, in_specs=given, out_specs=(PartitionSpec(), given))
    def on_parts(*parts):
        value, gradients = gradient(*parts)
        return jax.lax.psum(value, tuple(jax.typeof(value).manual_axis_type.varying)), gradients

    with jax.set_mesh(mesh_of(AxisType.Auto)):
        assert_same(jax.jit(on_parts)(*arguments), alone(name))


def test_shard_map_of_what_is_not_split():
    x, states, weights = (jnp.asarray(a) for a in CASES["mix"][1])
    by_kernel = partial(mix, implementation="pallas")
    whole = jax.shard_map(by_kernel, in_specs=PartitionSpec(), out_specs=PartitionSpec())
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        assert_same(jax.jit(whole)(x, states, weights), mix(x, states, weights))


# Transformations


@pytest.mark.parametrize("kind", [AxisType.Explicit, "shard_map"], ids=str)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_second_derivatives_and_vmap(implementation, kind):
    params, x = parameters(SMALL), example(2)[0]

    def loss(params, x):
        return total(streams.read(params, x, SMALL, implementation=implementation))

    def curvature(params, x):
        many = jax.vmap(loss, (None, 1))  # over an axis that no device splits
        _, second = jax.jvp(jax.grad(lambda p: many(p, x).sum()), (params,), (params,))
        return second

    expected = jax.jit(curvature)(params, x)
    place = PartitionSpec(("data", "model"))
    if kind == "shard_map":
        curvature = jax.shard_map(curvature, in_specs=(PartitionSpec(), place), out_specs=PartitionSpec())
    with jax.set_mesh(mesh := mesh_of(AxisType.Auto if kind == "shard_map" else kind)):
        assert_same(jax.jit(curvature)(params, jax.device_put(x, NamedSharding(mesh, place))), expected)


def test_vmap_over_an_axis_that_is_split():
    params, x = jax.tree.map(jnp.asarray, (parameters(SMALL), example(2)[0]))
    read = jax.vmap(lambda x: streams.read(params, x, SMALL, implementation="xla"))
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        found = jax.jit(read)(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "model"))))
    assert found[0].sharding.spec[:2] == ("data", "model")
    assert_same(found, read(x))


# Modules


def mlp(rngs):
    return nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=rngs), jnp.tanh)


def connected(implementation, rngs, index):
    return HyperConnections(mlp(rngs), WIDTH, config=SMALL, layer_index=index, implementation=implementation)


MODULES = {
    "history": lambda: MHCStack(mlp, depth=3, max_history=2, init="uniform", rngs=nnx.Rngs(0)),
    "unrolled history": lambda: MHCSequential(
        [mlp(nnx.Rngs(i)) for i in range(2)], max_history=2, init="uniform", implementation="pallas"
    ),
    "streams": lambda: StreamStack(partial(connected, "xla"), depth=2, streams=2, rngs=nnx.Rngs(0)),
    "streams by kernels": lambda: StreamStack(partial(connected, "pallas"), depth=2, streams=2, rngs=nnx.Rngs(0)),
}


def module_loss(model, x):
    return total(nnx.remat(lambda model, x: model(x))(model, x))


def by_jit(model, x):
    value, gradients = nnx.jit(nnx.value_and_grad(module_loss))(model, x)
    return value, nnx.to_pure_dict(gradients)


@pytest.mark.parametrize("name", MODULES)
def test_modules_under_transforms_of_nnx(name):
    model, x = MODULES[name](), draw(0, *TOKENS, WIDTH)
    expected = by_jit(model, x)
    with jax.set_mesh(mesh := mesh_of(AxisType.Explicit)):
        place = NamedSharding(mesh, PartitionSpec("data", "model"))
        model = nnx.merge(nnx.graphdef(model), jax.device_put(nnx.state(model), NamedSharding(mesh, PartitionSpec())))
        assert_same(by_jit(model, jax.device_put(x, place)), expected)


@pytest.mark.parametrize("connection", ["residual", MHCConfig(), SMALL], ids=["residual", "history", "streams"])
def test_a_decoder_in_shard_map(connection):
    config = DecoderConfig(10, features=WIDTH, mlp_features=WIDTH, num_heads=2, depth=2)
    graph, state = nnx.split(Decoder(config, connection, attention="plain", rngs=nnx.Rngs(0)))
    gradient = jax.grad(lambda state, tokens: total(nnx.merge(graph, state)(tokens)))
    tokens = np.arange(48).reshape(8, 6) % 10
    split = jax.shard_map(gradient, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec())
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        found = jax.jit(split)(state, tokens)
    assert_same(found, jax.jit(gradient)(state, tokens))
