from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from mhc_jax import MHCConfig, apply_layers, apply_layers_reference, mix, mixing_weights
from mhc_jax.monitoring.nonfinite import report_nonfinite
from tests import reference
from tests.compiles import counted

CONFIGS = [
    MHCConfig(max_history=3, mode="residual"),
    MHCConfig(max_history=3, mode="hc", temperature=0.7),
    MHCConfig(max_history=3),
    MHCConfig(max_history=3, constraint="identity", epsilon=0.2),
    MHCConfig(max_history=3, constraint="sparse"),
    MHCConfig(max_history=3, use_gating=True, prune_threshold=0.2),
    MHCConfig(max_history=3, detach_history=True),
]


def branch(params, x):
    return jnp.tanh(x @ params["w"]) + params["b"]


def problem(depth, config, width=4, batch=2, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(depth, width, width)) / 2, "b": rng.normal(size=(depth, width))}
    x, logits, gates = (rng.normal(size=size) for size in ((batch, width), (depth, config.max_history), depth))
    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x, logits, gates))
    return arrays if config.use_gating else (*arrays[:3], None)


def value_and_gradients(apply, config, problem, **options):
    def loss(params, x, logits, gates):
        out = apply(branch, params, x, logits, config, gate_logits=gates, **options)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True))(*problem)


def assert_close(actual, expected, atol=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol, rtol=0), actual, expected)


# Weights


@given(
    st.lists(st.floats(-20, 20), min_size=1, max_size=6),
    st.sampled_from(CONFIGS),
    st.integers(0, 3),
    st.floats(-3, 3),
)
def test_weights_are_those_of_the_live_logits(logits, config, dead, gate):
    gate = gate if config.use_gating else None
    settings = {name: getattr(config, name) for name in ("mode", "constraint", "epsilon", "temperature")}
    expected = reference.mixing_weights(
        np.array(logits), gate_logit=gate, prune_threshold=config.prune_threshold, **settings
    )
    with jax.enable_x64(True):
        # What dead positions hold must not matter.
        padded = jnp.asarray([7.0] * dead + logits)
        gate_logit = None if gate is None else jnp.asarray(gate)
        actual = mixing_weights(padded, config, live=len(logits), gate_logit=gate_logit)
    np.testing.assert_allclose(actual, [0.0] * dead + list(expected), atol=1e-9)


def test_weights_of_many_layers_at_once():
    config = MHCConfig(constraint="identity", use_gating=True)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    live, gates = jnp.array([1, 2, 3, 4, 4]), jnp.linspace(-1, 1, 5)
    rows = [mixing_weights(logits[i], config, live=int(live[i]), gate_logit=gates[i]) for i in range(5)]
    assert_close(mixing_weights(logits, config, live=live, gate_logit=gates), jnp.stack(rows), 1e-7)


def test_stochastic_weights_keep_the_constraint():
    config = MHCConfig(constraint="identity", epsilon=0.4, stochastic=True)
    logits = jnp.zeros(4)
    draws = jax.vmap(lambda key: mixing_weights(logits, config, key=key))(jax.random.split(jax.random.key(0), 200))
    assert (draws[:, -1] >= 0.4).all()
    np.testing.assert_allclose(draws.sum(axis=-1), 1.0, atol=1e-6)
    assert draws.std(axis=0).min() > 0.01
    # Evaluation, which gives no key, has no noise.
    assert_close(mixing_weights(logits, config), jnp.array([0.15, 0.15, 0.15, 0.55]), 1e-6)


def test_pruned_weights_get_no_gradient_and_are_not_renormalized():
    config = MHCConfig(prune_threshold=0.2)
    logits = jnp.log(jnp.array([0.1, 0.3, 0.6]))
    np.testing.assert_allclose(mixing_weights(logits, config), [0.0, 0.3, 0.6], atol=1e-6)
    jacobian = jax.jacobian(lambda z: mixing_weights(z, config))(logits)
    np.testing.assert_array_equal(jacobian[0], 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixing_weights(jnp.zeros(0)), "logits must hold at least one"),
        (lambda: mixing_weights(jnp.zeros(3), live=4), "live must be between 1 and the window size 3, got 4"),
        (lambda: mixing_weights(jnp.zeros(3), MHCConfig(use_gating=True)), "gate_logit must be given"),
        (lambda: mixing_weights(jnp.zeros(3), gate_logit=jnp.zeros(())), "gate_logit must be given"),
        (lambda: mixing_weights(jnp.zeros(3), key=jax.random.key(0)), "key draws.*stochastic=False"),
    ],
)
def test_bad_weight_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# One step


