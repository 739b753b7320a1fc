"""`bridge.suggest`: its lines, pasted, make pairs convert whose names differ; what it guesses is marked."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
from bridge.weights import rules
from tests.bridge.models import randomize


@pytest.fixture(autouse=True)
def as_before():
    """What a test pastes holds for that test."""
    assert bridge.register  # the declared rules are there
    with rules.trial({}):
        yield


def paste(suggestion, *kinds):
    """Runs the lines, with the types of this file by their names."""
    exec(str(suggestion), {kind.__name__: kind for kind in kinds})


class Norm(nnx.Module):
    def __init__(self, width):
        self.gain = nnx.Param(jnp.ones(width))


class Attention(nnx.Module):
    def __init__(self, rngs):
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nnx.Linear(8, 8, rngs=rngs))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.ln1, self.attn, self.ln2 = Norm(8), Attention(rngs), Norm(8)
        self.up, self.down = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, stacked=False):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        if stacked:
            self.blocks = nnx.vmap(lambda _: Block(nnx.Rngs(0)), axis_size=3)(jnp.arange(3))
        else:
            self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.table = jnp.zeros(4)
        self.head = nnx.Linear(8, 11, rngs=rngs)


class TorchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


class TorchSelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))


class TorchAttention(nn.Module):
    """One level deeper than the other's."""

    def __init__(self):
        super().__init__()
        self.self = TorchSelf()
        self.o_proj = nn.Linear(8, 8)


class TorchLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = TorchAttention()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.input_norm, self.post_norm = TorchNorm(), TorchNorm()


class TorchBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(TorchLayer() for _ in range(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class TorchModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = TorchBody()
        self.lm_head = nn.Linear(8, 11)


TYPES = [Norm, Attention, Block, Model, TorchNorm, TorchSelf, TorchAttention, TorchLayer, TorchBody, TorchModel]
NAMES = {
    "ln1.gain": "input_norm.weight",
    "ln2.gain": "post_norm.weight",
    "attn.query.kernel": "self_attn.self.q_proj.weight",
    "attn.key.kernel": "self_attn.self.k_proj.weight",
    "attn.value.bias": "self_attn.self.v_proj.bias",
    "attn.out.kernel": "self_attn.o_proj.weight",
    "up.kernel": "fc1.weight",
}


@pytest.mark.parametrize("stacked", [False, True])
def test_a_model_with_other_names_and_levels(stacked):
    ours, theirs = Model(stacked), randomize(TorchModel())
    found = bridge.suggest(ours, theirs)
    assert not found.problems, found
    paste(found, *TYPES)
    bridge.convert(theirs, ours)
    leaves = theirs.state_dict()
    for one, other in NAMES.items():
        path = one if stacked else f"1.{one}"
        node = ours.blocks
        for part in path.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        array = np.asarray(node[...])[1] if stacked else np.asarray(node[...])
        np.testing.assert_array_equal(array, leaves[f"model.layers.1.{other}"].numpy().T, err_msg=one)
    # Two norms of one shape, told apart by nothing but order; a table and a counter that carry no weight.
    assert {line.split("  #")[0] for line in found.doubts} == {
        'jax_only=("table",),',
        'torch_only=("model.steps",),',
        'bridge.Child("ln1", "input_norm"),',
        'bridge.Child("ln2", "post_norm"),',
    }, found


class Pair(nnx.Module):
    def __init__(self):
        self.one, self.two = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in (0, 1))


class TorchPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)


def test_values_decide_where_both_hold_the_same_and_order_is_marked():
    ours, theirs = Pair(), TorchPair()
    guess = bridge.suggest(ours, theirs)
    assert "by order, first would fit as well" in str(guess)
    with torch.no_grad():
        for name, layer in (("one", theirs.first), ("two", theirs.second)):
            layer.weight.copy_(torch.tensor(np.asarray(getattr(ours, name).kernel[...]).T))
            layer.bias.zero_()
    told = bridge.suggest(ours, theirs)
    assert 'Child("one", "first"),\n' in str(told)
    assert not told.doubts
    paste(told, Pair, TorchPair)
    bridge.match(ours, theirs)


class Bare(nnx.Module):
    def __init__(self, shape):
        self.kernel = nnx.Param(jnp.arange(float(np.prod(shape))).reshape(shape))


class TorchBare(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize(
    ("ours", "theirs", "layout", "doubtful"),
    [
        ((2, 3), (3, 2), "a b -> b a", False),
        ((3, 3), (3, 3), "a b -> b a", True),
        ((4, 2, 3), (6, 4), "a b c -> (b c) a", True),
        ((2, 5, 3, 7), (7, 3, 2, 5), "a b c d -> d c a b", False),
    ],
)
def test_layouts_of_leaves(ours, theirs, layout, doubtful):
    found = bridge.suggest(Bare(ours), TorchBare(theirs))
    assert f'bridge.Leaf("kernel", "weight", "{layout}"),' in str(found)
    assert bool(found.doubts) == doubtful, found


def test_what_has_no_counterpart_is_a_comment_and_the_rest_runs():
    class Ours(nnx.Module):
        def __init__(self):
            self.a, self.b = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 5, rngs=nnx.Rngs(0))

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(2, 3)

    found = bridge.suggest(Ours(), Theirs())
    assert any("jax b.kernel" in problem for problem in found.problems)
    assert 'bridge.Child("a", "c")' in str(found)
    paste(found, Ours, Theirs)
    assert str(bridge.suggest(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nn.Linear(2, 3))) == "# No rule is needed."


def test_arguments():
    with pytest.raises(TypeError, match=r"torch_model must be of type torch.nn.modules.module.Module, got Pair"):
        bridge.suggest(Pair(), Pair())
