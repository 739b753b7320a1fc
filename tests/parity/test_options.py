"""Options given as `config=`, as keywords, or set on a skip that is there: all mean the same, in both packages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mhc_jax.models as jax_models
import mhc_jax.nn as jax_nn
import mhc_torch
import mhc_torch.models as torch_models
import mhc_torch.nn as torch_nn
from mhc_jax.history.config import MatrixConfig as JaxMatrixConfig
from mhc_jax.streams import StreamConfig as JaxStreamConfig
from mhc_torch.history.config import MatrixConfig
from mhc_torch.streams import StreamConfig

SIZES = {"vocabulary": 5, "features": 4, "mlp_features": 6, "depth": 2, "num_heads": 2}
FIELDS = {"max_history": 3, "mode": "hc", "temperature": 0.5, "prune_threshold": 0.1}
RNGS = nnx.Rngs(0)


def torch_linear():
    return [torch.nn.Linear(3, 3) for _ in range(2)]


def injected(**options):
    return mhc_torch.inject_mhc(torch.nn.ModuleList(torch_linear()), torch.nn.Linear, **options)[1].mhc_skip


# Each makes a module and gives the config that it, or the skip in it, has in the end.
TORCH = {
    "skip": lambda **o: torch_nn.MHCSkip(**o).config,
    "sequential": lambda **o: torch_nn.MHCSequential(torch_linear(), **o).skip_layers[1].config,
    "conv": lambda **o: torch_nn.MHCConv2d(3, 3, 3, **o).skip.config,
    "basic": lambda **o: torch_nn.MHCBasicBlock(3, 3, **o).skip.config,
    "bottleneck": lambda **o: torch_nn.MHCBottleneck(3, 3, **o).skip.config,
    "injected": lambda **o: injected(**o).config,
}
JAX = {
    "skip": lambda **o: jax_nn.MHCSkip(**o).config,
    "sequential": lambda **o: jax_nn.MHCSequential([nnx.Linear(3, 3, rngs=RNGS)], **o).skip_layers[0].config,
    "stack": lambda **o: jax_nn.MHCStack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 2, rngs=RNGS, **o).config,
    "conv": lambda **o: jax_nn.MHCConv(3, 3, (3, 3), rngs=RNGS, **o).skip.config,
    "basic": lambda **o: jax_nn.MHCBasicBlock(3, 3, rngs=RNGS, **o).skip.config,
    "bottleneck": lambda **o: jax_nn.MHCBottleneck(3, 3, rngs=RNGS, **o).skip.config,
}
HISTORY = [(make, mhc_torch.MHCConfig) for make in TORCH.values()]
HISTORY += [(make, jax_nn.skip.MHCConfig) for make in JAX.values()]
NAMES = [*(f"torch-{name}" for name in TORCH), *(f"jax-{name}" for name in JAX)]


@pytest.mark.parametrize(("make", "kind"), HISTORY, ids=NAMES)
def test_a_config_its_fields_and_both(make, kind):
    whole = kind(**FIELDS)
    assert make() == kind()
    assert make(config=whole) == make(**FIELDS) == whole
    assert make(config=whole, temperature=2.0, use_gating=True) == dataclasses.replace(
        whole, temperature=2.0, use_gating=True
    )
    with pytest.raises(TypeError, match=r"config must be of type MHCConfig, got 3"):
        make(config=3)
    with pytest.raises(TypeError, match=r"unknown settings \['temprature'\]"):
        make(temprature=2.0)
    with pytest.raises(ValueError, match="temperature must be"):
        make(config=whole, temperature=-1.0)


def test_by_position_as_the_published_package_has_them():
    values = {"max_history": 3, "mode": "hc", "constraint": "identity", "epsilon": 0.2, "temperature": 0.5}
    wanted = mhc_torch.MHCConfig(**values, detach_history=True)
    assert torch_nn.MHCConv2d(3, 3, 3, 1, 1, 1, 1, True, *values.values(), True).skip.config == wanted
    assert torch_nn.MHCBasicBlock(3, 3, 1, *values.values(), True).skip.config == wanted
    assert torch_nn.MHCBottleneck(3, 3, 1, *values.values(), True).history_buffer.detach_history
    stack = torch_nn.MHCSequential(torch_linear(), *values.values(), False, True, True, True, 0.25, True, True)
    more = {"clear_history_each_forward": False, "use_gating": True, "stochastic": True, "auto_project": True}
    assert stack.skip_layers[0].config == dataclasses.replace(wanted, prune_threshold=0.25, **more)
    assert stack.use_checkpointing
    skip = torch_nn.MHCSkip("hc", 3, "identity", 0.2, 0.5, "uniform", True, True, 0.25, True)
    more = {"init": "uniform", "use_gating": True, "prune_threshold": 0.25, "stochastic": True, "auto_project": True}
    assert skip.config == mhc_torch.MHCConfig(**values, **more)
    assert torch_nn.MatrixMHCSkip(3, False, 5).config == MatrixConfig(3, False, 5)


def test_matrix_skips_and_streams():
    assert torch_nn.MatrixMHCSkip(config=MatrixConfig(3, iterations=7), iterations=5).config == MatrixConfig(3, True, 5)
    skip = jax_nn.MatrixMHCSkip(config=JaxMatrixConfig(3, iterations=7), iterations=5, rngs=RNGS)
    assert skip.config == JaxMatrixConfig(3, True, 5)
    assert skip.mixing_logits.shape == (3, 3)

    def layer(rngs, index):
        branch = nnx.Linear(3, 3, rngs=rngs)
        return jax_nn.HyperConnections(branch, 3, config=JaxStreamConfig(2), constraint="kronecker")

    assert layer(RNGS, 0).config == JaxStreamConfig(2, "kronecker")
    stack = jax_nn.StreamStack(layer, 2, config=JaxStreamConfig(2), rngs=RNGS)
    assert stack.streams == torch_nn.StreamStack([], config=StreamConfig(2)).streams == 2
    buffer = torch_nn.HistoryBuffer(config=mhc_torch.MHCConfig(max_history=3), detach_history=True)
    assert (buffer.max_history, buffer.detach_history) == (3, True)


def test_connections_of_a_decoder():
    theirs, ours = torch_models.DecoderConfig(**SIZES), jax_models.DecoderConfig(**SIZES)
    model = torch_models.Decoder(theirs, mhc_torch.MHCConfig(**FIELDS), temperature=2.0)
    assert model.model.layers[1].skip.config == mhc_torch.MHCConfig(**FIELDS | {"temperature": 2.0})
    model = jax_models.Decoder(ours, jax_nn.skip.MHCConfig(**FIELDS), temperature=2.0, rngs=RNGS)
    assert model.stack.config == jax_nn.skip.MHCConfig(**FIELDS | {"temperature": 2.0})
    model = torch_models.Decoder(theirs, StreamConfig(2), constraint="kronecker")
    assert model.model.layers[1].ffn_hc.config == StreamConfig(2, "kronecker")
    model = jax_models.Decoder(ours, JaxStreamConfig(2), constraint="kronecker", rngs=RNGS)
    assert model.stack.layers.ffn_hc.config == JaxStreamConfig(2, "kronecker")
    assert model.stack.streams == 2


def projected(z, options):
    """The weights of live logits, in NumPy."""
    z = np.asarray(z, np.float64) / options.get("temperature", 1.0)
    if options.get("mode") == "residual":
        return np.eye(len(z))[-1]
    constraint = "simplex" if options.get("mode") == "hc" else options.get("constraint", "simplex")
    if constraint == "sparse":
        low, high = z.min() - 1, z.max()
        for _ in range(100):  # the threshold at which what is above it sums to 1
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(z - middle, 0).sum() > 1 else (low, middle)
        weights = np.maximum(z - low, 0)
    else:
        weights = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    if constraint == "identity":
        epsilon = options.get("epsilon", 0.1)
        weights = (1 - epsilon) * weights + epsilon * np.eye(len(z))[-1]
    return np.where(weights < options.get("prune_threshold", 0), 0, weights)


CHANGES = [
    {},
    {"temperature": 0.5},
    {"constraint": "identity", "epsilon": 0.4},
    {"mode": "residual"},
    {"constraint": "sparse"},
    {"mode": "hc", "prune_threshold": 0.3},
]


@pytest.mark.parametrize(
    "changes", [CHANGES, CHANGES[::-1], CHANGES[1:2] * 6, CHANGES[3:4] * 6], ids=["each", "back", "same", "residual"]
)
def test_skips_of_a_container_may_differ(changes):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3))
    theirs = torch_nn.MHCSequential([torch.nn.Tanh() for _ in changes], max_history=3).double()
    ours = jax_nn.MHCSequential([Tanh() for _ in changes], max_history=3)
    states = [x]
    for layer, options in enumerate(changes):
        logits = random.normal(size=3)
        theirs.skip_layers[layer].mixing_logits.data = torch.tensor(logits)
        ours.skip_layers[layer].mixing_logits.set_value(jnp.asarray(logits, jnp.float32))
        for name, value in options.items():
            for skip in (theirs.skip_layers[layer], ours.skip_layers[layer]):
                setattr(skip, name, value)
                assert getattr(skip, name) == getattr(skip.config, name) == value
        live = states[-3:]
        weights = projected(logits[-len(live) :], options)
        states.append(np.tanh(states[-1]) + sum(w * state for w, state in zip(weights, live, strict=True)))
    leaf = torch.tensor(x, requires_grad=True)
    torch.testing.assert_close(theirs(leaf), torch.tensor(states[-1]))
    assert torch.autograd.gradcheck(theirs, leaf)
    np.testing.assert_allclose(ours(jnp.asarray(x, jnp.float32)), states[-1], rtol=1e-5)
    np.testing.assert_allclose(
        nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(x, jnp.float32)), states[-1], rtol=1e-5
    )


CONTAINERS = {
    "torch": lambda **o: torch_nn.MHCSequential([torch.nn.Tanh() for _ in range(3)], init="uniform", **o),
    "jax": lambda **o: jax_nn.MHCSequential([Tanh() for _ in range(3)], init="uniform", **o),
    "jax stack": lambda **o: jax_nn.MHCStack(lambda rngs: Tanh(), 3, init="uniform", rngs=RNGS, **o),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"mode": "residual"}, {"prune_threshold": 0.4}], ids=str)
def test_options_of_a_container_reach_its_skips(make, options):
    changed, made = make(), make(**options)
    values = np.random.default_rng(0).normal(size=(3, 4))
    for container in (changed, made):
        if isinstance(container, jax_nn.MHCStack):
            container.mixing_logits.set_value(jnp.asarray(values, jnp.float32))
            continue
        for skip, row in zip(container.skip_layers, values, strict=True):
            if isinstance(skip, nnx.Module):
                skip.mixing_logits.set_value(jnp.asarray(row, jnp.float32))
            else:
                skip.mixing_logits.data = torch.tensor(row, dtype=torch.float32)
    x = torch.ones(2, 3) if isinstance(made, torch.nn.Module) else jnp.ones((2, 3))
    before = changed(x)
    for name, value in options.items():
        setattr(changed, name, value)
        assert getattr(changed, name) == getattr(changed.config, name) == value
    assert not np.array_equal(np.asarray(changed(x).tolist()), np.asarray(before.tolist()))
    assert changed(x).tolist() == made(x).tolist()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("max_history", 5), ("use_gating", True)])
def test_a_bad_change_leaves_a_container_alone(make, name, value):
    container = make()
    configs = [container.config, *(skip.config for skip in getattr(container, "skip_layers", ()))]
    with pytest.raises(ValueError, match=name):
        setattr(container, name, value)
    assert configs == [container.config, *(skip.config for skip in getattr(container, "skip_layers", ()))]


def test_what_a_container_keeps_can_be_set():
    container = CONTAINERS["torch"]()
    x = torch.ones(2, 3)
    fresh = container(x)
    container.clear_history_each_forward = False
    container(x)
    assert len(container.history_buffer) == 4
    assert not torch.equal(container(x), fresh)
    container.detach_history = True
    container.clear_history()
    container(x.requires_grad_())
    assert not any(state.requires_grad for state in container.history_buffer.get())
    with pytest.raises(ValueError, match="stochastic needs rngs"):
        CONTAINERS["jax stack"]().stochastic = True


class Tanh(nnx.Module):
    def __call__(self, x):
        return jnp.tanh(x)


def outcome(change):
    try:
        change()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.usefixtures("unchecked")  # it is our own refusals that are compared
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", 0.0, ValueError),
        ("temperature", "hot", TypeError),
        ("epsilon", 1.0, ValueError),
        ("mode", "mch", ValueError),
        ("constraint", "doubly", ValueError),
        ("prune_threshold", 2.0, ValueError),
        ("stochastic", 1, TypeError),
        ("max_history", 5, ValueError),
        ("use_gating", True, ValueError),
        ("auto_project", True, ValueError),
        ("config", 3, TypeError),
    ],
)
def test_a_bad_change_is_refused_and_leaves_the_skip_alone(name, value, error):
    skips = jax_nn.MHCSkip(), torch_nn.MHCSkip()
    ours, theirs = (outcome(lambda skip=skip: setattr(skip, name, value)) for skip in skips)
    assert ours == theirs
    assert ours[0] is error
    assert name in ours[1]
    assert [skip.config for skip in skips] == [jax_nn.MHCSkip().config, mhc_torch.MHCConfig()]


def test_noise_can_be_set_on_and_off():
    history, x = [torch.ones(3), torch.zeros(3)], torch.zeros(3)
    skip = torch_nn.MHCSkip(init="uniform")
    quiet = skip(x, history)
    skip.stochastic = True
    assert not torch.equal(skip(x, history), quiet)
    with pytest.raises(ValueError, match="stochastic needs rngs"):
        jax_nn.MHCSkip().stochastic = True
    noisy = jax_nn.MHCSkip(init="uniform", stochastic=True, rngs=nnx.Rngs(0))
    arrays = [jnp.asarray(state.numpy()) for state in history]
    noisy.stochastic = False
    np.testing.assert_allclose(noisy(jnp.zeros(3), arrays), quiet.detach())
    noisy.stochastic = True
    assert not np.allclose(noisy(jnp.zeros(3), arrays), quiet.detach())


@pytest.mark.usefixtures("unchecked")
def test_matrix_skips_can_change_too():
    theirs, ours = torch_nn.MatrixMHCSkip(3), jax_nn.MatrixMHCSkip(3, rngs=nnx.Rngs(0))
    logits = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    theirs.mixing_logits.data = torch.tensor(logits)
    ours.mixing_logits.set_value(jnp.asarray(logits))
    for skip in (theirs, ours):
        skip.doubly_stochastic = False
    expected = np.stack([projected(row, {}) for row in logits])
    np.testing.assert_allclose(theirs.mixing_matrix().detach(), expected, rtol=1e-6)
    np.testing.assert_allclose(ours.mixing_matrix(), expected, rtol=1e-6)
    for name, value in (("max_history", 4), ("iterations", 0), ("doubly_stochastic", 1)):
        first, second = (outcome(lambda skip=skip, n=name, v=value: setattr(skip, n, v)) for skip in (ours, theirs))
        assert first == second
        assert name in first[1]


def test_a_mode_without_weights_freezes_them():
    skip = torch_nn.MHCSkip(use_gating=True)
    skip.mode = "residual"
    assert not any(parameter.requires_grad for parameter in skip.parameters())
    skip.mode = "mhc"
    assert all(parameter.requires_grad for parameter in skip.parameters())
    skip.mixing_logits.requires_grad_(False)  # on purpose, which no other option undoes
    skip.temperature = 2.0
    assert not skip.mixing_logits.requires_grad


@pytest.mark.usefixtures("unchecked")
def test_compiled_functions_see_a_change():
    skip = torch_nn.MHCSkip(init="uniform", max_history=2)
    compiled = torch.compile(skip, backend="eager", fullgraph=True)
    history, x = [torch.ones(3), torch.zeros(3)], torch.zeros(3)
    assert compiled(x, history).tolist() == [0.5] * 3
    skip.mode = "residual"
    assert compiled(x, history).tolist() == [0.0] * 3
    jax_skip = jax_nn.MHCSkip(init="uniform", max_history=2)
    call = nnx.jit(lambda skip: skip(jnp.zeros(3), [jnp.ones(3), jnp.zeros(3)]))
    assert call(jax_skip).tolist() == [0.5] * 3
    jax_skip.mode = "residual"
    assert call(jax_skip).tolist() == [0.0] * 3
    assert jax.tree.leaves(nnx.state(jax_skip))[0].shape == (2,)