def test_mix_of_sequence_and_of_stack():
    rng = np.random.default_rng(0)
    x, states, weights = rng.normal(size=(2, 3)), rng.normal(size=(4, 2, 3)), rng.random(4)
    expected = x + np.einsum("k,kij->ij", weights, states)
    with jax.enable_x64(True):
        assert_close(mix(jnp.asarray(x), jnp.asarray(states), jnp.asarray(weights)), expected)
        assert_close(mix(jnp.asarray(x), [jnp.asarray(s) for s in states], jnp.asarray(weights)), expected)


def test_mix_of_a_pytree_keeps_its_dtypes_and_sums_in_float32():
    x = {"a": jnp.full(4, 256.0, jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    out = mix(x, [x, x, x], jnp.array([0.01, 0.01, 0.01]))
    assert (out["a"].dtype, out["b"].dtype) == (jnp.bfloat16, jnp.float32)
    # Added one by one in bfloat16, 2.56 thrice would be rounded up to 2 * 4 or lost.
    np.testing.assert_array_equal(out["a"], jnp.full(4, 256 + 7.68).astype(jnp.bfloat16))


@pytest.mark.parametrize("states", [jnp.zeros((2, 3)), jnp.zeros((3, 2)), [jnp.zeros(3)] * 2])
def test_mix_names_the_shapes_that_do_not_fit(states):
    with pytest.raises(ValueError, match="states must be 3 states like x"):
        mix(jnp.zeros(3), states, jnp.ones(3))


# Depth


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.mode}-{config.constraint}")
def test_layers_compute_the_recurrence(config):
    depth = 6
    with jax.enable_x64(True):
        params, x, logits, gates = arguments = problem(depth, config)
        (_, out), _ = value_and_gradients(apply_layers, config, arguments)
        plain = apply_layers(branch, params, x, logits, config, gate_logits=gates)
    settings = {name: getattr(config, name) for name in ("mode", "constraint", "epsilon", "temperature")}

    def weights(layer, live):
        gate = None if gates is None else float(gates[layer])
        row = np.asarray(logits[layer, config.max_history - live :])
        return reference.mixing_weights(row, gate_logit=gate, prune_threshold=config.prune_threshold, **settings)

    def numpy_branch(layer, x):
        return np.tanh(x @ np.asarray(params["w"][layer])) + np.asarray(params["b"][layer])

    branches = [partial(numpy_branch, layer) for layer in range(depth)]
    expected = reference.history_states(branches, np.asarray(x), weights, config.max_history)[-1]
    assert_close(out, expected)
    assert_close(plain, expected)


@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from(CONFIGS), st.integers(0, 99))
@settings(max_examples=15)
def test_gradients_equal_those_of_plain_autodiff(depth, max_history, config, seed):
    config = MHCConfig(**{**vars(config), "max_history": max_history})
    with jax.enable_x64(True):
        arguments = problem(depth, config, seed=seed)
        actual = value_and_gradients(apply_layers, config, arguments)
        assert_close(actual, value_and_gradients(apply_layers_reference, config, arguments))


@pytest.mark.parametrize(("depth", "max_history"), [(11, 8), (11, 9), (19, 15), (12, 40)])
def test_gradients_of_wide_windows(depth, max_history):
    config = MHCConfig(max_history=max_history)
    with jax.enable_x64(True):
        params, x, logits, _ = problem(depth, config)

        def loss(apply, params, x, logits):
            pair = {"a": x, "b": 2 * x[0]}

            def pair_branch(params, x):
                return {"a": branch(params, x["a"]), "b": jnp.sin(x["b"]) * params["b"]}

            out = apply(pair_branch, params, pair, logits, config)
            return jnp.sum(jnp.sin(out["a"])) + jnp.sum(jnp.cos(out["b"]))

        gradients = jax.grad(loss, argnums=(1, 2, 3))
        assert_close(
            gradients(apply_layers, params, x, logits), gradients(apply_layers_reference, params, x, logits), 1e-9
        )


