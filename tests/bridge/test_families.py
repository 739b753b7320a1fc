"""The tables of names: other usual names than those of the gallery, and names that a table does not know."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import bridge
from bridge.weights import rules
from tests.bridge.models import randomize


@pytest.fixture(autouse=True)
def as_before():
    """What a test declares holds for that test."""
    assert bridge.register  # the declared rules are there
    with rules.trial({}):
        yield


class Block(nnx.Module):
    def __init__(self, inner, outer, stride):
        rngs, options = nnx.Rngs(0), {"padding": 1, "use_bias": False, "rngs": nnx.Rngs(0)}
        self.conv1 = nnx.Conv(inner, outer, (3, 3), stride, **options)
        self.norm1 = nnx.BatchNorm(outer, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(outer, outer, (3, 3), **options)
        self.norm2 = nnx.BatchNorm(outer, momentum=0.9, rngs=rngs)
        if inner != outer:
            self.conv_proj = nnx.Conv(inner, outer, (1, 1), stride, use_bias=False, rngs=rngs)
            self.norm_proj = nnx.BatchNorm(outer, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(y + (self.norm_proj(self.conv_proj(x)) if hasattr(self, "conv_proj") else x))


class ResNet(nnx.Module):
    def __init__(self, stem="conv_init"):
        rngs = nnx.Rngs(0)
        setattr(self, stem, nnx.Conv(3, 4, (7, 7), 2, padding=3, use_bias=False, rngs=rngs))
        self.bn_init = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        sizes = [(4, 4, 1), (4, 4, 1)], [(4, 6, 2), (6, 6, 1)]
        self.layers = nnx.List(nnx.List(Block(*size) for size in stage) for stage in sizes)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.bn_init(self.conv_init(x))), (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage in self.layers:
            for block in stage:
                x = block(x)
        return self.head(x.mean((1, 2)))


def resnet():
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [2, 2], "num_labels": 3}
    return randomize(transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type="basic", **sizes)))


def test_a_resnet_with_shortcuts():
    theirs, ours = resnet().eval(), ResNet()
    declared = bridge.families["resnet"].register(ours, theirs)
    assert 'bridge.Child("conv_proj", "shortcut.convolution")' in str(declared)
    bridge.convert(theirs, ours)
    ours.eval()
    pixels = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    expected = theirs(torch.tensor(pixels).movedim(-1, 1)).logits.detach()
    np.testing.assert_allclose(ours(jnp.asarray(pixels)), expected, rtol=1e-3)


class Norm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(8))


class Layer(nnx.Module):
    def __init__(self, names):
        rngs = nnx.Rngs(0)
        for name, (inner, outer) in zip(names, [(8, 8), (8, 4), (8, 4), (8, 8)], strict=True):
            setattr(self, name, nnx.Linear(inner, outer, use_bias=False, rngs=rngs))
        self.w1, self.w3 = (nnx.Linear(8, 12, use_bias=False, rngs=rngs) for _ in range(2))
        self.w2 = nnx.Linear(12, 8, use_bias=False, rngs=rngs)
        self.ln1, self.ln2 = Norm(), Norm()


class Llama(nnx.Module):
    def __init__(self, names):
        self.wte = nnx.Embed(11, 8, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([Layer(names)])
        self.ln_f = Norm()
        self.unembed = nnx.Linear(8, 11, use_bias=False, rngs=nnx.Rngs(0))


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)))


def test_a_llama_without_modules_of_its_own_for_attention():
    theirs, ours = llama(), Llama(("wq", "wk", "wv", "wo"))
    bridge.families["llama"].register(ours, theirs)
    bridge.convert(theirs, ours)
    layer, block = theirs.model.layers[0], ours.blocks[0]
    for one, other in {
        block.wk: layer.self_attn.k_proj,
        block.wv: layer.self_attn.v_proj,
        block.wq: layer.self_attn.q_proj,
        block.w1: layer.mlp.gate_proj,
        block.w3: layer.mlp.up_proj,
    }.items():
        np.testing.assert_array_equal(one.kernel[...].T, other.weight.detach())
    np.testing.assert_array_equal(block.ln2.scale[...], layer.post_attention_layernorm.weight.detach())


def test_names_that_no_table_has_are_refused_and_nothing_is_declared():
    theirs, ours = llama(), Llama(("alpha", "beta", "gamma", "delta"))
    with pytest.raises(ValueError, match=r"the names of Llama do not tell all.*\n.*alpha.*by order, .*would fit"):
        bridge.families["llama"].register(ours, theirs)
    assert rules.find(Layer, type(theirs.model.layers[0])) is None
