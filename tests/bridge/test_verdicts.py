"""Verdicts that can be trusted: casts inside models, models that differ from themselves, what has no reference."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
import mhc_jax.nn
import mhc_torch
from tests.bridge import casting, qwen3

X = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


@pytest.mark.parametrize("name", casting.FAULTS)
def test_every_fault_in_models_that_cast_is_named(name: str) -> None:
    common, planted, *layers = casting.FAULTS[name]
    # The smallest part of the model in which it lies: tests/fuzz/verdicts.py has larger ones.
    part = casting.parts_with(layers)[-1]
    report = bridge.verify(**casting.part(part, 0, casting.Options(**common), **planted), training=False)
    assert report.verdict == "DIFFERENT"
    assert sorted(report.faults) == sorted(path.removeprefix(part).lstrip(".") for path in layers)


def test_a_fault_deep_inside_is_named_at_its_place() -> None:
    _, planted, layer = casting.FAULTS["softmax in half precision"]
    assert list(bridge.verify(**casting.part("", **planted), training=False).faults) == [layer]


@pytest.mark.parametrize("number", range(len(casting.HEALTHY)))
def test_no_false_alarm_on_healthy_pairs_that_cast(number: int) -> None:
    part, common = casting.HEALTHY[number]
    report = bridge.verify(**casting.part(part, number, casting.Options(**common)), training=not number)
    assert report.ok, str(report)


def test_a_public_model_as_it_is_called_is_equal_and_an_epsilon_inside_is_named() -> None:
    jax_model, torch_model, tokens = qwen3.pair()
    given = {"inputs": tokens, "torch_inputs": {"input_ids": tokens, "use_cache": False}, "training": False}
    report = bridge.verify(jax_model, torch_model, **given)
    assert report.verdict == "EQUAL", str(report)
    assert max(row.float64_gap for row in report.rows if row.check == "layer value") < 1e-8
    torch_model.model.layers[0].self_attn.q_norm.variance_epsilon = 1e-5
    report = bridge.verify(jax_model, torch_model, **given)
    assert list(report.faults) == ["model.layers.0.self_attn.q_norm"]


class JaxAttend(nnx.Module):
    """A block of a vision transformer: `nnx.MultiHeadAttention` has its softmax in float32."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.fc(x + self.attention(x)).astype(jnp.float32), approximate=False).astype(x.dtype)


class TorchAttend(nn.Module):
    def __init__(self, gelu: str = "none") -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.fc, self.gelu = nn.Linear(4, 4), gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x + self.attention(x, x, x, need_weights=False)[0])
        return nn.functional.gelu(y.float(), approximate=self.gelu).to(x.dtype)


@pytest.mark.parametrize(("gelu", "verdict"), [("none", "EQUAL"), ("tanh", "DIFFERENT")])
def test_the_kind_of_gelu_where_attention_casts(gelu: str, verdict: str) -> None:
    jax_model = JaxAttend(nnx.Rngs(0))
    torch_model = bridge.convert(jax_model, TorchAttend(gelu))
    assert bridge.verify(jax_model, torch_model, X[None]).verdict == verdict


class JaxWrap(nnx.Module):
    """A linear layer, and what `step` makes of its result."""

    def __init__(self, step=None) -> None:
        self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(1))
        self.rngs, self.step = nnx.Rngs(2), step

    def __call__(self, x):
        y = self.drop(self.fc(x))
        return y if self.step is None else self.step(self, y)


class TorchWrap(nn.Module):
    def __init__(self, step=None, rate: float = 0.1) -> None:
        super().__init__()
        self.fc, self.drop, self.step = nn.Linear(4, 4), nn.Dropout(rate), step

    def forward(self, x):
        y = self.drop(self.fc(x))
        return y if self.step is None else self.step(y)


