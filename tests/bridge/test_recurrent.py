"""Recurrent modules: cells, layers, both directions, stacks; gate order, and torch's second bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
from tests.bridge.both_ways import check, shuffled
from tests.bridge.models import randomize

X = np.random.default_rng(0).standard_normal((2, 5, 3))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


CELLS = {"lstm": nnx.LSTMCell, "fast lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell, "plain": nnx.SimpleCell}
TORCH = {"lstm": nn.LSTM, "fast lstm": nn.LSTM, "gru": nn.GRU, "plain": nn.RNN}
TORCH_CELLS = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}


def cell(name, width=3, **options):
    return CELLS[name](width, 4, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)


def layer(name, width=3, **options):
    return nnx.RNN(cell(name, width), **options)


def both(name, width=3):
    return nnx.Bidirectional(layer(name, width), layer(name, width))


def folded(module):
    """Without the bias that flax's GRU does not have."""
    with torch.no_grad():
        for key, leaf in module.named_parameters():
            if isinstance(module, (nn.GRU, nn.GRUCell)) and "bias_hh" in key:
                leaf[-len(leaf) // 3 :] = 0
    return bridge.fold_biases(module)


@pytest.mark.parametrize("name", CELLS)
def test_cells(name):
    def run_jax(module):
        carry = module.initialize_carry((2, 3), nnx.Rngs(0))
        carry = jax.tree.map(lambda c, k: c + k, carry, (0.3, -0.2) if "lstm" in name else 0.3)
        return module(carry, jnp.asarray(X[:, 0]))[1]

    def run_torch(module):
        h = torch.full((2, 4), 0.3, dtype=torch.float64)
        if "lstm" in name:  # flax has (c, h), torch (h, c)
            return module(torch.tensor(X[:, 0]), (torch.full_like(h, -0.2), h))[0]
        return module(torch.tensor(X[:, 0]), h)

    check(lambda: cell(name), lambda: TORCH_CELLS[TORCH[name]](3, 4), run_jax, run_torch, folded)


@pytest.mark.parametrize(
    ("name", "depth", "twice", "container"),
    [
        *((name, 1, False, None) for name in CELLS),
        ("fast lstm", 2, True, nnx.Sequential),
        ("gru", 2, True, nnx.Sequential),
        ("plain", 2, False, lambda *layers: nnx.List(layers)),
    ],
)
def test_layers(name, depth, twice, container):
    make = both if twice else layer

    def make_jax():
        return container(make(name), make(name, 8 if twice else 4)) if container else make(name)

    def run_jax(module):
        x = jnp.asarray(X)
        for one in module if isinstance(module, nnx.List) else [module]:
            x = one(x)
        return x

    options = {"num_layers": depth, "bidirectional": twice, "batch_first": True}
    check(make_jax, lambda: TORCH[name](3, 4, **options), run_jax, lambda m: m(torch.tensor(X))[0], folded)


def test_time_first():
    check(
        lambda: layer("gru", time_major=True),
        lambda: nn.GRU(3, 4),
        lambda m: m(jnp.asarray(X)),
        lambda m: m(torch.tensor(X))[0],
        folded,
    )


def test_without_bias_in_torch():
    """Flax always has one, which must be zero then."""
    theirs = randomize(nn.LSTMCell(3, 4, bias=False).double())
    ours = bridge.convert(theirs, shuffled(cell("fast lstm")))
    assert not ours.dense_h.bias[...].any()
    assert torch.equal(bridge.convert(ours, nn.LSTMCell(3, 4, bias=False).double()).weight_hh, theirs.weight_hh)
    ours.dense_h.bias[...] += 1
    with pytest.raises(ValueError, match=r"jax dense_h.bias must be zero: the torch module has no bias"):
        bridge.convert(ours, theirs)


# ---- the second bias -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "plain"])
def test_a_second_bias_is_refused_until_it_is_folded(name, tmp_path):
    theirs, ours = randomize(TORCH[name](3, 4, batch_first=True).double()), layer(name)
    with pytest.raises(ValueError, match=r"torch bias_hh_l0 must be zero: .*bridge.fold_biases"):
        bridge.convert(theirs, ours)
    bridge.save(tmp_path / "torch.pt", theirs)
    with pytest.raises(ValueError, match=r"torch bias_hh_l0 must be zero"):
        bridge.convert_file(tmp_path / "torch.pt", tmp_path / "jax.pt", ours, theirs, "jax")
    assert not (tmp_path / "jax.pt").exists()
    before = theirs(torch.tensor(X))[0]
    torch.testing.assert_close(bridge.fold_biases(theirs)(torch.tensor(X))[0], before)
    assert not theirs.bias_hh_l0.requires_grad
    bridge.convert(theirs, ours)


def test_zeros_reach_files(tmp_path):
    ours, theirs = shuffled(layer("lstm")), randomize(nn.LSTM(3, 4).double())
    bridge.save(tmp_path / "jax.pt", ours)
    with pytest.warns(UserWarning, match="time_major"):
        bridge.convert_file(tmp_path / "jax.pt", tmp_path / "torch.pt", ours, theirs, "torch")
    stored = bridge.load(tmp_path / "torch.pt")
    assert not stored["bias_hh_l0"].any()
    assert stored["bias_ih_l0"].all()


def test_the_inner_bias_of_a_gru_stays_and_is_refused():
    theirs = randomize(nn.GRU(3, 4, batch_first=True).double())
    before = theirs(torch.tensor(X))[0]
    torch.testing.assert_close(bridge.fold_biases(theirs)(torch.tensor(X))[0], before)
    assert theirs.bias_hh_l0.requires_grad
    with pytest.raises(ValueError, match=r"bias_hh_l0 must be zero: flax's GRUCell has no bias inside"):
        bridge.convert(theirs, layer("gru"))


def test_folded_and_flax_learn_alike():
    theirs = bridge.fold_biases(randomize(nn.LSTMCell(3, 4).double()))
    ours = bridge.convert(theirs, cell("fast lstm"))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    theirs(torch.tensor(X[0]))[0].square().sum().backward()
    optimizer.step()

    def loss(module):
        return (module((jnp.zeros((5, 4)), jnp.zeros((5, 4))), jnp.asarray(X[0]))[1] ** 2).sum()

    gradient = nnx.grad(loss)(ours)
    nnx.update(ours, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(ours, nnx.Param), gradient))
    trained = bridge.convert(theirs, cell("fast lstm"))  # which the second bias would not let, had it been trained
    for one, other in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(trained)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_fold_biases_checks_its_argument():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got RNN"):
        bridge.fold_biases(layer("gru"))


