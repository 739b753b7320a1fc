"""Every public convention in both packages, held to what its project computes with the same tensors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import mhc_jax.nn
import mhc_jax.streams
import mhc_torch.nn
import mhc_torch.streams
from mhc_jax.streams import HeadParams, StreamParams
from mhc_jax.streams.constraints import CONSTRAINTS
from mhc_jax.streams.conventions import CONVENTIONS, Parameters
from mhc_torch.streams.conventions import CONVENTIONS as TORCH_CONVENTIONS
from tests.peers import HEAD_SETTINGS, HEADS, LAYERS, SETTINGS, deepseek_v4_1

WIDTH, TOKENS = 5, 3
# A transposed permutation is another one from n = 3 on; n! logits for more are dear.
STREAMS = {"mhc_lite": 3, "maxtext_lite": 3}


def sample(name, head):
    """Its options at some number of streams, random tensors, and random streams."""
    convention, rng = CONVENTIONS[name], np.random.default_rng(0)
    n = STREAMS.get(name, 4)
    (count,) = (setting for setting, (_, fields) in convention.settings.items() if fields == ("streams",))
    settings = {count: n} | (HEAD_SETTINGS if head else SETTINGS).get(name, {})
    config = (convention.head_config if head else convention.config)(**settings)
    columns, gates = (n, 1) if head else (config.logits, 3)
    nothing = Parameters(np.zeros((n * WIDTH, columns)), np.zeros(gates), np.zeros(columns))
    like = convention.store(nothing, config, head=head)
    tensors = {key: rng.normal(size=tensor.shape) for key, tensor in like.items()}
    return convention, config, tensors, rng.normal(size=(TOKENS, n, WIDTH))


CASES = [*((name, False) for name in LAYERS), *((name, True) for name in HEADS)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}{' head' * case[1]}")
def case(request):
    """A convention with what the project computes: its output, and its gradients."""
    name, head = request.param
    convention, config, tensors, x = sample(name, head)
    leaves = {key: torch.tensor(value, requires_grad=True) for key, value in tensors.items()}
    streams = torch.tensor(x, requires_grad=True)
    output = (HEADS if head else LAYERS)[name](leaves, streams)
    assert output.dtype is torch.float64
    cotangent = np.random.default_rng(1).normal(size=output.shape)
    output.backward(torch.tensor(cotangent))
    gradients = {key: leaf.grad.numpy() for key, leaf in leaves.items()}
    return name, head, convention, config, tensors, x, cotangent, (output.detach().numpy(), streams.grad, gradients)


def close(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * np.abs(theirs).max())


def check(case, output, d_streams, d_parameters):
    _, head, convention, config, tensors, *_, theirs = case
    close(output, theirs[0])
    close(d_streams, theirs[1])
    # `load` is at most a product of two tensors, so that differences of any size are its derivative.
    for name, tensor in tensors.items():
        gradient = np.empty(tensor.shape)
        for at in np.ndindex(tensor.shape):
            up, down = (tensor.copy() for _ in range(2))
            up[at] += 1
            down[at] -= 1
            ends = (convention.load(tensors | {name: moved}, config, head=head) for moved in (up, down))
            gradient[at] = sum(np.sum(d * (a - b)) for d, a, b in zip(d_parameters, *ends, strict=True)) / 2
        close(gradient, theirs[2][name])


def test_torch(case):
    name, head, _, config, tensors, x, cotangent, _ = case
    config = mhc_torch.streams.StreamConfig(**vars(config))
    module = mhc_torch.nn.StreamHead(WIDTH, config=config)
    if not head:
        module = mhc_torch.nn.HyperConnections(nn.Tanh(), WIDTH, config=config)
    module.double().load_from(name, {key: torch.tensor(value) for key, value in tensors.items()})
    streams = torch.tensor(x, requires_grad=True)
    output = module(streams)
    output.backward(torch.tensor(cotangent))
    check(case, output.detach(), streams.grad, [p.grad.numpy() for p in (module.phi, module.alpha, module.bias)])


def test_jax(case):
    name, head, _, config, tensors, x, cotangent, _ = case
    with jax.enable_x64(True):
        module = mhc_jax.nn.StreamHead(WIDTH, config=config)
        if not head:
            module = mhc_jax.nn.HyperConnections(jnp.tanh, WIDTH, config=config)
        nnx.update(module, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(module)))
        module.load_from(name, tensors)
        parameters = (HeadParams if head else StreamParams)(
            *(leaf[...] for leaf in (module.phi, module.alpha, module.bias))
        )

        def run(parameters, x):
            if head:
                return mhc_jax.streams.head(parameters, x, config)
            return mhc_jax.streams.wrap(jnp.tanh, config)(parameters, x)

        @jax.jit
        def with_gradients(parameters, x, cotangent):
            output, pullback = jax.vjp(run, parameters, x)
            return output, *pullback(cotangent)

        output, d_parameters, d_streams = with_gradients(parameters, x, cotangent)
        check(case, output, d_streams, [np.asarray(d) for d in d_parameters])


def test_there_and_back(case):
    _, head, convention, config, tensors, *_ = case
    ours = convention.load(tensors, config, head=head)
    stored = convention.store(ours, config, head=head)
    assert stored.keys() == tensors.keys()
    # The weight of a norm is in the projection now; all else is what it was.
    plain = dict(tensors)
    for norm in ("norm.gamma", "norm_weight", "mhc_norm.scale"):
        if norm in plain:
            plain[norm] = np.full(plain[norm].shape, 0.0 if norm == "norm.gamma" else 1.0)
    again = convention.store(convention.load(plain, config, head=head), config, head=head)
    for key, value in plain.items():
        np.testing.assert_array_equal(again[key], value)
    for a, b in zip(ours, convention.load(stored, config, head=head), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_convention_is_held_to_its_project():
    assert list(CONVENTIONS) == list(TORCH_CONVENTIONS)
    assert {*CONVENTIONS} == {*LAYERS, "deepseek_v4_1"}
    assert {name for name, convention in CONVENTIONS.items() if convention.head} == {*HEADS}


def layer(package, config):
    kind = {"jax": lambda: mhc_jax.nn.HyperConnections(jnp.tanh, WIDTH, config=config)}
    kind["torch"] = lambda: mhc_torch.nn.HyperConnections(
        nn.Tanh(), WIDTH, config=mhc_torch.streams.StreamConfig(**vars(config))
    )
    return kind[package]()


@pytest.mark.parametrize("package", ["jax", "torch"])
@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({}, {"fn": np.ones((15, 15))}, r"fn must have shape \(24, 4 \* width\) for 4 streams, got \(15, 15\)"),
        ({}, {"fn": np.ones((15, 20))}, r"fn must have shape \(24, 20\) for 4 streams, got \(15, 20\)"),
        ({}, {"fn": np.ones((24, 24))}, "tensors must be those of 20 features, all streams together, got 24"),
        ({}, {"base": np.ones(15)}, r"base must have shape \(24,\) for 4 streams, got \(15,\)"),
        ({}, {"scale": None}, r"those of this convention, \['fn', 'scale', 'base'\]: \['scale'\] are missing"),
        ({}, {"bias": np.ones(24)}, r"\['bias'\] are not expected"),
        ({"order": "rows"}, {}, "config.order must be 'columns' in this convention, got 'rows'"),
        ({"constraint": "identity"}, {}, "config.constraint must be 'sinkhorn' in this convention, got 'identity'"),
        ({"dynamic": False}, {}, "config.dynamic must be True in this convention, got False"),
    ],
)
def test_what_is_not_of_a_convention_is_refused_and_nothing_changes(package, changes, tensors, message):
    config = mhc_jax.streams.StreamConfig(**{"streams": 4, "epsilon": 1e-6} | changes)
    module = layer(package, config)
    before = bias_of(module).copy()
    given = {"fn": np.ones((24, 20)), "scale": np.ones(3), "base": np.ones(24)} | tensors
    with pytest.raises(ValueError, match=message):
        module.load_from("deepseek_v4", {name: value for name, value in given.items() if value is not None})
    np.testing.assert_array_equal(before, bias_of(module))


def bias_of(module):
    return module.bias.detach().numpy() if isinstance(module, nn.Module) else np.asarray(module.bias[...])


@pytest.mark.parametrize("package", ["jax", "torch"])
def test_what_a_convention_has_not_is_refused(package):
    module = layer(package, CONVENTIONS["lucidrains"].config())
    if package == "jax":
        module.phi[...] = jnp.ones_like(module.phi[...])
    else:
        nn.init.ones_(module.phi)
    with pytest.raises(ValueError, match="phi must hold one projection for all streams, and none across them"):
        module.store_as("lucidrains")
    with pytest.raises(ValueError, match=r"convention must be one of 'deepseek_v4', .*, got 'deepseek_v5'"):
        module.store_as("deepseek_v5")
    head = (mhc_jax if package == "jax" else mhc_torch).nn.StreamHead(WIDTH, epsilon=1e-6, norm_epsilon=1e-5)
    with pytest.raises(ValueError, match="this convention has no head: its streams end by their mean"):
        head.load_from("glm5_next", {})
    with pytest.raises(
        TypeError, match=r"unknown settings \['n'\]; those of this convention are \['hc_eps', 'hc_mult'"
    ):
        CONVENTIONS["deepseek_v4"].config(n=4)


def test_parameters_of_another_number_of_streams_are_not_stored():
    convention = CONVENTIONS["liger"]
    config = convention.config()
    small = Parameters(np.ones((15, 15)), np.ones(3), np.ones(15))
    with pytest.raises(ValueError, match=r"phi must have shape \(15, 24\) for 4 streams, got \(15, 15\)"):
        convention.store(small, config)
    with pytest.raises(ValueError, match=r"phi must have 4 \* width rows for 4 streams, got 15"):
        convention.store(Parameters(np.ones((15, 24)), np.ones(3), np.ones(24)), config)


def test_which_of_rows_and_columns_comes_first_matters():
    logits = 2 * np.random.default_rng(0).normal(size=(1000, 16))
    config = mhc_jax.streams.StreamConfig(4)
    with jax.enable_x64(True):
        first, second = (
            CONSTRAINTS["sinkhorn"].residual(jnp.asarray(logits), dataclasses.replace(config, order=order), None)
            for order in ("columns", "rows")
        )
    assert 0.01 < np.abs(first - second).max() < 0.1


def test_single_pass():
    """A network of it, since a branch reads by the maps of the one before."""
    convention = CONVENTIONS["deepseek_v4_1"]
    config = convention.config(num_residual_streams=3)
    rng, depth = np.random.default_rng(0), 3
    nothing = Parameters(np.zeros((3 * WIDTH, config.logits)), np.zeros(3), np.zeros(config.logits))
    like = convention.store(nothing, config)
    layers = [{name: rng.normal(size=tensor.shape) for name, tensor in like.items()} for _ in range(depth)]
    x, cotangent = rng.normal(size=(TOKENS, 3, WIDTH)), rng.normal(size=(TOKENS, WIDTH))
    leaves = [{name: torch.tensor(tensor, requires_grad=True) for name, tensor in layer.items()} for layer in layers]
    streams = torch.tensor(x, requires_grad=True)
    theirs = deepseek_v4_1(leaves, streams)
    theirs.backward(torch.tensor(cotangent))
    # Of such layouts the derivative of `load` is its order.
    gradients = [convention.load({name: leaf.grad for name, leaf in layer.items()}, config) for layer in leaves]

    in_torch = mhc_torch.streams.StreamConfig(**vars(config))
    modules = [mhc_torch.nn.HyperConnections(nn.Tanh(), WIDTH, config=in_torch).double() for _ in layers]
    wide = own = torch.tensor(x, requires_grad=True)
    pre = mhc_torch.streams.first_read(wide)
    for module, tensors in zip(modules, layers, strict=True):
        module.load_from("deepseek_v4_1", tensors)
        wide, pre = module.single_pass(module.branch, wide, pre)
    output = mhc_torch.streams.collapse(pre, wide)
    output.backward(torch.tensor(cotangent))
    close(output.detach(), theirs.detach())
    close(own.grad, streams.grad)
    for module, gradient in zip(modules, gradients, strict=True):
        for ours, expected in zip((module.phi, module.alpha, module.bias), gradient, strict=True):
            close(ours.grad, expected)

    def run(layers, x):
        pre = mhc_jax.streams.first_read(x)
        for params in layers:
            x, pre = mhc_jax.streams.single_pass(jnp.tanh, config)(params, x, pre)
        return mhc_jax.streams.collapse(pre, x)

    with jax.enable_x64(True):
        params = [StreamParams(*map(jnp.asarray, convention.load(tensors, config))) for tensors in layers]
        ours, pullback = jax.vjp(jax.jit(run), params, jnp.asarray(x))
        d_layers, d_x = pullback(jnp.asarray(cotangent))
        close(ours, theirs.detach())
        close(d_x, streams.grad)
        for found, gradient in zip(d_layers, gradients, strict=True):
            for one, expected in zip(found, gradient, strict=True):
                close(one, expected)


def test_a_single_pass_is_nothing_else_than_it_says():
    wide, other = (mhc_jax.streams.StreamConfig(2, single_pass=single_pass) for single_pass in (True, False))
    params, x = mhc_jax.streams.init_params(wide, 3), jnp.ones((4, 2, 3))
    message = "config.single_pass must be False here, got True: use `single_pass`"
    with pytest.raises(ValueError, match=message):
        mhc_jax.streams.read(params, x, wide)
    with pytest.raises(ValueError, match=message):
        mhc_jax.streams.boundary(params, x, x[:, 0], jnp.ones((4, 2)), None, wide)
    with pytest.raises(ValueError, match=message):
        layer("torch", wide)(torch.ones(4, 2, WIDTH))
    with pytest.raises(ValueError, match=r"config.single_pass must be True here, got False"):
        mhc_jax.streams.single_pass(jnp.tanh, other)
    with pytest.raises(ValueError, match=r"config.single_pass must be True here, got False"):
        layer("torch", other).single_pass(torch.tanh, torch.ones(4, 2, WIDTH), torch.ones(4, 2))
