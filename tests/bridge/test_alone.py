"""Layers are run alone also where their arrays look other on the two sides, or a transformation runs them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
from bridge.proof.judge import arranged, partners
from bridge.weights import rules

X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)


class JaxLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm, self.fc = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, other=None):
        return x + jnp.tanh(self.fc(self.norm(x)))


class TorchLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.factor = nn.LayerNorm(8), nn.Linear(8, 8), 1.0

    def forward(self, x):
        return x + torch.tanh(self.fc(self.norm(x))) * self.factor


class JaxScanned(nnx.Module):
    """A stack of four layers of nobody's class in particular, which NNX scans."""

    def __init__(self) -> None:
        self.blocks = nnx.vmap(JaxLayer, in_axes=0)(nnx.Rngs(0).split(4))

    def __call__(self, x):
        return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


class JaxMapped(JaxScanned):
    """The same layers side by side."""

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.blocks, x).sum(0)


class TorchChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TorchLayer() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class TorchSum(TorchChain):
    def forward(self, x):
        return sum(block(x) for block in self.blocks)


@pytest.fixture(autouse=True)
def own_rules(monkeypatch):
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    bridge.register(JaxScanned, TorchChain, bridge.Child("blocks", "blocks.*"))


@pytest.mark.parametrize("kinds", [(JaxScanned, TorchChain), (JaxMapped, TorchSum)])
def test_a_fault_in_one_layer_of_a_stack_of_any_class_is_named(kinds) -> None:
    jax_model = kinds[0]()
    torch_model = bridge.convert(jax_model, kinds[1]())
    report = bridge.verify(jax_model, torch_model, X, training=False)
    assert report.verdict == "EQUAL", str(report)
    alone = {row.path for row in report.rows if row.check == "layer alone: value"}
    assert alone == {""} | {f"blocks.{i}{name}" for i in range(4) for name in ("", ".norm", ".fc")}
    assert "layers not run alone" not in report.header
    torch_model.blocks[2].factor = 1.00001
    assert list(bridge.verify(jax_model, torch_model, X, training=False).faults) == ["blocks.2"]
    torch_model.blocks[2].factor = 1.0
    with torch.no_grad():
        torch_model.blocks[1].fc.weight[0, 0] *= 1.001
    assert list(bridge.verify(jax_model, torch_model, X, training=False).faults) == ["blocks.1.fc"]


class JaxNormed(nnx.Module):
    def __init__(self) -> None:
        make = nnx.vmap(lambda rngs: nnx.BatchNorm(8, momentum=0.9, epsilon=1e-5, rngs=rngs), in_axes=0)
        self.blocks = make(nnx.Rngs(0).split(2))

    def __call__(self, x):
        return nnx.scan(lambda norm, x: x + jnp.tanh(norm(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.blocks, x
        )


class TorchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2))

    def forward(self, x):
        for norm in self.blocks:
            x = x + torch.tanh(norm(x))
        return x


def test_variances_of_batch_norms_in_a_stack_are_compared_by_one_convention() -> None:
    bridge.register(JaxNormed, TorchNormed, bridge.Child("blocks", "blocks.*"))
    jax_model = JaxNormed()
    torch_model = bridge.convert(jax_model, TorchNormed())
    report = bridge.verify(jax_model, torch_model, X[0], steps=1)
    assert report.verdict == "EQUAL", str(report)
    torch_model.blocks[1].momentum = 0.11
    assert list(bridge.verify(jax_model, torch_model, X[0], training=False).faults) == ["blocks.1"]


def test_without_a_rule_for_a_stack_the_error_has_it(own_rules) -> None:
    rules._rules.pop((JaxScanned, TorchChain))
    hint = 'bridge.register(JaxScanned, TorchChain, bridge.Child("blocks", "blocks.*"))'
    with pytest.raises(ValueError, match="do not correspond") as caught:
        bridge.convert(JaxScanned(), TorchChain())
    assert hint in str(caught.value).splitlines()[1]


class TorchNamed(TorchChain):
    """Calls its layers by names that the layers in JAX do not have."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x=x, flag=None)
        return x


class TorchNamedLayer(TorchLayer):
    def forward(self, x, flag):
        return super().forward(x)


def test_layers_not_run_alone_count_in_the_head_with_the_reason() -> None:
    jax_model, torch_model = JaxScanned(), TorchNamed()
    for block in torch_model.blocks:
        block.__class__ = TorchNamedLayer
    report = bridge.verify(jax_model, bridge.convert(jax_model, torch_model), X, training=False)
    assert report.ok, str(report)
    head = report.header["layers not run alone"]
    assert head.startswith("4 of 13: blocks.0, blocks.1, blocks.2 and 1 more: it runs inside a JAX transformation")
    assert "unexpected keyword argument 'flag'" in head


class JaxHeads(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.fc, self.norm = nnx.Linear(8, 8, rngs=rngs), nnx.RMSNorm(4, epsilon=1e-6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.fc(x).reshape(*x.shape[:2], 2, 4)).reshape(x.shape)


class TorchHeads(nn.Module):
    """Heads before positions, and merged with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.RMSNorm(4, eps=1e-6)

    def forward(self, x):
        b, t = x.shape[:2]
        y = self.norm(self.fc(x).view(b, t, 2, 4).transpose(1, 2).reshape(2 * b, t, 4))
        return y.view(b, 2, t, 4).transpose(1, 2).reshape(x.shape)


