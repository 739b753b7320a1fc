"""Each rule, by its meaning: the converted module computes what the original computes, and comes back bit for bit."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bridge
from bridge.weights import rules
from bridge.weights.rules import Layout
from tests.bridge.models import equal, randomize

RNG = np.random.default_rng(0)
SEQUENCE = RNG.standard_normal((2, 5, 8)).astype(np.float32)
IMAGE = RNG.standard_normal((2, 9, 7, 6)).astype(np.float32)
SIGNAL = RNG.standard_normal((2, 9, 6)).astype(np.float32)
VOLUME = RNG.standard_normal((2, 5, 4, 6, 6)).astype(np.float32)


# name: (JAX module, torch module, input)
PAIRS = {
    "linear": (lambda r: nnx.Linear(8, 3, rngs=r), lambda: nn.Linear(8, 3), SEQUENCE),
    "linear without bias": (
        lambda r: nnx.Linear(8, 8, use_bias=False, rngs=r),
        lambda: nn.Linear(8, 8, bias=False),
        SEQUENCE,
    ),
    "general linear": (lambda r: nnx.LinearGeneral(8, (2, 3), rngs=r), lambda: nn.Linear(8, 6), SEQUENCE),
    "embedding": (lambda r: nnx.Embed(11, 4, rngs=r), lambda: nn.Embedding(11, 4), RNG.integers(0, 11, (2, 5))),
    "layer norm": (lambda r: nnx.LayerNorm(8, epsilon=1e-5, rngs=r), lambda: nn.LayerNorm(8), SEQUENCE),
    "rms norm": (lambda r: nnx.RMSNorm(8, rngs=r), lambda: nn.RMSNorm(8, eps=1e-6), SEQUENCE),
    "group norm": (
        lambda r: nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=r),
        lambda: nn.GroupNorm(3, 6),
        IMAGE,
    ),
    "batch norm": (
        lambda r: nnx.BatchNorm(6, momentum=0.9, rngs=r),
        lambda: nn.BatchNorm2d(6),
        IMAGE,
    ),
    "conv": (lambda r: nnx.Conv(6, 6, (3, 3), padding=1, rngs=r), lambda: nn.Conv2d(6, 6, 3, padding=1), IMAGE),
    "strided, dilated, oblong conv": (
        lambda r: nnx.Conv(6, 4, (3, 2), strides=2, kernel_dilation=(1, 2), padding="VALID", use_bias=False, rngs=r),
        lambda: nn.Conv2d(6, 4, (3, 2), stride=2, dilation=(1, 2), bias=False),
        IMAGE,
    ),
    "grouped conv": (
        lambda r: nnx.Conv(6, 4, (3, 3), feature_group_count=2, padding="VALID", rngs=r),
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        IMAGE,
    ),
    "depthwise conv": (
        lambda r: nnx.Conv(6, 12, (3, 3), feature_group_count=6, padding="VALID", rngs=r),
        lambda: nn.Conv2d(6, 12, 3, groups=6),
        IMAGE,
    ),
    "conv 1d": (lambda r: nnx.Conv(6, 6, (3,), padding="VALID", rngs=r), lambda: nn.Conv1d(6, 6, 3), SIGNAL),
    "conv 3d": (lambda r: nnx.Conv(6, 4, (3, 2, 1), padding=0, rngs=r), lambda: nn.Conv3d(6, 4, (3, 2, 1)), VOLUME),
    "transposed conv, torch's kernel": (
        lambda r: nnx.ConvTranspose(6, 6, (3, 2), (2, 2), padding="VALID", transpose_kernel=True, rngs=r),
        lambda: nn.ConvTranspose2d(6, 6, (3, 2), 2),
        IMAGE,
    ),
    "transposed conv, mirrored kernel": (
        lambda r: nnx.ConvTranspose(6, 6, (3, 2), (2, 2), padding="VALID", rngs=r),
        lambda: nn.ConvTranspose2d(6, 6, (3, 2), 2),
        IMAGE,
    ),
    "transposed conv 1d": (
        lambda r: nnx.ConvTranspose(6, 4, (3,), (2,), padding="VALID", rngs=r),
        lambda: nn.ConvTranspose1d(6, 4, 3, 2),
        SIGNAL,
    ),
    "transposed conv 3d": (
        lambda r: nnx.ConvTranspose(6, 4, (3, 2, 1), padding="VALID", rngs=r),
        lambda: nn.ConvTranspose3d(6, 4, (3, 2, 1)),
        VOLUME,
    ),
    "attention": (
        lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        SEQUENCE,
    ),
    "attention without bias": (
        lambda r: nnx.MultiHeadAttention(4, 8, decode=False, use_bias=False, rngs=r),
        lambda: nn.MultiheadAttention(8, 4, bias=False, batch_first=True),
        SEQUENCE,
    ),
}


def compute_torch(module, x):
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x)[0]
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.modules.conv._ConvNd):
        return module(x.movedim(-1, 1)).movedim(1, -1)
    return module(x)


@pytest.mark.parametrize("name", PAIRS)
def test_same_function_and_bitwise_return(name):
    make_jax, make_torch, x = PAIRS[name]
    source, target = randomize(make_torch().eval()), make_jax(nnx.Rngs(0))
    target.eval()
    assert bridge.convert(source, target) is target
    ours = target(jnp.asarray(x))
    theirs = compute_torch(source, torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=2e-5, atol=2e-5)

    returned = bridge.convert(target, randomize(make_torch(), seed=1))
    for key, tensor in source.state_dict().items():
        assert torch.equal(tensor, returned.state_dict()[key]), key
    again = make_jax(nnx.Rngs(1))
    assert equal(bridge.convert(returned, again), target)


def test_attention_with_keys_and_values_of_another_width():
    source = randomize(nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True))
    target = nnx.MultiHeadAttention(2, 8, in_kv_features=5, decode=False, rngs=nnx.Rngs(0))
    bridge.convert(source, target)
    q, kv = SEQUENCE, SEQUENCE[..., :5]
    theirs = source(torch.tensor(q), torch.tensor(kv), torch.tensor(kv))[0].detach().numpy()
    np.testing.assert_allclose(target(jnp.asarray(q), jnp.asarray(kv)), theirs, rtol=2e-5, atol=2e-5)


def test_batch_norm_trains_alike_up_to_the_bias_of_the_variance():
    """0.7 of the old value is 0.3 of the new one; and torch's running variance is the unbiased one."""
    source = randomize(nn.BatchNorm2d(6, momentum=0.3)).train()
    target = nnx.BatchNorm(6, momentum=0.7, rngs=nnx.Rngs(0))
    old = source.running_var.numpy().copy()
    bridge.convert(source, target)
    target.train()
    target(jnp.asarray(IMAGE))
    compute_torch(source, torch.tensor(IMAGE))
    np.testing.assert_allclose(target.mean.get_value(), source.running_mean, rtol=1e-5)
    n = IMAGE[..., 0].size
    batch = (source.running_var.numpy() - 0.7 * old) / 0.3
    np.testing.assert_allclose(target.var.get_value(), 0.7 * old + 0.3 * batch * (n - 1) / n, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "target", "setting"),
    [
        (lambda r: nnx.LayerNorm(8, rngs=r), lambda: nn.LayerNorm(8), "epsilon: .*1e-06.*1e-05"),
        (lambda r: nnx.RMSNorm(8, rngs=r), lambda: nn.RMSNorm(8), "epsilon: .*1e-06.*1.19"),
        (lambda r: nnx.BatchNorm(6, rngs=r), lambda: nn.BatchNorm2d(6), "momentum: .*0.99.*0.9"),
        (lambda r: nnx.BatchNorm(6, rngs=r), lambda: nn.BatchNorm2d(6, momentum=None), "momentum: .*0.99.*None"),
        (lambda r: nnx.GroupNorm(6, 3, epsilon=1e-5, rngs=r), lambda: nn.GroupNorm(2, 6), "num_groups: .*3.*2"),
        (
            lambda r: nnx.Conv(4, 4, (3, 3), rngs=r),
            lambda: nn.Conv2d(4, 4, 3, stride=2),
            r"strides: .*\(1, 1\).*\(2, 2\)",
        ),
        (
            lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r),
            lambda: nn.MultiheadAttention(8, 4),
            "num_heads: .*2.*4",
        ),
    ],
)
def test_settings_that_differ_are_told(source, target, setting):
    with pytest.warns(UserWarning, match=setting):
        bridge.convert(source(nnx.Rngs(0)), target())