def wrapped(jax_step=None, torch_step=None, rate: float = 0.1) -> tuple[nnx.Module, nn.Module]:
    jax_model = JaxWrap(jax_step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rates
        return jax_model, bridge.convert(jax_model, TorchWrap(torch_step, rate))


def noise(y: torch.Tensor) -> torch.Tensor:
    return y * (1 + 0.3 * torch.randn_like(y))


def jax_noise(model: JaxWrap, y: jax.Array) -> jax.Array:
    return y * (1 + 0.3 * jax.random.normal(model.rngs.params(), y.shape))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((None, noise), "torch_model differs from itself by .* first in TorchWrap itself"),
        ((None, lambda y: nn.functional.dropout(y, 0.5)), "torch_model differs from itself"),
        ((jax_noise, None), "jax_model differs from itself by .* first in JaxWrap itself"),
    ],
)
def test_what_differs_from_itself_is_refused(steps: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bridge.verify(*wrapped(*steps), X)


def test_the_module_that_makes_noise_is_named() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return noise(super().forward(x))

    jax_model, torch_model = wrapped()
    torch_model.fc.__class__ = Noisy
    with pytest.raises(ValueError, match=r"first in fc \(Noisy\)"):
        bridge.verify(jax_model, torch_model, X)


def test_noise_too_small_to_refuse_is_never_equal() -> None:
    assert bridge.verify(*wrapped(None, lambda y: y * (1 + 1e-5 * torch.randn_like(y))), X).verdict != "EQUAL"


def test_a_jump_is_not_proved() -> None:
    # Both sides agree, yet every rounding decides which way the sign goes.
    x = np.zeros_like(X)
    jax_model, torch_model = wrapped(
        lambda _, y: jnp.sign(y[:, :2] - y[:, 2:]), lambda y: torch.sign(y[:, :2] - y[:, 2:])
    )
    with torch.no_grad():
        torch_model.fc.bias.fill_(0.7)
    bridge.convert(torch_model, jax_model)
    report = bridge.verify(jax_model, torch_model, x, training=False)
    assert report.verdict == "NOT PROVED"
    assert "1e-06" in " ".join(report.unproved)
    assert report.exit_status == 3


def test_rates_of_dropout_are_settings() -> None:
    report = bridge.verify(*wrapped(rate=0.5), X)
    assert report.verdict == "NOT PROVED"
    assert report.unproved == ["setting differs: rate: jax drop has 0.1, torch drop means 0.5"]
    assert bridge.verify(*wrapped(), X).ok


def bits(_: object, y: jax.Array) -> jax.Array:
    whole = jax.lax.bitcast_convert_type(y.astype(jnp.float32), jnp.int32)
    return y + 0 * jax.lax.bitcast_convert_type(whole, jnp.float32).astype(y.dtype)


def needs_float32(y: torch.Tensor) -> torch.Tensor:
    if y.dtype == torch.float64:
        raise RuntimeError("no kernel for double")
    return y


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((bits, None), "jax bitcast_convert_type"),
        ((None, lambda y: y + 0 * y.float().view(torch.int32).view(torch.float32).to(y.dtype)), r"torch view\(dtype\)"),
        ((None, needs_float32), "no kernel for double"),
    ],
)
def test_without_a_reference_nothing_is_proved_and_the_head_says_so(steps: tuple, reason: str) -> None:
    report = bridge.verify(*wrapped(*steps), X, training=False)
    assert report.verdict == "NOT PROVED"
    assert not report
    assert reason.replace("\\", "") in report.header["reference"]
    assert reason.replace("\\", "") in " ".join(report.unproved)
    assert str(report).splitlines()[-1].startswith("NOT PROVED")


def test_steps_that_insist_on_float32_have_a_reference() -> None:
    def twice(_: object, y: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return (carry * 0.9 + y).astype(jnp.float32), None

        return jax.lax.scan(body, jnp.zeros(y.shape, jnp.float32), None, length=2)[0]

    report = bridge.verify(*wrapped(twice, lambda y: y * 0.9 + y), X)
    assert report.ok, str(report)
    assert not bridge.verify(*wrapped(twice, lambda y: y * 0.90001 + y), X)


def helper(y: jax.Array) -> jax.Array:
    return y * 1.01


def test_a_fault_that_was_repaired_in_the_process_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    models = wrapped(lambda _, y: helper(y))
    assert not bridge.verify(*models, X)
    monkeypatch.setitem(globals(), "helper", lambda y: y)
    assert bridge.verify(*models, X).ok


def test_the_random_streams_of_the_caller_stay() -> None:
    models = wrapped()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bridge.verify(*models, X, training=False)
    assert torch.equal(torch.rand(3), expected)


def test_twelve_healthy_instance_norms() -> None:
    rng = np.random.default_rng(0)
    for seed in range(12):
        torch_model = nn.InstanceNorm2d(3, affine=True)
        with torch.no_grad():
            for leaf in torch_model.parameters():
                leaf.copy_(torch.tensor(rng.standard_normal(leaf.shape)))
        jax_model = bridge.convert(torch_model, nnx.InstanceNorm(3, epsilon=1e-5, rngs=nnx.Rngs(0)))
        x = (10 ** rng.uniform(-2, 2) * (3 + 0.3 * rng.standard_normal((2, 4, 4, 3)))).astype(np.float32)
        other = np.ascontiguousarray(np.moveaxis(x, -1, 1))
        report = bridge.verify(jax_model, torch_model, x, torch_inputs=other, seed=seed, training=seed == 0)
        assert report.ok, str(report)


class JaxUnit(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones(4))

    def __call__(self, x):
        mean = x.mean(-1, keepdims=True)
        return self.weight[...] * (x - mean) / jnp.sqrt((x * x).mean(-1, keepdims=True) - mean * mean + 1e-5)


class TorchUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def test_the_rounding_of_a_norm_belongs_to_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.weights.rules._rules", dict(bridge.weights.rules._rules))
    jax_model, torch_model = JaxUnit(), TorchUnit()
    x = X * 0.02 + 3
    assert not bridge.verify(jax_model, torch_model, x, training=False)

    def lost(_: nn.Module, x: torch.Tensor) -> float:
        return 1 + (x.mean(-1).square() / (x.var(-1, unbiased=False) + 1e-5)).max().item()

    bridge.register(JaxUnit, TorchUnit, cancellation=lost)
    report = bridge.verify(jax_model, torch_model, x, training=False)
    assert report.ok, str(report)


class JaxBlend(nnx.Module):
    """A weighted sum of two states that are nearly the same."""

    def __init__(self) -> None:
        self.logits = nnx.Param(jnp.array([3.0, 0.0]))

    def __call__(self, x):
        w = jax.nn.softmax(self.logits[...])
        return w[0] * x + w[1] * (x + 1)


class TorchBlend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([3.0, 0.0]))

    def forward(self, x):
        w = self.logits.softmax(0)
        return w[0] * x + w[1] * (x + 1)