# ---- what differs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_jax", "make_torch", "told"),
    [
        (lambda: layer("plain"), lambda: nn.RNN(3, 4), r"time_major: .*\[False\].*\[True\]"),
        (lambda: layer("plain"), lambda: nn.RNN(3, 4, nonlinearity="relu"), "activation_fn: .*'tanh'.*'relu'"),
        (lambda: nnx.RNN(cell("plain", residual=True)), lambda: nn.RNN(3, 4), "residual: .*True.*False"),
        (lambda: layer("lstm", reverse=True), lambda: nn.LSTM(3, 4), r"reverse: .*\[True\].*\[False\]"),
        (
            lambda: nnx.Bidirectional(layer("gru"), layer("gru"), merge_fn=jnp.add),
            lambda: nn.GRU(3, 4, bidirectional=True),
            "merge_fn: .*add.*concatenate",
        ),
        (
            lambda: nnx.Sequential(layer("gru"), nnx.Dropout(0.1), layer("gru", 4)),
            lambda: nn.GRU(3, 4, num_layers=2, dropout=0.2),
            r"dropout: .*\[0.1\].*\[0.2\]",
        ),
        (lambda: cell("lstm", activation_fn=nnx.relu), lambda: nn.LSTMCell(3, 4), "activation_fn: .*'relu'.*'tanh'"),
        (lambda: cell("gru", gate_fn=nnx.relu), lambda: nn.GRUCell(3, 4), "gate_fn: .*'relu'.*'sigmoid'"),
    ],
)
def test_settings(make_jax, make_torch, told):
    with pytest.warns(UserWarning, match=told):
        bridge.convert(shuffled(make_jax()), make_torch().double())


@pytest.mark.parametrize(
    ("make_jax", "make_torch", "why"),
    [
        (lambda: layer("gru"), lambda: nn.LSTM(3, 4), "a GRUCell is a torch.nn GRU or GRUCell"),
        (lambda: layer("gru"), lambda: nn.GRU(3, 4, num_layers=2), "1 layers of .*torch has 2 layers"),
        (lambda: layer("gru"), lambda: nn.GRU(3, 4, bidirectional=True), "torch has 1 layers of 2 directions"),
        (lambda: layer("lstm"), lambda: nn.LSTM(3, 4, proj_size=2), "proj_size=2"),
    ],
)
def test_what_cannot_be_the_same_function(make_jax, make_torch, why):
    with pytest.raises(ValueError, match=f"1 problem:\n  .*cannot be the same function: .*{why}"):
        bridge.convert(make_torch().double(), make_jax())