def test_heads_split_here_and_merged_there() -> None:
    jax_model = JaxHeads()
    torch_model = bridge.convert(jax_model, TorchHeads())
    report = bridge.verify(jax_model, torch_model, X, training=False)
    assert report.verdict == "EQUAL", str(report)
    assert "norm" in {row.path for row in report.rows if row.check == "layer alone: value"}
    assert "layers not run alone" not in report.header
    torch_model.norm.eps = 1e-5
    assert list(bridge.verify(jax_model, torch_model, X, training=False).faults) == ["norm"]


def test_an_arrangement_is_taken_only_where_the_values_show_one() -> None:
    turn, back = arranged(X.reshape(2, 5, 2, 4), np.swapaxes(X.reshape(2, 5, 2, 4), 1, 2).reshape(4, 5, 4))
    np.testing.assert_array_equal(back(turn(X.reshape(2, 5, 2, 4))), X.reshape(2, 5, 2, 4))
    merged, split = np.swapaxes(X.reshape(2, 5, 2, 4), 1, 2).reshape(4, 5, 4), X.reshape(2, 5, 2, 4)
    turn, back = arranged(merged, split)
    np.testing.assert_array_equal(turn(merged), split)
    np.testing.assert_array_equal(back(split), merged)
    assert arranged(X.reshape(2, 5, 2, 4), X[::-1].reshape(4, 5, 4)) is None
    assert arranged(np.ones((2, 5, 2, 4)), np.ones((4, 5, 4))) is None


class JaxRotated(nnx.Module):
    """Makes its rotary table inside; gives its keys beside its result, as layers with a cache do."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        angles = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(2) / 2)
        angles = jnp.concatenate([angles, angles], -1)
        turned = jnp.concatenate([-x[..., 2:], x[..., :2]], -1)
        keys = x * jnp.cos(angles) + turned * jnp.sin(angles)
        return x + self.fc(keys), keys


class JaxRotating(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.fc, self.layers = nnx.Linear(8, 4, rngs=rngs), nnx.List([JaxRotated(rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.fc(x)
        for layer in self.layers:
            x, _ = layer(x)
        return x


class TorchRotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, table, x):
        cos, sin = table
        turned = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x + self.fc(x * cos + turned * sin)


class TorchRotating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.layers = nn.Linear(8, 4), nn.ModuleList(TorchRotated() for _ in range(2))
        self.bases = [100.0, 100.0]

    def forward(self, x):
        x = self.fc(x)
        for base, layer in zip(self.bases, self.layers, strict=True):
            angles = torch.arange(x.shape[1])[:, None] / base ** (torch.arange(2) / 2)
            angles = torch.cat([angles, angles], -1)
            x = layer((angles.cos(), angles.sin()), x)
        return x


def test_a_table_that_one_side_passes_and_the_other_makes_inside() -> None:
    jax_model = JaxRotating()
    torch_model = bridge.convert(jax_model, TorchRotating())
    report = bridge.verify(jax_model, torch_model, X)
    assert report.verdict == "EQUAL", str(report)
    assert "layers not run alone" not in report.header
    alone = {(row.path, row.check) for row in report.rows}
    for layer in ("layers.0", "layers.1"):
        assert {(layer, "layer alone: value"), (layer, "layer alone: gradient of input")} <= alone
    torch_model.bases[1] = 90.0  # the table of the second layer alone
    assert list(bridge.verify(jax_model, torch_model, X).faults) == ["layers.1"]


def test_partners_of_lists_of_other_lengths_show_it_by_their_values() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))
    cos = rng.standard_normal((3, 4))
    assert [(p.jax, p.torch) for p in partners([x, y], [cos, y, x])] == [(0, 2), (1, 1)]
    (only,) = partners([np.moveaxis(x, 1, -1), cos, y], [x])
    assert only.jax == 0
    np.testing.assert_array_equal(only.how[0](np.moveaxis(x, 1, -1)), x)
    assert partners([x], [cos, y]) is None
    assert partners([x, x], [x, y, cos]) is None


def test_layouts_are_known_behind_a_fault_too() -> None:
    """Heads split here and merged there, behind a layer that is wrong."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 2, 4))
    near = np.swapaxes(x + 0.3 * rng.standard_normal(x.shape), 1, 2).reshape(4, 5, 4)
    turn, _ = arranged(x, near)
    np.testing.assert_array_equal(turn(x), np.swapaxes(x, 1, 2).reshape(4, 5, 4))
    assert arranged(x, rng.standard_normal((4, 5, 4))) is None


class JaxWhich(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.fc(x).argmax(-1)


class JaxChoosing(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.which, self.out = JaxWhich(rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(x) + self.which(x)[..., None].astype(x.dtype)


class TorchWhich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(x).argmax(-1).float()


class TorchChoosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.which, self.out = TorchWhich(), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(x) + self.which(x)[..., None]


def test_a_layer_whose_results_have_no_partner_at_all_counts_as_not_run() -> None:
    jax_model = JaxChoosing()
    report = bridge.verify(jax_model, bridge.convert(jax_model, TorchChoosing()), X, training=False)
    assert report.ok, str(report)
    assert report.header["layers not run alone"] == "1 of 4: which: it gives other arrays in JAX than in torch"