# ---- layouts ---------------------------------------------------------------------------------------------------------


@given(
    st.permutations(range(4)),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.sampled_from([(0, 1), (1, 3), (2, 4)]),
)
def test_a_layout_is_what_it_says_and_invertible(order, mirrored, merged):
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    tokens = ["~" * flip + "abcd"[axis] for axis, flip in zip(order, mirrored, strict=True)]
    start, stop = merged
    right = " ".join([*tokens[:start], "(", *tokens[start:stop], ")", *tokens[stop:]])
    layout = Layout(f"a b c d -> {right}")

    expected = np.flip(array.transpose(order), [i for i in range(4) if mirrored[i]])
    shape = expected.shape
    expected = expected.reshape(*shape[:start], int(np.prod(shape[start:stop])), *shape[stop:])
    np.testing.assert_array_equal(layout.to_torch(array), expected)
    assert layout.torch_shape(array.shape) == expected.shape
    np.testing.assert_array_equal(layout.to_jax(expected, array.shape), array)


@pytest.mark.parametrize("pattern", ["a b -> a", "a b -> a c", "a b -> a a"])
def test_a_layout_that_loses_an_axis_is_refused(pattern):
    with pytest.raises(ValueError, match="same axes"):
        Layout(pattern).to_torch(np.zeros((2, 3)))