def test_the_rounding_of_terms_that_cancel_in_a_gradient_belongs_to_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.weights.rules._rules", dict(bridge.weights.rules._rules))
    models, x = (JaxBlend(), TorchBlend()), 1e5 * (1 + X)
    report = bridge.verify(*models, x, training=False)
    assert {row.check for row in report.rows if not row.ok} == {"layer alone: gradient of"}

    def products(_: nn.Module, inputs: list, cotangents: list) -> float:
        (x,), (c,) = inputs, cotangents
        return np.linalg.norm(c) * np.linalg.norm(x) / np.sqrt(x.size)

    bridge.register(JaxBlend, TorchBlend, terms=products)
    report = bridge.verify(*models, x, training=False)
    assert report.ok, str(report)


def test_a_skip_that_nearly_chooses_one_of_two_large_states() -> None:
    torch_model = mhc_torch.MHCSkip(max_history=2)
    with torch.no_grad():
        torch_model.mixing_logits.copy_(torch.tensor([10.0, 0.0]))
    jax_model = bridge.convert(torch_model, mhc_jax.nn.MHCSkip(2, rngs=nnx.Rngs(0)))
    report = bridge.verify(jax_model, torch_model, (X, [1e4 * X[::-1], 1e4 * X.T]), training=False)
    assert report.ok, str(report)


def test_a_loss_is_moved_by_rounded_constants_as_its_outputs_are() -> None:
    # Here the one draw of roundings that is measured leaves the loss, a single number, nearly where it was.
    report = bridge.verify(**casting.part("layers.0.attention", 12, casting.Options(half_norm=True)))
    assert report.ok, str(report)


class JaxTied(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.embed.attend(self.embed(x))


class TorchTied(nn.Module):
    """The same weight in two modules, where JAX has one."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.embed, self.head, self.scale = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), scale
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x)) * self.scale


def test_a_weight_in_two_modules_that_is_one_in_jax_is_trained() -> None:
    jax_model, tokens = JaxTied(), np.array([[0, 1, 4]])
    report = bridge.verify(jax_model, bridge.convert(jax_model, TorchTied()), tokens)
    assert report.verdict == "EQUAL", str(report)
    assert [row.path for row in report.rows if row.check == "gradient"] == ["embed.weight"]
    assert bridge.verify(jax_model, bridge.convert(jax_model, TorchTied(1.001)), tokens).verdict == "DIFFERENT"


class JaxScaling(nnx.Module):
    def __init__(self) -> None:
        self.embed, self.out = nnx.Embed(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.out(self.embed(x) * 2.0)


class Scaled(nn.Embedding):
    factor = 2.0

    def forward(self, x):
        return super().forward(x) * self.factor


class TorchScaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = Scaled(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.embed(x))


def test_a_factor_inside_here_and_outside_there_is_said_to_be_no_more_than_that() -> None:
    jax_model, tokens = JaxScaling(), np.array([[0, 1, 4]])
    torch_model = bridge.convert(jax_model, TorchScaling())
    report = bridge.verify(jax_model, torch_model, tokens)
    assert list(report.faults) == ["embed"]
    assert any("agree as wholes" in note for note in report.notes)
    torch_model.embed.factor = 2.1
    report = bridge.verify(jax_model, torch_model, tokens)
    assert list(report.faults) == ["embed"]
    assert not any("agree as wholes" in note for note in report.notes)