def test_gradients_equal_finite_differences():
    config = MHCConfig(max_history=3, constraint="identity", use_gating=True)
    with jax.enable_x64(True):
        params, x, logits, gates = arguments = problem(5, config)
        _, (d_params, d_x, d_logits, d_gates) = value_and_gradients(apply_layers, config, arguments)

        @jax.jit
        def loss(w, x, logits, gates):
            out = apply_layers(branch, {**params, "w": w}, x, logits, config, gate_logits=gates)
            return jnp.sum(jnp.sin(out))

        values = [np.asarray(leaf) for leaf in (params["w"], x, logits, gates)]
        for position, gradient in enumerate((d_params["w"], d_x, d_logits, d_gates)):

            def partial_loss(value, position=position):
                return float(loss(*values[:position], jnp.asarray(value), *values[position + 1 :]))

            assert_close(gradient, reference.finite_differences(partial_loss, values[position]), 1e-8)


def test_any_state_params_and_keys():
    config = MHCConfig(max_history=2)
    depth = 4

    def pair_branch(params, state, key):
        (scale, steps), (x, y) = params, state
        kept = jax.random.bernoulli(key, 0.5, x.shape) & (steps > 0)
        return jnp.where(kept, y * scale, 0.0), jnp.sum(x) * scale

    with jax.enable_x64(True):
        params = (jnp.linspace(0.5, 1.0, depth), jnp.arange(depth))
        x = (jnp.arange(6.0).reshape(2, 3), jnp.asarray(0.3))
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(depth, 2)))
        keys = jax.random.split(jax.random.key(0), depth)

        def loss(apply, params, x, logits):
            return jnp.sum(apply(pair_branch, params, x, logits, config, keys=keys)[0])

        gradients = [
            jax.jit(jax.grad(partial(loss, apply), argnums=(0, 1, 2), allow_int=True))(params, x, logits)
            for apply in (apply_layers, apply_layers_reference)
        ]
    assert_close(gradients[0][0][0], gradients[1][0][0])
    assert_close(gradients[0][1:], gradients[1][1:])


def test_shared_arrays_that_the_branch_closes_over():
    config = MHCConfig(max_history=3)
    with jax.enable_x64(True):
        params, x, logits, _ = problem(5, config)

        def loss(apply, shared, mask):
            def closing(params, x):
                return jnp.where(mask, shared * branch(params, x), 0.0)

            return jnp.sum(apply(closing, params, x, logits, config) ** 2)

        arguments = (jnp.arange(1.0, 5.0), jnp.arange(4) % 2 == 0)
        actual = jax.jit(jax.grad(partial(loss, apply_layers)))(*arguments)
        assert_close(actual, jax.jit(jax.grad(partial(loss, apply_layers_reference)))(*arguments))


def test_a_checkpoint_policy_changes_what_is_stored_and_nothing_else():
    config = MHCConfig(max_history=3)
    with jax.enable_x64(True):
        arguments = problem(6, config)
        expected = value_and_gradients(apply_layers, config, arguments)
        policy = jax.checkpoint_policies.nothing_saveable
        assert_close(value_and_gradients(apply_layers, config, arguments, policy=policy), expected)

        def temporaries(policy):
            step = jax.jit(partial(value_and_gradients, apply_layers, config, policy=policy))
            return step.lower(problem(50, config, batch=64)).compile().memory_analysis().temp_size_in_bytes

        assert temporaries(policy) < temporaries(None)