# ---- rules of one's own ----------------------------------------------------------------------------------------------


class JaxScale(nnx.Module):
    def __init__(self) -> None:
        self.inner = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.gain = nnx.Param(jnp.arange(6.0).reshape(2, 3))
        self.table = nnx.Variable(jnp.zeros(3))


class TorchScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.zeros(3, 2))


def test_users_register_their_own_types():
    source, target = JaxScale(), TorchScale()
    with pytest.raises(ValueError, match=r"jax gain, .*no counterpart"):
        bridge.convert(source, target)
    entries = (bridge.Child("inner", "layer"), bridge.Leaf("gain", "scale", "a b -> b a"))
    bridge.register(JaxScale, TorchScale, *entries, jax_only=("table",))
    bridge.convert(source, target)
    np.testing.assert_array_equal(target.scale.detach(), np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(target.layer.weight.detach(), source.inner.kernel.get_value().T)

    class Derived(TorchScale):
        """A subclass follows the rule of its base."""

    back = JaxScale()
    nnx.update(back, jax.tree.map(jnp.zeros_like, nnx.state(back)))
    derived = Derived()
    derived.load_state_dict(copy.deepcopy(target.state_dict()))
    assert equal(bridge.convert(derived, back), source)


def test_two_rules_with_equal_right_are_refused():
    class JaxSpecial(nnx.Linear):
        pass

    class TorchSpecial(nn.Linear):
        pass

    source, target = JaxSpecial(2, 3, rngs=nnx.Rngs(0)), TorchSpecial(2, 3)
    with rules.trial({(JaxSpecial, nn.Linear): rules.Rule(), (nnx.Linear, TorchSpecial): rules.Rule()}):
        words = r"\(JaxSpecial, Linear\) and \(Linear, TorchSpecial\) apply to \(JaxSpecial, TorchSpecial\)"
        with pytest.raises(ValueError, match=words):
            bridge.convert(source, target)
        with rules.trial({(JaxSpecial, TorchSpecial): rules.find(nnx.Linear, nn.Linear)}):
            bridge.convert(source, target)
    np.testing.assert_array_equal(target.weight.detach(), source.kernel.get_value().T)


def test_register_checks_its_arguments():
    with pytest.raises(TypeError, match=r"jax_type must be a subclass of flax.nnx.Module"):
        bridge.register(nn.Linear, nn.Linear)
    with pytest.raises(TypeError, match=r"torch_type must be a subclass of torch.nn.Module"):
        bridge.register(nnx.Linear, nnx.Linear)
    with pytest.raises(ValueError, match="either entries or by"):
        bridge.register(JaxScale, TorchScale, bridge.Leaf("a", "b"), by=lambda j, t: ())
