"""The train step, its diagnostics, its checks, and its placement on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mhc_jax.models import Decoder, DecoderConfig, MHCResNet
from mhc_jax.monitoring import diagnostics
from mhc_jax.monitoring.dashboard import dashboard
from mhc_jax.monitoring.figures import composite_gain, window_matrices
from mhc_jax.monitoring.nonfinite import report_nonfinite
from mhc_jax.nn import HyperConnections, MatrixMHCSkip, MHCSequential, MHCStack, StreamStack
from mhc_jax.training import TrainState, make_train_step
from mhc_jax.training.sharding import data_mesh, fully_sharded, replicated, shard_batch
from tests import streams_reference

WIDTH = 16


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.gelu(self.linear(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs, depth=5):
        self.stack = MHCStack(Block, depth, init="uniform", use_gating=True, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.stack(x)))


def loss_fn(model, batch):
    logits = model(batch["x"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}


def make_batch(seed=0, rows=32):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(rows, WIDTH)).astype(np.float32), "y": rng.integers(0, 3, rows)}


def test_a_step_is_the_optimizer_applied_to_the_gradient():
    model = Model(nnx.Rngs(0))
    optimizer = optax.adamw(1e-2)
    state = TrainState.create(model, optimizer)
    state, metrics = make_train_step(loss_fn, optimizer)(state, make_batch())

    (loss, aux), grads = nnx.jit(nnx.value_and_grad(loss_fn, has_aux=True))(model, make_batch())
    params = nnx.state(model, nnx.Param)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    expected = optax.apply_updates(params, updates)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert metrics["accuracy"] == aux["accuracy"]
    assert state.step == 1
    # Adam's first update is ±lr however small a gradient: compare where rounding cannot turn its sign.
    solid = jax.tree.map(lambda g: jnp.abs(g) > 1e-5, grads)
    jax.tree.map(
        lambda a, b, s: np.testing.assert_allclose(a[s], b[s], rtol=1e-3, atol=1e-6), state.params, expected, solid
    )
    # Batch statistics and dropout streams went on as well, and the model given is as it was but for its own forward.
    jax.tree.map(np.testing.assert_allclose, state.model.norm.mean[...], model.norm.mean[...])
    assert (state.model.stack.layers.dropout.rngs.count[...] == 1).all()


def test_the_state_is_donated_and_the_model_it_came_from_is_not():
    model = Model(nnx.Rngs(0))
    optimizer = optax.sgd(0.1)
    state = TrainState.create(model, optimizer)
    new_state, _ = make_train_step(loss_fn, optimizer)(state, make_batch())
    assert state.params["head"]["kernel"][...].is_deleted()
    assert not new_state.params["head"]["kernel"][...].is_deleted()
    assert np.isfinite(model.head.kernel[...]).all()


def test_a_metric_must_not_take_the_name_of_another():
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda model, batch: (loss_fn(model, batch)[0], {"loss": 0.0}), optimizer)
    with pytest.raises(ValueError, match=r"\['loss'\]"):
        step(TrainState.create(Model(nnx.Rngs(0)), optimizer), make_batch())


def test_a_loss_comes_with_metrics():
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda model, batch: loss_fn(model, batch)[0], optimizer)
    with pytest.raises(TypeError, match="loss_fn must return"):
        step(TrainState.create(Model(nnx.Rngs(0)), optimizer), make_batch())


@pytest.mark.parametrize("place", [None, fully_sharded])
def test_a_batch_in_parts_is_one_update(place):
    def linear_loss(model, batch):
        logits = model.head(batch["x"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return loss, {"accuracy": (logits.argmax(-1) == batch["y"]).mean()}

    optimizer = optax.sgd(0.1)
    states = []
    for accumulate in (1, 4):
        state = TrainState.create(Model(nnx.Rngs(0)), optimizer)
        batch, shardings = make_batch(), None
        if place:
            shardings = place(state, data_mesh())
            state, batch = jax.device_put(state, shardings), shard_batch(batch, data_mesh())
        step = make_train_step(linear_loss, optimizer, accumulate=accumulate, shardings=shardings)
        state, metrics = step(state, batch)
        states.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *states)


def test_each_part_of_a_batch_draws_its_own_dropout():
    optimizer = optax.sgd(0.1)
    state = TrainState.create(Model(nnx.Rngs(0)), optimizer)
    state, _ = make_train_step(loss_fn, optimizer, accumulate=4)(state, make_batch())
    assert (state.model.stack.layers.dropout.rngs.count[...] == 4).all()


def test_parts_must_divide_a_batch():
    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn, optimizer, accumulate=5)
    with pytest.raises(ValueError, match=r"shape \(32, .* multiple of 5 rows"):
        step(TrainState.create(Model(nnx.Rngs(0)), optimizer), make_batch())
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        make_train_step(loss_fn, optimizer, accumulate=0)


# Diagnostics


def test_the_step_reports_every_connection():
    optimizer = optax.sgd(0.1)
    model = Model(nnx.Rngs(0))
    step = make_train_step(loss_fn, optimizer, diagnose=diagnostics.diagnose)
    _, metrics = step(TrainState.create(model, optimizer), make_batch())
    report = metrics["diagnostics"]["stack"]
    grads, _ = nnx.jit(nnx.grad(loss_fn, has_aux=True))(model, make_batch())

    live = np.array([1, 2, 3, 4, 4])
    np.testing.assert_allclose(report["entropy"], np.log(live), atol=1e-6)
    np.testing.assert_allclose(report["effective_window"], (live + 1) / 2, rtol=1e-6)
    layers = jax.tree.leaves(grads["stack"]["layers"])
    by_depth = np.sqrt([sum(float((leaf[l] ** 2).sum()) for leaf in layers) for l in range(5)])  # noqa: E741
    np.testing.assert_allclose(report["grad_norm"], by_depth, rtol=1e-4)
    logits = np.linalg.norm(grads["stack"]["mixing_logits"][...], axis=1)
    np.testing.assert_allclose(report["logits_grad_norm"], logits, rtol=1e-4, atol=1e-8)
    assert 0 < report["gain_forward"] <= 1.0


def test_diagnostics_find_all_kinds_of_connections_at_any_depth():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.parts = nnx.List([MHCSequential([nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.0, rngs=rngs)])])
            self.matrix = MatrixMHCSkip(3, rngs=rngs)
            self.resnet = MHCResNet((1, 1), 2, in_features=1, features=2, rngs=rngs)

        def __call__(self, x):
            x = self.matrix(self.parts[0](x), [x, 2 * x])
            return self.resnet(x[..., None, None]).sum()

    net = Net(nnx.Rngs(0))
    grads = nnx.jit(nnx.grad(lambda net: net(jnp.ones((2, 4)))))(net)
    report = nnx.jit(diagnostics.diagnose)(net, grads)
    assert set(report) == {"parts/0", "matrix", "resnet"}
    assert report["parts/0"]["weights"].shape == (2, 4)
    assert report["parts/0"]["grad_norm"][1] == 0  # dropout has no parameters
    np.testing.assert_allclose(report["matrix"]["column_sum_error"], 0.0, atol=1e-6)
    assert report["resnet"]["grad_norm"].shape == (2,)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), report))


class TwoBranches(nnx.Module):
    """A layer of a stream network."""

    def __init__(self, rngs, index):
        first, second = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
        self.attention = HyperConnections(first, 6, streams=3, iterations=4, layer_index=2 * index)
        self.mlp = HyperConnections(second, 6, streams=3, iterations=4, layer_index=2 * index + 1)

    def __call__(self, streams):
        return self.mlp(self.attention(streams))


def test_diagnostics_of_stream_networks():
    model = nnx.Dict(stack=StreamStack(TwoBranches, 3, 3, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    layers = model.stack.layers
    for connection in (layers.attention, layers.mlp):
        connection.bias.set_value(jnp.asarray(rng.normal(size=connection.bias.shape), jnp.float32))
    grads = nnx.jit(nnx.grad(lambda model: jnp.mean(model.stack(jnp.ones((1, 4, 6))) ** 2)))(model)
    report = nnx.jit(diagnostics.diagnose)(model, grads)
    assert set(report) == {"stack"}
    figures = report["stack"]

    metrics, weights = dashboard(model, report)
    assert len(weights) == 6 * (2 + 3)

    product = np.eye(3)
    for branch in range(6):
        connection = (layers.attention, layers.mlp)[branch % 2]
        bias = np.asarray(connection.bias[branch // 2], np.float64)
        pre, post, res = streams_reference.maps(None, None, bias, np.zeros((3, 6)), iterations=4)
        for name, expected in {"pre": pre, "post": post, "res": res, "alpha": connection.alpha[branch // 2]}.items():
            np.testing.assert_allclose(figures[name][branch], expected, rtol=1e-5)
        np.testing.assert_allclose(figures["row_sum_error"][branch], np.abs(res.sum(1) - 1).max(), atol=1e-6)
        np.testing.assert_allclose(figures["column_sum_error"][branch], np.abs(res.sum(0) - 1).max(), atol=1e-6)
        distance = np.abs(res - np.eye(3)).max()
        np.testing.assert_allclose(figures["identity_distance"][branch], distance, rtol=1e-5)
        np.testing.assert_allclose(figures["entropy"][branch], -(res * np.log(res)).sum(1), rtol=1e-5)
        name = f"stack.layers.{branch // 2}.{('attention', 'mlp')[branch % 2]}"
        for row, expected in {"pre": pre, "post": post, **{f"res.{i}": res[i] for i in range(3)}}.items():
            np.testing.assert_allclose(weights[f"{name}.{row}"], expected, rtol=1e-5)
            shown = [metrics[f"mhc/{name}.{row}/alpha_{i}"] for i in range(3)]
            np.testing.assert_allclose(shown, expected, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"mhc/{name}/identity_distance"], distance, rtol=1e-5)
        product = res @ product
        own = grads["stack"]["layers"][("attention", "mlp")[branch % 2]]
        squares = {name: np.sum(np.square(own[name][branch // 2])) for name in ("phi", "alpha", "bias")}
        np.testing.assert_allclose(figures["maps_grad_norm"][branch], np.sqrt(sum(squares.values())), rtol=1e-4)
        leaves = [np.sum(np.square(leaf[branch // 2])) for leaf in jax.tree.leaves(own["branch"])]
        np.testing.assert_allclose(figures["grad_norm"][branch], np.sqrt(sum(leaves)), rtol=1e-4)
    np.testing.assert_allclose(figures["gain_forward"], np.abs(product).sum(1).max(), rtol=1e-4)
    np.testing.assert_allclose(figures["gain_backward"], np.abs(product).sum(0).max(), rtol=1e-4)
    assert metrics["mhc/stack/gain_forward"] == figures["gain_forward"]
    assert metrics["mhc/stack/gain_backward"] == figures["gain_backward"]


def test_diagnostics_of_a_decoder():
    config = DecoderConfig(8, features=6, mlp_features=6, depth=3, num_heads=1)
    model = Decoder(config, "streams", streams=3, rngs=nnx.Rngs(0))
    grads = nnx.jit(nnx.grad(lambda model: model.loss(jnp.ones((1, 4), int))))(model)
    figures = nnx.jit(diagnostics.diagnose)(model, grads)["stack"]
    assert figures["res"].shape == (6, 3, 3)
    expected = [np.linalg.norm(grads["stack"]["layers"][name]["bias"][1]) for name in ("attn_hc", "ffn_hc")]
    assert (np.asarray(figures["maps_grad_norm"][2:4]) >= expected).all()
    # Norms and projections of both branches, which lie beside their connections.
    layers = grads["stack"]["layers"]
    branches = [("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")]
    squares = [
        sum(np.square(leaf[1]).sum() for name in names for leaf in jax.tree.leaves(layers[name])) for names in branches
    ]
    np.testing.assert_allclose(figures["grad_norm"][2:4], np.sqrt(squares), rtol=1e-5)


def test_a_lone_hyper_connection_is_a_stack_of_one():
    layer = HyperConnections(jnp.tanh, 6, streams=2, dynamic=False)
    grads = nnx.jit(nnx.grad(lambda layer: layer(jnp.ones((3, 2, 6))).sum()))(layer)
    figures = nnx.jit(diagnostics.diagnose)(layer, grads)["model"]
    assert figures["res"].shape == (1, 2, 2)
    assert figures["grad_norm"] == 0  # the branch has no parameters
    np.testing.assert_allclose(figures["maps_grad_norm"], np.linalg.norm(grads["bias"][...]), rtol=1e-5)
    assert "alpha" not in figures


def test_composite_gain_is_that_of_the_product():
    matrices = np.random.default_rng(0).normal(size=(6, 3, 3)).astype(np.float32)
    product = np.linalg.multi_dot(matrices[::-1])
    forward, backward = composite_gain(jnp.asarray(matrices))
    np.testing.assert_allclose(forward, np.abs(product).sum(1).max(), rtol=1e-4)
    np.testing.assert_allclose(backward, np.abs(product).sum(0).max(), rtol=1e-4)


def test_window_matrices_carry_the_window_from_layer_to_layer():
    weights = np.random.default_rng(1).dirichlet(np.ones(3), size=4).astype(np.float32)
    window = np.arange(3.0)
    for row in weights:
        window = np.append(window[1:], row @ window)
    carried = np.arange(3.0)
    for matrix in window_matrices(jnp.asarray(weights)):
        carried = matrix @ carried
    np.testing.assert_allclose(carried, window, rtol=1e-6)


# Checks


def poisoned(where):
    model = Model(nnx.Rngs(0))
    if where == "logits":
        model.stack.mixing_logits[...] = model.stack.mixing_logits.at[3, 1].set(jnp.nan)
    elif where == "branch":
        model.stack.layers.linear.kernel[...] = model.stack.layers.linear.kernel.at[2].set(jnp.inf)
    elif where == "head":
        model.head.bias[...] = model.head.bias.at[0].set(jnp.nan)
    return model


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("logits", "logits of layer 3 is not finite"),
        ("branch", "branch of layer 2 is not finite"),
        ("head", "loss is not finite"),
        ("input", "x is not finite"),
    ],
)
def test_a_nan_is_reported_where_it_comes_from_when_asked(where, message):
    optimizer = optax.sgd(0.1)
    batch = make_batch()
    if where == "input":
        batch["x"][0, 0] = np.nan
    step = make_train_step(loss_fn, optimizer)
    state = TrainState.create(poisoned(where), optimizer)
    with pytest.raises(FloatingPointError, match=message):
        report_nonfinite(step)(state, batch)
    _, metrics = step(state, batch)  # the state is still there; unasked, nothing is raised
    assert not np.isfinite(metrics["loss"])


def test_checked_steps_compute_the_same():
    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn, optimizer)
    state = TrainState.create(Model(nnx.Rngs(0)), optimizer)
    _, checked = report_nonfinite(step)(state, make_batch())
    _, plain = step(state, make_batch())
    np.testing.assert_allclose(checked["loss"], plain["loss"], rtol=1e-6)


def test_sequential_names_the_layer_of_a_nan():
    rngs = nnx.Rngs(0)
    model = MHCSequential([nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)])
    model.wrapped_modules[1].bias[...] = jnp.full(4, jnp.inf)
    with pytest.raises(FloatingPointError, match=r"branch of layer 1 \(LayerNorm\) is not finite"):
        report_nonfinite(lambda model, x: model(x))(model, jnp.ones((2, 4)))


# Placement


@pytest.mark.parametrize("place", [replicated, fully_sharded])
def test_eight_devices_compute_what_one_does(place):
    assert jax.device_count() == 8
    optimizer = optax.adam(1e-2)

    def train(shardings, mesh):
        state = TrainState.create(Model(nnx.Rngs(0)), optimizer)
        if mesh is not None:
            shardings = place(state, mesh)
            state = jax.device_put(state, shardings)
        step = make_train_step(loss_fn, optimizer, diagnose=diagnostics.diagnose, shardings=shardings)
        history = []
        for seed in range(3):
            batch = make_batch(seed)
            state, metrics = step(state, batch if mesh is None else shard_batch(batch, mesh))
            history.append(metrics)
        return state, history, shardings

    one, expected, _ = train(None, None)
    many, metrics, shardings = train(None, data_mesh())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), metrics, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), many.params, one.params)
    assert jax.tree.all(jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), many, shardings))
    shards = many.params["stack"]["layers"]["linear"]["kernel"][...].addressable_shards
    assert shards[0].data.size * (8 if place is fully_sharded else 1) == 5 * WIDTH * WIDTH


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"'y' of shape \(31,\) must have a multiple of 8 rows"):
        shard_batch({"y": np.zeros(31)}, data_mesh())
    assert shard_batch(np.zeros(6), data_mesh(tensor=4)).sharding.shard_shape((6,)) == (3,)
    with pytest.raises(ValueError, match="tensor=3 times sequence=2 must divide the 8 devices"):
        data_mesh(tensor=3, sequence=2)


def test_rows_that_would_lie_on_several_processes_are_refused(monkeypatch):
    def shared(self):
        return self.id // 2

    monkeypatch.setattr(type(jax.devices()[0]), "process_index", property(shared))
    with pytest.raises(ValueError, match="tensor=4 times sequence=1 devices of a row must lie in one process"):
        data_mesh(tensor=4)