@pytest.mark.parametrize(("max_history", "limit"), [(4, 1.05), (16, 1.12)])
def test_a_backward_pass_stores_every_state_once(max_history, limit):
    config, residual = MHCConfig(max_history=max_history), MHCConfig(max_history=max_history, mode="residual")

    def temporaries(apply, config):
        arguments = problem(50, config, width=64, batch=32, dtype=np.float32)
        step = jax.jit(partial(value_and_gradients, apply, config))
        return step.lower(arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(apply_layers, config) <= limit * temporaries(_residual_scan, residual)


def _residual_scan(branch, params, x, logits, config, **_):
    return jax.lax.scan(lambda x, params: (x + branch(params, x), None), x, params)[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_states_keep_their_dtype(dtype):
    config = MHCConfig(max_history=3)
    params, x, logits, _ = problem(5, config, dtype=np.float32)
    half = (jax.tree.map(lambda leaf: leaf.astype(dtype), params), x.astype(dtype), logits, None)
    (_, out), gradients = value_and_gradients(apply_layers, config, half)
    (_, expected), _ = value_and_gradients(apply_layers_reference, config, half)
    assert out.dtype == dtype
    assert gradients[1].dtype == dtype
    assert gradients[2].dtype == jnp.float32
    assert_close(out.astype(jnp.float32), expected.astype(jnp.float32), 0.1)


def test_a_branch_of_another_precision_is_cast_to_the_state():
    config = MHCConfig(max_history=2)
    params, x, logits, _ = problem(3, config, dtype=np.float32)

    def half_branch(params, x):
        return branch(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16))

    out = apply_layers(half_branch, params, x, logits, config)
    assert out.dtype == jnp.float32
    # A compiled branch may skip roundings to bfloat16 that one run operation by operation makes.
    assert_close(out, apply_layers_reference(half_branch, params, x, logits, config), 0.05)


def test_stochastic_layers_draw_from_their_key_alone():
    config = MHCConfig(max_history=3, stochastic=True)
    with jax.enable_x64(True):
        arguments = problem(5, config)
        key = jax.random.key(0)
        actual = value_and_gradients(apply_layers, config, arguments, mixing_key=key)
        assert_close(actual, value_and_gradients(apply_layers_reference, config, arguments, mixing_key=key))
        other = value_and_gradients(apply_layers, config, arguments, mixing_key=jax.random.key(1))
    assert np.abs(actual[0][1] - other[0][1]).max() > 1e-3


# Transformations


def test_vmap_over_inputs_and_over_models():
    config = MHCConfig(max_history=3)
    with jax.enable_x64(True):
        problems = [problem(5, config, seed=seed) for seed in range(3)]
        batched = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
        actual = jax.vmap(partial(value_and_gradients, apply_layers, config))(batched)
        expected = [value_and_gradients(apply_layers_reference, config, each) for each in problems]
        assert_close(actual, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


@pytest.mark.parametrize("detach_history", [False, True])
@pytest.mark.parametrize(("depth", "max_history"), [(4, 2), (10, 9)])
def test_second_derivatives(depth, max_history, detach_history):
    config = MHCConfig(max_history=max_history, detach_history=detach_history)
    with jax.enable_x64(True):
        params, x, logits, _ = problem(depth, config, width=2)
        # Of logits and input together: with detached history, what is mixed is a constant in both derivatives.
        logits, unravel = ravel_pytree((logits[:, -2:], x[:1]))

        def loss(apply, flat):
            live, first = unravel(flat)
            out = apply(branch, params, first, jnp.pad(live, ((0, 0), (max_history - 2, 0))), config)
            return jnp.sum(jnp.sin(out))

        expected = jax.jit(jax.hessian(partial(loss, apply_layers_reference)))(logits)
        assert np.abs(expected).max() > 1e-3
        assert_close(jax.jit(jax.hessian(partial(loss, apply_layers)))(logits), expected)
        assert_close(jax.jit(jax.jacrev(jax.jacrev(partial(loss, apply_layers))))(logits), expected)


def test_forward_mode_names_what_to_use_instead():
    config = MHCConfig(max_history=2)
    params, x, logits, _ = problem(4, config, dtype=np.float32)
    with pytest.raises(TypeError, match="use apply_layers_reference"):
        jax.jvp(lambda x: apply_layers(branch, params, x, logits, config), (x,), (x,))
    jax.jvp(lambda x: apply_layers_reference(branch, params, x, logits, config), (x,), (x,))


def test_shard_map_over_the_batch():
    config = MHCConfig(max_history=3)
    params, _, logits, _ = problem(5, config, dtype=np.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(params, x, logits):
        return jnp.sum(jnp.sin(apply_layers(branch, params, x, logits, config)))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=(P(), P("data"), P()))
    def sharded(params, x, logits):
        # Gradients are taken on the device's own copy, and then added up over the devices.
        params, logits = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), (params, logits))
        d_params, d_x, d_logits = jax.grad(loss, argnums=(0, 1, 2))(params, x, logits)
        return jax.lax.psum(d_params, "data"), d_x, jax.lax.psum(d_logits, "data")

    whole = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    assert_close(jax.jit(sharded)(params, x, logits), whole(params, x, logits), 1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_train_step_exports(platform):
    config = MHCConfig(max_history=3, constraint="sparse", use_gating=True)
    step = jax.jit(partial(value_and_gradients, apply_layers, config))
    arguments = problem(5, config, dtype=np.float32)
    exported = jax.export.export(step, platforms=[platform])(arguments)
    assert exported.platforms == (platform,)
    if platform == "cpu":
        again = jax.export.deserialize(exported.serialize())
        assert_close(again.call(arguments), step(arguments), 1e-6)


def test_program_size_does_not_grow_with_depth():
    config = MHCConfig(max_history=3)

    def operations(depth):
        step = jax.jit(partial(value_and_gradients, apply_layers, config))
        return len(step.lower(problem(depth, config, dtype=np.float32)).as_text().splitlines())

    # The weights' band is a gather whose index tables are printed on one line each, however long.
    assert operations(200) == operations(10)


# Outside jit


def tanh(x):
    return jnp.tanh(x)


@pytest.mark.parametrize("activation", [tanh, jax.nn.relu])
def test_a_second_call_outside_jit_compiles_nothing(activation):
    config = MHCConfig(max_history=2)
    params, x, logits, _ = problem(3, config, dtype=np.float32)

    def closing(params, x):
        return activation(x @ params["w"])

    def step(params):
        return jnp.sum(apply_layers(closing, params, x, logits, config))

    value_and_grad = jax.value_and_grad(step)
    step(params), value_and_grad(params)
    with counted() as compiled:
        step(params), value_and_grad(params)
    assert not compiled


def test_what_a_branch_closes_over_is_never_of_an_earlier_call():
    class Held:
        scale, power, array, slope = 1.0, 2, jnp.ones(4), 1.0

        def __call__(self, params, x):
            return self.scale * x**self.power * self.array * params + clipped(x, self.slope)

    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def clipped(x, slope):
        return x

    clipped.defvjp(lambda x, slope: (x, None), lambda slope, _, g: (slope * g,))
    held, config = Held(), MHCConfig(mode="residual")
    params, x = jnp.ones((2, 4)), jnp.linspace(0.1, 0.4, 4)

    def both():
        def loss(apply, x):
            return jnp.sum(apply(held, params, x, None, config))

        own, reference = (
            jax.value_and_grad(partial(loss, apply))(x) for apply in (apply_layers, apply_layers_reference)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), own, reference)
        return own

    seen = [both()]
    # A number, a static argument, an array, and a number that only a derivative rule reads.
    for name, value in (("scale", 3.0), ("power", 3), ("array", 2 * jnp.ones(4)), ("slope", 5.0)):
        setattr(held, name, value)
        seen.append(both())
    gradients = [gradient for _, gradient in seen]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(gradients[1:], gradients[:-1], strict=True))


