"""Optimizer state crosses over: half of the steps on each side is the same training as all of them on one."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
from tests.bridge.models import JaxModel, TorchModel, randomize, to64

STEPS = 3
ADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
KINDS = {
    "adam": (
        lambda: optax.adam(0.005, **ADAM),
        lambda p: torch.optim.Adam(p, 0.005, betas=(0.8, 0.95), eps=1e-6),
    ),
    "adamw with clipping": (
        lambda: optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(0.005, **ADAM, weight_decay=0.1)),
        lambda p: torch.optim.AdamW(p, 0.005, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
    ),
    "sgd": (lambda: optax.sgd(0.005), lambda p: torch.optim.SGD(p, 0.005)),
    "momentum": (lambda: optax.sgd(0.005, momentum=0.7), lambda p: torch.optim.SGD(p, 0.005, momentum=0.7)),
    "nesterov": (
        lambda: optax.sgd(0.005, momentum=0.7, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.005, momentum=0.7, nesterov=True),
    ),
}
OPTIONS = {"use_gating": True, "init": "uniform"}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def models(kind="stack"):
    """Two models with equal weights: the stack with history, or (quick to compile) two layers."""
    if kind == "stack":
        torch_model, jax_model = TorchModel(**OPTIONS), JaxModel(**OPTIONS)
    else:
        rngs = nnx.Rngs(0)
        torch_model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
        jax_model = nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.tanh, nnx.Linear(6, 2, rngs=rngs))
    return bridge.convert(randomize(torch_model.double()), to64(jax_model)), torch_model


X = np.random.default_rng(0).standard_normal((8, 5))
Y = np.random.default_rng(1).standard_normal((8, 2))


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model))


def train_jax(model, optimizer, steps):
    for _ in range(steps):
        step(model, optimizer)


def train_torch(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(torch.tensor(X)) - torch.tensor(Y)) ** 2).mean().backward()
        optimizer.step()


def assert_same_weights(jax_model, torch_model):
    expected = bridge.convert(jax_model, copy.deepcopy(torch_model)).state_dict()
    for name, tensor in torch_model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12, msg=name)


cases = pytest.mark.parametrize(("kind", "model"), [*((kind, "layers") for kind in KINDS), ("adam", "stack")])


@cases
def test_training_goes_on_in_torch(kind, model):
    make_optax, make_torch = KINDS[kind]
    jax_model, torch_model = models(model)
    ours = nnx.Optimizer(jax_model, make_optax(), wrt=nnx.Param)
    train_jax(jax_model, ours, STEPS)
    bridge.convert(jax_model, torch_model)
    theirs = bridge.convert_optimizer(ours, make_torch(torch_model.parameters()), jax_model, torch_model)
    train_torch(torch_model, theirs, STEPS)
    train_jax(jax_model, ours, STEPS)
    assert_same_weights(jax_model, torch_model)


@cases
def test_training_goes_on_in_jax(kind, model):
    make_optax, make_torch = KINDS[kind]
    jax_model, torch_model = models(model)
    theirs = make_torch(torch_model.parameters())
    train_torch(torch_model, theirs, STEPS)
    bridge.convert(torch_model, jax_model)
    ours = nnx.Optimizer(jax_model, make_optax(), wrt=nnx.Param)
    bridge.convert_optimizer(theirs, ours, jax_model, torch_model)
    train_jax(jax_model, ours, STEPS)
    train_torch(torch_model, theirs, STEPS)
    assert_same_weights(jax_model, torch_model)


def test_optax_state_is_converted_without_being_changed():
    jax_model, torch_model = models()
    theirs = torch.optim.Adam(torch_model.parameters())
    train_torch(torch_model, theirs, 2)
    state = optax.adam(optax.linear_schedule(1.0, 0.0, 9)).init(nnx.state(jax_model, nnx.Param))
    new = bridge.convert_optimizer(theirs, state, jax_model, torch_model)
    assert [int(part.count) for part in (state[0], state[1], new[0], new[1])] == [0, 0, 2, 2]
    kernel = new[0].mu["head"]["kernel"].get_value()
    np.testing.assert_array_equal(kernel.T, theirs.state[torch_model.head.weight]["exp_avg"])
    assert not state[0].mu["head"]["kernel"].get_value().any()
    assert optax.tree_utils.tree_get(new, "mu")["body"]["mixing_logits"].get_value().any()


def test_sgd_with_a_schedule_must_be_told_the_steps():
    jax_model, torch_model = models()
    theirs = torch.optim.SGD(torch_model.parameters(), 0.1, momentum=0.9)
    state = optax.sgd(optax.linear_schedule(1.0, 0.0, 9), momentum=0.9).init(nnx.state(jax_model, nnx.Param))
    with pytest.raises(ValueError, match="steps: SGD does not count"):
        bridge.convert_optimizer(theirs, state, jax_model, torch_model)
    assert int(bridge.convert_optimizer(theirs, state, jax_model, torch_model, steps=7)[1].count) == 7


@pytest.mark.parametrize(
    ("make_optax", "make_torch", "message"),
    [
        (KINDS["adam"][0], KINDS["momentum"][1], "trace"),
        (KINDS["momentum"][0], KINDS["adam"][1], "exp_avg|mu"),
        (KINDS["sgd"][0], KINDS["adam"][1], "exp_avg|mu"),
        (lambda: optax.rmsprop(0.1), KINDS["adam"][1], "ScaleByRms"),
        (KINDS["adam"][0], lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (KINDS["momentum"][0], lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.1), "dampening"),
        (lambda: optax.adam(0.1, mu_dtype=jnp.float32), KINDS["adam"][1], "are float32, those of torch torch.float64"),
        (KINDS["adam"][0], torch.optim.Adagrad, "Adagrad is not converted"),
        (KINDS["adam"][0], lambda p: torch.optim.Adam(list(p)[2:]), "only the optax state holds .*layers.0"),
    ],
)
def test_kinds_that_do_not_correspond_are_refused(make_optax, make_torch, message):
    jax_model, torch_model = models("layers")
    ours = nnx.Optimizer(jax_model, make_optax(), wrt=nnx.Param)
    theirs = make_torch(torch_model.parameters())
    with pytest.raises(ValueError, match=message):
        bridge.convert_optimizer(ours, theirs, jax_model, torch_model)
    assert not theirs.state or "Adagrad" in message
    with pytest.raises(ValueError, match=r".*"):
        bridge.convert_optimizer(theirs, ours, jax_model, torch_model)


def test_two_of_one_framework_are_a_type_error():
    jax_model, torch_model = models()
    theirs = torch.optim.Adam(torch_model.parameters())
    with pytest.raises(TypeError, match="Adam"):
        bridge.convert_optimizer(theirs, theirs, jax_model, torch_model)


def test_a_second_bias_that_is_trained_has_no_moments_in_jax():
    """Flax has one bias where torch has two; frozen, as bridge.fold_biases leaves it, the second one needs none."""
    cell = nn.LSTMCell(3, 2)
    ours = nnx.OptimizedLSTMCell(3, 2, rngs=nnx.Rngs(0))
    state = optax.adam(1e-3).init(nnx.state(ours, nnx.Param))
    optimizer = torch.optim.Adam(cell.parameters())
    with pytest.raises(ValueError, match=r"torch bias_hh is trained, .*bridge.fold_biases freezes it"):
        bridge.convert_optimizer(optimizer, state, ours, cell)
    bridge.fold_biases(cell)
    cell(torch.ones(1, 3))[0].sum().backward()
    optimizer.step()
    new = bridge.convert_optimizer(optimizer, state, ours, cell)
    moment = optimizer.state[cell.bias_ih]["exp_avg"]
    np.testing.assert_array_equal(new[0].mu["dense_h"]["bias"][...], moment)
