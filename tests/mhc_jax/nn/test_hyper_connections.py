import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mhc_jax import streams
from mhc_jax.nn.hyper_connections import HyperConnections, StreamHead, StreamStack
from mhc_jax.streams import StreamConfig
from mhc_jax.streams.constraints import CONSTRAINTS


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_module_is_the_function_around_its_branch(dynamic):
    layer = HyperConnections(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), 6, streams=3, layer_index=1, dynamic=dynamic)
    wide = jax.random.normal(jax.random.key(0), (2, 5, 3, 6))
    params = streams.init_params(StreamConfig(3, dynamic=dynamic), 6, layer_index=1)
    expected = streams.wrap(layer.branch, layer.config)(params, wide)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, wide), expected, atol=1e-6)


def test_every_parameter_of_a_network_is_trained():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List(
                HyperConnections(nnx.Linear(6, 6, rngs=rngs), 6, layer_index=layer) for layer in range(3)
            )
            self.head = StreamHead(6)

        def __call__(self, x):
            wide = streams.expand(x, 4)
            for layer in self.layers:
                wide = layer(wide)
            return self.head(wide)

    network = Network(nnx.Rngs(0))
    x, target = jax.random.normal(jax.random.key(0), (2, 16, 6))

    @nnx.jit
    def step(network):
        loss, gradient = nnx.value_and_grad(lambda n: jnp.mean((n(x) - target) ** 2))(network)
        nnx.update(network, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(network), gradient))
        return loss

    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(network)))
    losses = [step(network) for _ in range(20)]
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, nnx.to_pure_dict(nnx.state(network)))
    assert all(jax.tree.leaves(changed)), changed
    assert losses[-1] < 0.8 * losses[0]


def test_further_arguments_reach_the_branch():
    layer = HyperConnections(lambda x, scale, *, shift: scale * x + shift, 4, streams=2)
    wide = streams.expand(jnp.ones((3, 4)), 2)
    np.testing.assert_allclose(layer(wide, 2.0, shift=3.0), 6.0, rtol=1e-6)


def test_keywords_change_single_settings_of_a_config():
    layer = HyperConnections(jnp.tanh, 4, config=StreamConfig(iterations=3), streams=2)
    assert layer.config == StreamConfig(2, iterations=3)
    with pytest.raises(TypeError, match="stream_count"):
        HyperConnections(jnp.tanh, 4, stream_count=4)


@pytest.mark.parametrize("options", [{}, {"constraint": "identity"}, {"norm": "streams"}], ids=str)
def test_a_stack_is_its_layers_one_after_another(options):
    def make_layer(rngs, index):
        return HyperConnections(nnx.Linear(6, 6, rngs=rngs), 6, streams=2, layer_index=index, **options)

    stack = StreamStack(make_layer, depth=3, streams=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 6))
    wide = streams.expand(x, 2)
    graphdef, state = nnx.split(stack.layers)
    for layer in range(3):
        single = nnx.merge(graphdef, jax.tree.map(lambda leaf, layer=layer: leaf[layer], state))
        np.testing.assert_allclose(single.bias[:2], streams.init_params(StreamConfig(2), 6, layer).bias[:2])
        wide = single(wide)
    np.testing.assert_allclose(stack(x), streams.reduce(wide), rtol=1e-5)


def test_a_stack_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        StreamStack(lambda rngs, index: HyperConnections(jnp.tanh, 6), 0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_every_constraint_makes_a_stack(constraint):
    """Also where it closes over a table of its own, and inside of a trace."""

    def output(x):
        def make_layer(rngs, index):
            return HyperConnections(nnx.Linear(3, 3, rngs=rngs), 3, constraint=constraint, layer_index=index)

        return StreamStack(make_layer, depth=2, rngs=nnx.Rngs(0))(x)

    x = jnp.ones((2, 3))
    assert jax.eval_shape(output, x).shape == jax.grad(lambda x: output(x).sum())(x).shape == (2, 3)


def test_a_subclass_with_a_call_of_its_own_is_called():
    class Doubled(HyperConnections):
        def __call__(self, streams):
            return 2 * super().__call__(streams)

    stack = StreamStack(lambda rngs, i: Doubled(nnx.Linear(3, 3, rngs=rngs), 3), depth=2, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 3))
    np.testing.assert_allclose(stack(x), stack.unrolled()(x), rtol=1e-5)
    # Without what the branches give, the streams are doubled twice.
    stack.layers.branch.kernel.set_value(jnp.zeros_like(stack.layers.branch.kernel))
    np.testing.assert_allclose(stack(x), 4.0, rtol=1e-2)
