"""Layers around layers, and those whose axes are free: norms of weights, LoRA, einsum, slopes, dropout."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import bridge
from tests.bridge.both_ways import check
from tests.bridge.models import randomize

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((2, 5, 4))
IMAGE = RNG.standard_normal((2, 6, 5, 4))


def rngs():
    return nnx.Rngs(0)


def rows(module):
    return module(torch.tensor(ROWS))


def channels_first(module):
    return module(torch.tensor(IMAGE).movedim(-1, 1)).movedim(1, -1)


# ---- instance norm, slopes, einsum -----------------------------------------------------------------------------------


def test_instance_norm():
    def make():
        return nnx.InstanceNorm(4, epsilon=1e-5, use_fast_variance=False, rngs=rngs())

    check(make, lambda: nn.InstanceNorm2d(4, affine=True), lambda m: m(jnp.asarray(IMAGE)), channels_first)
    with pytest.warns(UserWarning, match="epsilon: .*1e-06.*1e-05"):
        bridge.convert(nnx.InstanceNorm(4, rngs=rngs()), nn.InstanceNorm2d(4, affine=True))
    with pytest.raises(ValueError, match=r"torch running_mean, .* has no counterpart"):
        bridge.convert(make(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))


@pytest.mark.parametrize("slopes", [1, 4])
def test_slopes(slopes):
    check(
        lambda: nnx.PReLU(0.1 if slopes == 1 else jnp.full(4, 0.1)),
        lambda: nn.PReLU(slopes),
        lambda m: m(jnp.asarray(IMAGE)),
        channels_first,
    )
    if slopes == 1:
        with pytest.raises(ValueError, match=r"jax negative_slope has shape \(\).*torch weight has shape \(3,\)"):
            bridge.convert(nnx.PReLU(), nn.PReLU(3))


@pytest.mark.parametrize(
    ("equation", "kernel", "bias", "x"),
    [
        ("nta,hab->nthb", (2, 4, 3), (2, 3), ROWS),
        ("nta,abh->nthb", (4, 3, 2), (2, 3), ROWS),
        ("...a,ab->...b", (4, 6), None, ROWS),
        ("...ab,bca->...c", (4, 6, 5), (6,), ROWS),
    ],
)
def test_einsum(equation, kernel, bias, x):
    def make_torch():
        return nn.Linear(20 if equation.startswith("...ab") else 4, 6, bias=bias is not None)

    def run_torch(module):
        given = torch.tensor(x)
        return module(given.flatten(-2) if equation.startswith("...ab") else given).flatten(1)

    check(
        lambda: nnx.Einsum(equation, kernel, bias, rngs=rngs()),
        make_torch,
        lambda m: m(jnp.asarray(x)).reshape(len(x), -1),
        run_torch,
    )


def test_an_einsum_that_is_no_linear_layer():
    ours = nnx.Einsum("nha,hab->nhb", (2, 4, 3), rngs=rngs())
    with pytest.raises(ValueError, match=r"axes \['h'\] of 'nha,hab->nhb' are neither summed nor new"):
        bridge.convert(ours, nn.Linear(4, 6, bias=False))


def test_general_linear_of_several_axes():
    check(
        lambda: nnx.LinearGeneral((5, 4), (2, 3), axis=(-2, -1), rngs=rngs()),
        lambda: nn.Linear(20, 6),
        lambda m: m(jnp.asarray(ROWS)).reshape(2, 6),
        lambda m: m(torch.tensor(ROWS).flatten(1)),
    )


# ---- weight norm and spectral norm -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:the weights are converted.*epsilon")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, torch.nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed", "mirrored", "whole"])
def test_weight_norm(norm, kind):
    image = kind in ("conv", "transposed", "mirrored")
    layers = {
        "conv": (lambda: nnx.Conv(4, 6, (3, 2), padding="VALID", rngs=rngs()), lambda: nn.Conv2d(4, 6, (3, 2)), 0),
        "transposed": (
            lambda: nnx.ConvTranspose(4, 6, (3, 2), padding="VALID", transpose_kernel=True, rngs=rngs()),
            lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
            0,
        ),
        "mirrored": (
            lambda: nnx.ConvTranspose(4, 6, (3, 2), padding="VALID", rngs=rngs()),
            lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
            1,
        ),
    }
    default = (lambda: nnx.Linear(4, 6, rngs=rngs()), lambda: nn.Linear(4, 6), None if kind == "whole" else 0)
    make_jax, make_torch, dim = layers.get(kind, default)
    axes = None if kind == "whole" else -1
    check(
        lambda: nnx.WeightNorm(make_jax(), feature_axes=axes, epsilon=0.0, rngs=rngs()),
        lambda: norm(make_torch(), dim=dim),
        lambda m: m(jnp.asarray(IMAGE if image else ROWS)),
        channels_first if image else rows,
    )


def test_what_weight_norm_cannot_be():
    ours = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs()), rngs=rngs())
    with pytest.raises(ValueError, match="torch has no weight_norm on `weight` there"):
        bridge.convert(ours, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"flax normalizes for each index of \['out'\], torch of \['in'\]"):
        bridge.convert(ours, parametrizations.weight_norm(nn.Linear(4, 4), dim=1))
    with pytest.warns(UserWarning, match="epsilon: .*1e-12.*0.0"):
        bridge.convert(ours, parametrizations.weight_norm(nn.Linear(4, 4)))


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, spectral_norm])
def test_spectral_norm_is_refused_with_the_reason(norm):
    ours = nnx.SpectralNorm(nnx.Linear(4, 6, rngs=rngs()), rngs=rngs())
    with pytest.raises(ValueError, match=r"1 problem:\n  .*goes on with the power iteration.*remove_parametrizations"):
        bridge.convert(norm(nn.Linear(4, 6)), ours)


def test_spectral_norm_baked_in():
    """The way that the refusal names."""
    theirs = parametrizations.spectral_norm(nn.Linear(4, 6)).eval()
    before = theirs(torch.ones(1, 4)).detach()
    plain = torch.nn.utils.parametrize.remove_parametrizations(theirs, "weight")
    ours = bridge.convert(plain, nnx.Linear(4, 6, rngs=rngs()))
    np.testing.assert_allclose(ours(jnp.ones((1, 4))), before, rtol=1e-5, atol=1e-6)


# ---- low-rank updates ------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Names and layouts as flax has them, around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 6)
        self.lora_a, self.lora_b = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(2, 6))

    def forward(self, x):
        return self.base(x) + x @ self.lora_a @ self.lora_b


class Capital(nn.Linear):
    """As loralib: matrices in torch's layout, within the layer, and a factor."""

    def __init__(self, scaling: float = 1.0) -> None:
        super().__init__(4, 6)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(6, 2))
        self.scaling = scaling

    def forward(self, x):
        return super().forward(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


def adapted(alpha: int = 2, **options):
    """The layer that peft makes of a linear one."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], **options)
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 6)), config).base_model.model[0]


@pytest.mark.parametrize("make_torch", [Small, Capital, adapted])
@pytest.mark.parametrize("around", [False, True])
def test_low_rank_updates(make_torch, around):
    def make_jax():
        if around:
            return nnx.LoRA(4, 2, 6, base_module=nnx.Linear(4, 6, rngs=rngs()), rngs=rngs())
        return nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs())

    check(make_jax, make_torch, lambda m: m(jnp.asarray(ROWS)), rows)


@pytest.mark.parametrize(
    ("make_torch", "told"),
    [
        (lambda: adapted(alpha=8), "scaling: .*1.0.*4.0"),
        (lambda: adapted(lora_dropout=0.1), "dropout: .*0.0.*0.1"),
        (lambda: Capital(0.5), "scaling: .*1.0.*0.5"),
    ],
)
def test_settings_of_updates(make_torch, told):
    with pytest.warns(UserWarning, match=told):
        bridge.convert(nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs()), make_torch())


def test_updates_that_are_not_there():
    with pytest.raises(ValueError, match="torch has no lora_A or lora_a"):
        bridge.convert(randomize(nn.Linear(4, 6)), nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs()))


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (lambda: nnx.Dropout(0.1), lambda: nn.Dropout(0.5), "rate: .*0.1.*0.5"),
        (lambda: nnx.Dropout(0.1), lambda: nn.Dropout2d(0.1), r"broadcast_dims: .*\(\).*\(1, 2\)"),
        (lambda: nnx.Dropout(0.1, broadcast_dims=(1,)), lambda: nn.Dropout(0.1), r"broadcast_dims: .*\(1,\).*\(\)"),
        (lambda: nnx.Dropout(0.1, broadcast_dims=(-2, 1)), lambda: nn.Dropout2d(0.1), None),
    ],
)
def test_dropout(ours, theirs, told, recwarn):
    class Ours(nnx.Module):
        def __init__(self) -> None:
            self.drop, self.linear = ours(), nnx.Linear(2, 2, rngs=rngs())

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.linear = theirs(), nn.Linear(2, 2)

    if told:
        with pytest.warns(UserWarning, match=told):
            bridge.convert(Theirs(), Ours())
    else:
        bridge.convert(Theirs(), Ours())
        assert not recwarn.list


def test_attention_with_a_row_of_zeros():
    ours = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs())
    with pytest.warns(UserWarning, match="add_zero_attn: .*False.*True"):
        bridge.convert(nn.MultiheadAttention(4, 2, add_zero_attn=True), ours)
