"""Stacks of real layers: what a call gives to every layer, and what layers write while they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from mhc_jax.nn import HyperConnections, MHCSequential, MHCStack, StreamStack

WIDTH, DEPTH = 6, 3
X = jax.random.normal(jax.random.key(0), (4, 5, WIDTH))


class InStreams(nnx.Module):
    """Any branch as a layer of a stream network, which is a chain of one connection."""

    def __init__(self, branch, index=0):
        self.connection = HyperConnections(branch, WIDTH, streams=2, layer_index=index)

    def __call__(self, streams, *args, **kwargs):
        return self.connection(streams, *args, **kwargs)

    def connected(self, *args, **kwargs):
        return self.connection.connected(*args, **kwargs)


class Chain(nnx.Module):
    """What a `StreamStack` is, layer by layer."""

    def __init__(self, make, rngs):
        self.layers = nnx.List(InStreams(make(rngs), index) for index in range(DEPTH))

    def __call__(self, x, *args, **kwargs):
        wide = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], 2, WIDTH))
        for layer in self.layers:
            wide = layer(wide, *args, **kwargs)
        return wide.mean(-2)


def both(kind, make):
    """A stack and the same layers one by one, and the branches of each."""
    if kind == "streams":
        stack = StreamStack(lambda rngs, index: InStreams(make(rngs), index), DEPTH, 2, rngs=nnx.Rngs(0))
        chain = Chain(make, nnx.Rngs(0))
        branches, stacked = [layer.connection.branch for layer in chain.layers], stack.layers.connection.branch
    else:
        stack = MHCStack(make, DEPTH, 2, init="uniform", rngs=nnx.Rngs(0))
        chain = MHCSequential([make(nnx.Rngs(0)) for _ in range(DEPTH)], 2, init="uniform")
        branches, stacked = list(chain.wrapped_modules), stack.layers
    for index, branch in enumerate(branches):
        nnx.update(branch, jax.tree.map(lambda leaf, index=index: leaf[index], nnx.state(stacked, nnx.Param)))
    return stack, chain, stacked, branches


class Masked(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask, *, scale, squared=False):
        y = jnp.where(mask, self.linear(x), 0) * scale
        return y**2 if squared else y


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_arguments_of_the_call_reach_every_layer(kind):
    stack, chain, _, _ = both(kind, Masked)
    mask = jnp.arange(5)[:, None] < 3

    def loss(model, scale):
        return jnp.sum(model(X, mask, scale=scale, squared=True) ** 2)

    found, expected = (jax.jit(jax.value_and_grad(lambda s, m=m: loss(m, s)))(0.7) for m in (stack, chain))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(stack(X, mask, scale=0.7), stack(X, ~mask, scale=0.7))
    with pytest.raises(TypeError, match="mask"):
        stack(X)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_batch_statistics_are_kept(kind):
    stack, chain, stacked, branches = both(kind, Normed)

    @nnx.jit
    def step(model):
        return nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(X))))(model)

    for _ in range(2):  # the second starts from the statistics of the first
        (value, gradient), (expected, by_layer) = step(stack), step(chain)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    for name in ("mean", "var"):
        wanted = np.stack([getattr(branch.norm, name)[...] for branch in branches])
        np.testing.assert_allclose(getattr(stacked.norm, name)[...], wanted, rtol=1e-4, atol=1e-6)
    if kind == "history":
        wanted = [by_layer["wrapped_modules"][layer]["linear"]["kernel"][...] for layer in range(DEPTH)]
        np.testing.assert_allclose(gradient["layers"]["linear"]["kernel"][...], np.stack(wanted), rtol=1e-3, atol=1e-5)
    for model in (stack, chain):
        model.eval()
    np.testing.assert_allclose(stack(X), chain(X), rtol=1e-4, atol=1e-6)


class Cached(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=True, rngs=rngs)
        self.attention.init_cache((4, 5, WIDTH))

    def __call__(self, x):
        return self.attention(x)


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_a_cache_of_keys_and_values_is_written(kind):
    stack, chain, stacked, branches = both(kind, Cached)
    step = nnx.jit(lambda model, x: model(x))
    for token in range(3):
        x = X[:, token : token + 1]
        np.testing.assert_allclose(step(stack, x), step(chain, x), rtol=1e-4, atol=1e-5)
    wanted = np.stack([branch.attention.cached_key[...] for branch in branches])
    np.testing.assert_allclose(stacked.attention.cached_key[...], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stacked.attention.cache_index[...], [3] * DEPTH)


class Sown(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        y = self.linear(x)
        self.loss = nnx.Intermediate(jnp.sum(y**2))
        return y


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_what_layers_leave_behind_comes_back_with_its_gradient(kind):
    stack, chain, stacked, branches = both(kind, Sown)

    def gradient(model, losses):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def total(params):
            merged = nnx.merge(graphdef, params, rest)
            merged(X)
            return losses(merged)

        return jax.jit(jax.value_and_grad(total))(params)

    def of_stack(model):
        return jnp.sum((model.layers.connection.branch if kind == "streams" else model.layers).loss[...] * weights)

    def of_chain(model):
        layers = [layer.connection.branch for layer in model.layers] if kind == "streams" else model.wrapped_modules
        return sum(layer.loss[...] * weight for layer, weight in zip(layers, weights, strict=True))

    weights = jnp.arange(1.0, DEPTH + 1)
    (value, found), (expected, wanted) = gradient(stack, of_stack), gradient(chain, of_chain)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    kernels = [
        [leaf for path, leaf in jax.tree.leaves_with_path(tree) if "kernel" in jax.tree_util.keystr(path)]
        for tree in (found, wanted)
    ]
    np.testing.assert_allclose(kernels[0][0], np.stack(kernels[1]), rtol=1e-3, atol=1e-5)
    del stacked, branches


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "mean", x.mean())
        return self.linear(x)


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_what_is_sown_can_be_captured(kind):
    stack, chain, _, _ = both(kind, Sowing)
    leaves = []
    for model in (stack, chain):
        y, captured = nnx.capture(model, nnx.Intermediate)(X)
        leaves.append((y, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(captured)])))
    (y, found), (expected, wanted) = leaves
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_dropout_draws_anew_in_every_layer_and_call(kind):
    make = lambda rngs: nnx.Dropout(0.5, rngs=rngs)  # noqa: E731
    if kind == "streams":
        stack = StreamStack(lambda rngs, index: InStreams(make(rngs), index), DEPTH, 2, rngs=nnx.Rngs(0))
    else:
        stack = MHCStack(make, DEPTH, rngs=nnx.Rngs(0))
    once, again = stack(jnp.ones((300, WIDTH))), stack(jnp.ones((300, WIDTH)))
    assert not np.allclose(once, again)
    # Were all layers to drop the same, a feature would be one of two values.
    assert len(np.unique(np.round(once, 1))) > 2
    stack.eval()
    np.testing.assert_array_equal(stack(X), stack(X))


class Selfish(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x):
        self.scale[...] = self.scale / 2
        return x * self.scale


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_a_layer_that_writes_its_parameters_is_refused(kind):
    with pytest.raises(TypeError, match=r"(Selfish|InStreams) writes its parameters"):
        both(kind, Selfish)[0](X)


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_partition_metadata_has_the_axis_of_layers(kind):
    def make(rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
        return nnx.Linear(WIDTH, WIDTH, kernel_init=init, rngs=rngs)

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        kernel = both(kind, make)[2].kernel
    assert kernel.get_metadata()["out_sharding"] == (None, "data", "model")
    assert kernel[...].sharding.spec == jax.sharding.PartitionSpec(None, "data", "model")


def test_states_may_be_wider_than_the_branches():
    def make(rngs):
        return nnx.Linear(WIDTH, WIDTH, dtype=jnp.bfloat16, rngs=rngs)

    for kind in ("history", "streams"):
        stack, chain, _, _ = both(kind, make)
        assert stack(X).dtype == jnp.float32
        np.testing.assert_allclose(stack(X), chain(X), rtol=1e-3)


@pytest.mark.parametrize("kind", ["history", "streams"])
def test_branches_of_linen_are_branches(kind):
    class Branch(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False, momentum=0.5)(linen.Dense(WIDTH)(x))

    stack, chain, stacked, branches = both(
        kind, lambda rngs: nnx.bridge.ToNNX(Branch(), rngs=rngs).lazy_init(jnp.ones((1, WIDTH)))
    )
    ours, theirs = (model(X, mutable=["batch_stats"]) for model in (stack, chain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    found, wanted = (jax.tree.leaves(nnx.state(layer, nnx.BatchStat)) for layer in (stacked, branches[1]))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one[1], other, rtol=1e-4, atol=1e-6)


def test_options_of_something_else_are_named():
    with pytest.raises(TypeError, match=r"unknown settings \['streams'\]; those of MHCConfig"):
        MHCStack(lambda rngs: nnx.Linear(6, 6, rngs=rngs), 2, streams=4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"unknown settings \['max_history'\]; those of StreamConfig"):
        HyperConnections(jnp.tanh, 6, max_history=4)
