"""Models as people mix them: parameters, inputs and steps of different dtypes, arrays that are no weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge

X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


class JaxPair(nnx.Module):
    """Two layers, which NNX computes in `dtype` whatever their parameters are."""

    def __init__(self, **dtypes: object) -> None:
        self.fc = nnx.Linear(8, 8, rngs=nnx.Rngs(0), **dtypes)
        self.out = nnx.Linear(8, 3, rngs=nnx.Rngs(1), **dtypes)

    def __call__(self, x):
        return self.out(jax.nn.gelu(self.fc(x), approximate=False))


class TorchPair(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, autocast: bool = False) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 3, dtype=dtype)
        self.autocast, self.factor = autocast, 1.0

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.out(nn.functional.gelu(self.fc(x.to(self.fc.weight.dtype))) * self.factor)


class Promoting(nn.Linear):
    """Parameters of bfloat16, products in float32."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float(), self.bias.float())


class TorchPromoting(TorchPair):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = Promoting(8, 8, dtype=torch.bfloat16), Promoting(8, 3, dtype=torch.bfloat16)

    def forward(self, x):
        return self.out(nn.functional.gelu(self.fc(x)) * self.factor)


HALF = {"param_dtype": jnp.bfloat16}
MIXED = {
    "bfloat16 parameters, float32 inputs": (HALF, TorchPromoting),
    "bfloat16 parameters and steps, float32 inputs": (
        {**HALF, "dtype": jnp.bfloat16},
        lambda: TorchPair(torch.bfloat16),
    ),
    "bfloat16 parameters, float32 steps": ({**HALF, "dtype": jnp.float32}, TorchPromoting),
    "float32 parameters, bfloat16 steps": ({"dtype": jnp.bfloat16}, lambda: TorchPair(autocast=True)),
}


@pytest.mark.parametrize("kind", MIXED)
def test_dtypes_may_be_mixed_and_a_fault_is_named(kind: str) -> None:
    dtypes, make = MIXED[kind]
    jax_model = JaxPair(**dtypes)
    torch_model = bridge.convert(jax_model, make())
    report = bridge.verify(jax_model, torch_model, X, training=kind.startswith("float32"))
    assert report.verdict == "EQUAL", str(report)
    torch_model.factor = 1.001  # far below the precision of bfloat16
    assert list(bridge.verify(jax_model, torch_model, X, training=False).faults) == [""]
    torch_model.factor = 1.0
    with torch.no_grad():
        torch_model.out.weight[0, 0] *= 1.125
    assert list(bridge.verify(jax_model, torch_model, X, training=False).faults) == ["out"]


def test_autocast_on_one_side_only_is_no_equality() -> None:
    jax_model = JaxPair()
    report = bridge.verify(jax_model, bridge.convert(jax_model, TorchPair(autocast=True)), X, training=False)
    assert report.verdict == "NOT PROVED"
    assert "output 0 is float32 in JAX and bfloat16 in torch" in " ".join(report.unproved)


class JaxHolds(nnx.Module):
    """Layers in a plain dict, a configuration that cannot be hashed, scalars, bare arrays."""

    def __init__(self) -> None:
        self.layers = nnx.data({"first": nnx.Linear(8, 8, rngs=nnx.Rngs(0))})
        self.config, self.sizes, self.act, self.none = nnx.static({"sizes": [1, {}]}), (1, 2), jnp.tanh, None
        self.mask, self.scale = nnx.data(jnp.tril(jnp.ones((8, 8)))), nnx.data(jnp.float32(2.0))

    def __call__(self, x):
        return self.act(self.layers["first"](x) @ self.mask) * self.scale


class TorchHolds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Linear(8, 8)})
        self.config, self.scale = {"sizes": [1]}, 2.0
        self.register_buffer("mask", torch.ones(8, 8).tril())
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.ones(8), persistent=False)

    def forward(self, x):
        return torch.tanh(self.layers["first"](x) @ self.mask) * self.scale * self.table


def test_what_a_model_holds_beside_its_weights() -> None:
    jax_model, torch_model = JaxHolds(), TorchHolds()
    bridge.convert(jax_model.layers["first"], torch_model.layers["first"])
    report = bridge.verify(jax_model, torch_model, X)
    assert report.verdict == "EQUAL", str(report)
    assert [note.split(" is ")[0] for note in report.notes] == ["jax scale", "torch calls"]
    with pytest.raises(ValueError, match=r"jax scale, float32\(\), has no counterpart"):
        bridge.convert(jax_model, torch_model)


def one_weight(model: TorchHolds) -> None:
    model.layers["first"].bias.data[3] += 1e-4


def mask(model: TorchHolds) -> None:
    model.mask[7, 0] = 0.999


def table(model: TorchHolds) -> None:
    model.table[3] = 0.999


def scale(model: TorchHolds) -> None:
    model.scale = 2.001


@pytest.mark.parametrize(("plant", "module"), [(one_weight, "layers.first"), (mask, ""), (table, ""), (scale, "")])
def test_a_fault_in_what_a_model_holds_is_named(plant, module) -> None:
    jax_model, torch_model = JaxHolds(), TorchHolds()
    bridge.convert(jax_model.layers["first"], torch_model.layers["first"])
    plant(torch_model)
    assert list(bridge.verify(jax_model, torch_model, X, training=False).faults) == [module]