def test_gradients_without_jit():
    config = MHCConfig(max_history=2)
    params, x, logits, _ = problem(3, config, dtype=np.float32)
    gradient = jax.grad(lambda x: jnp.sum(apply_layers(branch, params, x, logits, config)))
    with jax.disable_jit():
        operation_by_operation = gradient(x)
    assert_close(operation_by_operation, gradient(x), 1e-5)


# Ends of the range


@pytest.mark.parametrize("apply", [apply_layers, apply_layers_reference])
def test_no_layers_are_the_identity(apply):
    config = MHCConfig(max_history=3)
    params, x, logits, _ = problem(0, config, dtype=np.float32)
    assert_close(apply(branch, params, x, logits, config), x)
    assert_close(jax.grad(lambda x: jnp.sum(apply(branch, params, x, logits, config)))(x), jnp.ones_like(x))


def test_a_number_for_a_state():
    config = MHCConfig(max_history=2)
    out = apply_layers(lambda p, x: p * x, jnp.ones(3), 1.5, jnp.zeros((3, 2)), config)
    assert out == apply_layers(lambda p, x: p * x, jnp.ones(3), jnp.float32(1.5), jnp.zeros((3, 2)), config)


@pytest.mark.parametrize("max_history", [2, 9])
def test_what_is_infinite_spoils_nothing_else(max_history):
    config = MHCConfig(max_history=max_history)
    x = jnp.array([jnp.inf, 0.5])
    arguments = jnp.ones(10), x, jnp.zeros((10, max_history))

    def loss(apply, x):
        return jnp.sum(apply(lambda p, x: p * jnp.tanh(x), arguments[0], x, arguments[2], config))

    def outcome(apply):
        out = apply(lambda p, x: p * jnp.tanh(x), *arguments, config)
        return out, jax.grad(partial(loss, apply))(x)

    out, gradient = outcome(apply_layers)
    assert np.isposinf(out[0])
    assert np.isfinite([out[1], *gradient]).all()
    assert_close((out[1], gradient), (lambda out, gradient: (out[1], gradient))(*outcome(apply_layers_reference)), 1e-5)


