"""MHCSequential against a loop in NumPy, and MHCStack against MHCSequential."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mhc_jax.nn import HyperConnections, MHCSequential, MHCStack, StreamStack
from tests.compiles import counted

DEPTH, WIDTH = 6, 5


class Block(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.gelu(self.linear(self.norm(x))))


def linear(rngs):
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs)


def as_sequential(stack, **options):
    """The same layers and weights, each a module of its own."""
    take = lambda layer: lambda leaf: leaf[layer]  # noqa: E731
    graphdef, state = nnx.split(stack.layers)
    modules = [nnx.merge(graphdef, jax.tree.map(take(layer), state)) for layer in range(stack.depth)]
    sequential = MHCSequential(modules, **options)
    for layer, skip in enumerate(sequential.skip_layers):
        skip.mixing_logits[...] = stack.mixing_logits[layer]
        if stack.config.use_gating:
            skip.gate_logit[...] = stack.gate_logit[layer]
    return sequential


def randomised(stack, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    stack.mixing_logits[...] = jax.random.normal(keys[0], stack.mixing_logits.shape)
    if stack.config.use_gating:
        stack.gate_logit[...] = jax.random.normal(keys[1], stack.gate_logit.shape)
    return stack


def test_sequential_is_the_recurrence():
    with jax.enable_x64(True):
        model = MHCSequential([nnx.Linear(4, 4, rngs=nnx.Rngs(i), dtype=float, param_dtype=float) for i in range(5)], 3)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 4))
        states = [x]
        for layer, (module, skip) in enumerate(zip(model.wrapped_modules, model.skip_layers, strict=True)):
            logits = rng.normal(size=3)
            skip.mixing_logits[...] = jnp.asarray(logits)
            window = states[-3:]
            weights = np.exp(logits[-len(window) :]) / np.exp(logits[-len(window) :]).sum()
            mixed = sum(w * s for w, s in zip(weights, window, strict=True))
            states.append(states[-1] @ np.asarray(module.kernel) + np.asarray(module.bias) + mixed)
            np.testing.assert_allclose(model.mixing_weights()[layer, -len(window) :], weights, rtol=1e-12)
        np.testing.assert_allclose(model(jnp.asarray(x)), states[-1], rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_history": 1},
        {"max_history": 9, "constraint": "sparse"},
        {"mode": "hc", "temperature": 0.5, "use_gating": True},
        {"mode": "residual"},
        {"constraint": "identity", "detach_history": True},
        {"policy": jax.checkpoint_policies.nothing_saveable},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_stack_and_sequential_agree_in_value_and_gradient(options):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(3), (3, WIDTH))
        stack = randomised(MHCStack(lambda rngs: Block(rngs), DEPTH, rngs=nnx.Rngs(0), **options))
        sequential = as_sequential(stack, **options)
        weights = jnp.arange(1.0, 1 + x.size).reshape(x.shape)

        def value_and_grads(model):
            loss = nnx.jit(nnx.value_and_grad(lambda model, x: jnp.sum(weights * model(x)), argnums=(0, 1)))
            return loss(model, x)

        value, (grads, dx) = value_and_grads(stack)
        expected, (expected_grads, expected_dx) = value_and_grads(sequential)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(dx, expected_dx, rtol=1e-5, atol=1e-6)
        rows = [expected_grads["skip_layers"][layer]["mixing_logits"][...] for layer in range(DEPTH)]
        np.testing.assert_allclose(grads["mixing_logits"], jnp.stack(rows), rtol=1e-5, atol=1e-6)
        kernels = [expected_grads["wrapped_modules"][layer]["linear"]["kernel"][...] for layer in range(DEPTH)]
        np.testing.assert_allclose(grads["layers"]["linear"]["kernel"], jnp.stack(kernels), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stack.mixing_weights(gated=True), sequential.mixing_weights(gated=True), atol=1e-7)


def test_dropout_draws_anew_in_every_layer_and_call_and_never_in_evaluation():
    class Noise(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return self.scale * self.dropout(jnp.ones_like(x))

    stack = MHCStack(Noise, depth=3, mode="residual", rngs=nnx.Rngs(0))
    call = nnx.jit(lambda model, x: model(x))
    x = jnp.zeros(64)
    first, second = call(stack, x), call(stack, x)
    # Each of three independent layers adds 0 or 2: equal masks would give 0 and 6 only.
    assert set(np.unique(first)) == {0.0, 2.0, 4.0, 6.0}
    assert (first != second).any()
    stack.eval()
    np.testing.assert_array_equal(call(stack, x), 3.0)
    np.testing.assert_array_equal(call(stack, x), call(stack, x))


def test_stochastic_mixing_draws_in_training_only():
    stack = MHCStack(linear, 3, stochastic=True, init="uniform", rngs=nnx.Rngs(0))
    x = jnp.ones((1, WIDTH))
    assert not np.allclose(stack(x), stack(x))
    stack.eval()
    np.testing.assert_array_equal(stack(x), stack(x))


def test_auto_project_follows_the_widths_of_the_states():
    rngs = nnx.Rngs(0)
    modules = [nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)]
    model = MHCSequential(modules, 3, auto_project=True, features=(4, 4, 8, 8), init="uniform", rngs=rngs)
    x0 = jax.random.normal(jax.random.key(0), (2, 4))
    x1 = modules[0](x0) + x0
    x2 = modules[1](x1) + (x0 + x1) / 2 @ model.skip_layers[1].projection.kernel[...]
    x3 = modules[2](x2) + ((x0 + x1) @ model.skip_layers[2].projection.kernel[...] + x2) / 3
    np.testing.assert_allclose(model(x0), x3, rtol=1e-5)
    assert not hasattr(model.skip_layers[0], "projection")
    with pytest.raises(ValueError, match=r"window of layer 2 holds states of widths \[4, 6\] beside 8"):
        MHCSequential(modules, auto_project=True, features=(4, 4, 6, 8), rngs=rngs)
    with pytest.raises(ValueError, match="widths of all 4 states"):
        MHCSequential(modules, auto_project=True, features=(4, 4), rngs=rngs)


def test_states_keep_a_low_precision_dtype():
    rngs = nnx.Rngs(0)
    make = lambda rngs: nnx.Linear(WIDTH, WIDTH, dtype=jnp.bfloat16, rngs=rngs)  # noqa: E731
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    stack = MHCStack(make, 4, rngs=rngs)
    assert stack(x).dtype == jnp.bfloat16
    assert as_sequential(stack)(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(stack(x).astype(float), as_sequential(stack)(x).astype(float), rtol=0.05)


def test_errors_say_in_which_layer_they_came_up():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"in layer 1 \(Linear\)"):
        MHCSequential([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 8, rngs=rngs)])(jnp.ones((2, 4)))
    with pytest.raises(TypeError, match=r"in layer 0 \(Linear\)"):
        MHCSequential([nnx.Linear(4, 4, rngs=rngs)])(jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"in the layers of MHCStack \(Linear\)"):
        MHCStack(lambda rngs: nnx.Linear(4, 8, rngs=rngs), 3, rngs=rngs)(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="at least one module"):
        MHCSequential([])
    with pytest.raises(TypeError, match="modules must be an iterable of modules"):
        MHCSequential(nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs))
    with pytest.raises(TypeError, match=r"make_layer must make a layer from nnx\.Rngs"):
        MHCStack(nnx.Linear(4, 4, rngs=rngs), 3, rngs=rngs)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        MHCStack(linear, 0, rngs=rngs)
    with pytest.raises(ValueError, match="auto_project"):
        MHCStack(linear, 2, auto_project=True, rngs=rngs)


def _history_stack():
    return MHCStack(lambda rngs: nnx.Sequential(linear(rngs), jax.nn.relu), 3, rngs=nnx.Rngs(0))


def _stream_stack():
    return StreamStack(lambda rngs, i: HyperConnections(linear(rngs), WIDTH, layer_index=i), 3, 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [_history_stack, _stream_stack])
def test_a_second_call_outside_jit_compiles_nothing(make):
    stack, x = make(), jnp.ones((2, WIDTH))

    def step():
        return stack(x), nnx.grad(lambda model: jnp.sum(model(x)))(stack)

    first, _ = step()
    with counted() as compiled:
        step()
    assert not compiled
    nnx.update(stack, jax.tree.map(lambda leaf: 2 * leaf, nnx.state(stack, nnx.Param)))
    assert not np.allclose(stack(x), first)


@pytest.mark.parametrize("make", [_history_stack, _stream_stack])
def test_gradients_without_jit(make):
    stack, x = make(), jnp.ones((2, WIDTH))
    gradient = jax.grad(lambda x: jnp.sum(stack(x)))
    with jax.disable_jit():
        operation_by_operation = gradient(x)
    np.testing.assert_allclose(operation_by_operation, gradient(x), rtol=1e-5)
