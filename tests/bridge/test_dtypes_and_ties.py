"""Weights go into models of other floating-point dtypes, or where less is tied, if that is asked for."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
from bridge.weights.arrays import to_numpy


class TorchTied(nn.Module):
    def __init__(self, dtype=torch.float32, tied=True):
        super().__init__()
        self.emb = nn.Embedding(7, 4, dtype=dtype)
        self.head = nn.Linear(4, 7, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.emb.weight


class JaxUntied(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.emb = nnx.Embed(7, 4, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(4, 7, use_bias=False, param_dtype=dtype, rngs=rngs)


def linear(dtype=jnp.float32):
    return nnx.Linear(3, 2, param_dtype=dtype, rngs=nnx.Rngs(0))


DTYPES = [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32"), ("float32", "float16")]


@pytest.mark.parametrize(("theirs", "ours"), DTYPES)
def test_values_are_rounded_to_the_dtype_of_the_target(theirs, ours, tmp_path):
    source, dtype = nn.Linear(3, 2, dtype=getattr(torch, theirs)), getattr(torch, ours)
    expected = {name: to_numpy(p.to(dtype)) for name, p in source.named_parameters()}
    with pytest.raises(ValueError, match=f"has dtype {ours}, torch weight has dtype {theirs}"):
        bridge.convert(source, linear(ours))
    target = bridge.convert(source, linear(ours), dtype="cast")
    assert target.kernel[...].dtype == ours
    np.testing.assert_array_equal(target.kernel[...], expected["weight"].T)
    back = bridge.convert(target, nn.Linear(3, 2, dtype=getattr(torch, theirs)), dtype="cast")
    assert back.bias.dtype == source.bias.dtype
    assert torch.equal(back.bias, source.bias.to(dtype).to(source.bias.dtype))

    bridge.save(tmp_path / "x.safetensors", source)
    models = linear(ours), nn.Linear(3, 2, device="meta", dtype=getattr(torch, theirs))
    bridge.convert_file(tmp_path / "x.safetensors", tmp_path / "jax.safetensors", *models, "jax", dtype="cast")
    loaded = bridge.load(tmp_path / "jax.safetensors", linear(ours))
    np.testing.assert_array_equal(loaded.kernel[...], expected["weight"].T)
    with pytest.raises(ValueError, match=f"bias is {theirs}.* in the file, {ours}"):
        bridge.load(tmp_path / "x.safetensors", nn.Linear(3, 2, dtype=dtype))
    loaded = bridge.load(tmp_path / "x.safetensors", nn.Linear(3, 2, dtype=dtype), dtype="cast")
    np.testing.assert_array_equal(to_numpy(loaded.weight), expected["weight"])
    bridge.save(tmp_path / "j.safetensors", linear(theirs))
    kernel = bridge.load(tmp_path / "j.safetensors", linear(ours), dtype="cast").kernel[...]
    assert kernel.dtype == ours
    np.testing.assert_array_equal(kernel, linear(theirs).kernel[...].astype(ours))


def test_whole_numbers_are_never_cast():
    source, target = nn.BatchNorm1d(3), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    target.mean = nnx.BatchStat(jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="has dtype int32"):
        bridge.convert(source, target, dtype="cast")


def test_what_is_tied_goes_to_each_of_several(tmp_path):
    source = TorchTied()
    with pytest.raises(ValueError, match=r"emb.weight and head.weight are tied, but jax emb.embedding and head.kernel"):
        bridge.convert(source, JaxUntied())
    target = bridge.convert(source, JaxUntied(), untie=True)
    np.testing.assert_array_equal(target.emb.embedding[...], source.emb.weight.detach())
    np.testing.assert_array_equal(target.head.kernel[...], source.emb.weight.detach().T)
    bridge.save(tmp_path / "x.pt", source)
    models = JaxUntied(jnp.bfloat16), TorchTied()
    bridge.convert_file(tmp_path / "x.pt", tmp_path / "j.safetensors", *models, "jax", dtype="cast", untie=True)
    loaded = bridge.load(tmp_path / "j.safetensors", JaxUntied(jnp.bfloat16))
    np.testing.assert_array_equal(loaded.head.kernel[...], to_numpy(source.emb.weight.bfloat16()).T)


def test_several_never_become_one():
    # Which of the two would win?
    with pytest.raises(ValueError, match=r"torch emb.weight and head.weight are tied, but jax"):
        bridge.convert(JaxUntied(), TorchTied(), untie=True)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dtype": "float32"}, ValueError, "dtype must be 'equal' or 'cast', got 'float32'"),
        ({"untie": "jax"}, TypeError, "untie must be of type bool, got 'jax'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_named(options, error, text, tmp_path):
    with pytest.raises(error, match=text):
        bridge.convert(nn.Linear(3, 2), linear(), **options)
    bridge.save(tmp_path / "x.pt", nn.Linear(3, 2))
    with pytest.raises(ValueError, match="dtype='cast' needs a model"):
        bridge.load(tmp_path / "x.pt", dtype="cast")