def test_logits_of_8_bits_and_the_least_temperature():
    logits = jnp.array([1.0, 2.0, -300.0])
    low = logits.astype(jnp.float8_e5m2)
    assert_close(mixing_weights(low), mixing_weights(low.astype(jnp.float32)))
    for constraint in ("simplex", "sparse"):
        config = MHCConfig(constraint=constraint, temperature=2e-38)
        np.testing.assert_array_equal(mixing_weights(logits, config), [0, 1, 0])
    with pytest.raises(ValueError, match=r"temperature must be .*, got 1e-46; the least in float32 is 2\*\*-126"):
        MHCConfig(temperature=1e-46)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": jnp.zeros((5, 4))}, ValueError, r"logits must have shape \(L, max_history=3\), got \(5, 4\)"),
        ({"logits": None}, ValueError, "logits can be left out in mode 'residual' only"),
        ({"logits": jnp.zeros((4, 3))}, ValueError, r"params\['b'\] must have a leading axis of 4.*\(5, 4\)"),
        ({"x": jnp.zeros((2, 4), jnp.int32)}, TypeError, "x must be floating-point, got int32"),
        (
            {"x": jnp.zeros((2, 4), jnp.float8_e4m3fn)},
            TypeError,
            "x must be floating-point, got float8_e4m3fn: 16 bits",
        ),
        ({"branch": lambda params, x: x[:1]}, ValueError, r"branch must return.*\(2, 4\).*\(1, 4\)"),
    ],
)
@pytest.mark.parametrize("apply", [apply_layers, apply_layers_reference])
def test_bad_layer_arguments_are_named(apply, change, error, message):
    config = MHCConfig(max_history=3)
    params, x, logits, _ = problem(5, config, dtype=np.float32)
    arguments = {"branch": branch, "params": params, "x": x, "logits": logits, "config": config}
    with pytest.raises(error, match=message):
        apply(**{**arguments, **change})


@pytest.mark.parametrize(("where", "message"), [("x", "x is"), ("logits", "logits of layer 3 is"), ("b", "layer 2 is")])
def test_what_is_not_finite_is_named_when_asked(where, message):
    config = MHCConfig(max_history=3)
    params, x, logits, _ = problem(5, config, dtype=np.float32)
    if where == "x":
        x = x.at[0, 0].set(jnp.nan)
    elif where == "logits":
        logits = logits.at[3, 1].set(jnp.inf)
    else:
        params["b"] = params["b"].at[2, 0].set(jnp.nan)
    gradient = jax.jit(jax.grad(lambda params, x, logits: jnp.sum(apply_layers(branch, params, x, logits, config))))
    gradient(params, x, logits)
    with pytest.raises(FloatingPointError, match=message):  # although it has been compiled without the checks
        report_nonfinite(gradient)(params, x, logits)


def test_residual_mode_needs_no_logits():
    config = MHCConfig(mode="residual")
    params, x, _, _ = problem(5, config, dtype=np.float32)
    assert_close(apply_layers(branch, params, x, None, config), _residual_scan(branch, params, x, None, config), 1e-6)
