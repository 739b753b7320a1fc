"""Models that were retrofitted in both frameworks: converted, verified, and their checkpoints read across."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import bridge
import mhc_jax.nn
import mhc_torch
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.nn import ConnectionParam
from mhc_jax.nn.retrofitting import BLOCKS
from mhc_torch.models import Decoder as TorchDecoder
from mhc_torch.models import DecoderConfig as TorchConfig
from tests.bridge import qwen3

SIZES = {"features": 8, "mlp_features": 12, "depth": 2, "num_heads": 2}
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 5))
KINDS = {"streams": {"streams": 2}, "identity": {"constraint": "identity"}, "history": {"history": 3}}


@pytest.fixture(autouse=True)
def known():
    mhc_jax.nn.register_block(qwen3.Layer, dict(mhc_torch.retrofitting.BLOCKS["Qwen3DecoderLayer"]))
    yield
    del BLOCKS[qwen3.Layer]


def listed():
    """A list of layers as a user has it, and the model of transformers."""
    jax_model, torch_model, _ = qwen3.pair()
    return jax_model, torch_model


def scanned():
    """A scan of layers, and a list of them, whose sums are left to what is around them."""
    jax_model = Decoder(DecoderConfig(17, **SIZES), rngs=nnx.Rngs(0))
    return jax_model, bridge.convert(jax_model, TorchDecoder(TorchConfig(17, **SIZES)).eval())


class JaxOutput(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(12, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, y, x):
        return self.norm(self.dense(y) + x)


class JaxUp(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 12, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


class JaxPost(nnx.Module):
    def __init__(self, rngs):
        self.up, self.output = JaxUp(rngs), JaxOutput(rngs)

    def __call__(self, x):
        return self.output(self.up(x), x)


class TorchOutput(torch.nn.Module):
    weight_of_x = 1.0

    def __init__(self):
        super().__init__()
        self.dense, self.norm = torch.nn.Linear(12, 8), torch.nn.LayerNorm(8, eps=1e-6)

    def forward(self, y, x):
        return self.norm(self.dense(y) + self.weight_of_x * x)


class TorchUp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(8, 12)

    def forward(self, x):
        return torch.tanh(self.dense(x))


class TorchPost(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.output = TorchUp(), TorchOutput()

    def forward(self, x):
        return self.output(self.up(x), x)


@pytest.fixture
def post_norm(monkeypatch):
    """Blocks as BERT's: a module in them adds what the branch, which begins elsewhere, puts out inside of it."""
    branches = {"mlp": ("up", "output.dense")}
    monkeypatch.setitem(BLOCKS, JaxPost, [branches])
    monkeypatch.setitem(mhc_torch.retrofitting.BLOCKS, TorchPost, branches)
    jax_model = nnx.Sequential(JaxPost(nnx.Rngs(0)), JaxPost(nnx.Rngs(1)))
    return jax_model, bridge.convert(jax_model, torch.nn.Sequential(TorchPost(), TorchPost()))


def stir(model):
    """Connections as if they had learned."""
    params = nnx.state(model, ConnectionParam)
    rng = np.random.default_rng(1)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), params))
    return model


def logits(output):
    output = output["logits"] if isinstance(output, dict) else output
    return output.detach().numpy() if isinstance(output, torch.Tensor) else np.asarray(output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [listed, scanned])
def test_a_pair(pair, kind, tmp_path):
    jax_model, torch_model = pair()
    plain = logits(torch_model(torch.from_numpy(TOKENS)))
    stir(mhc_jax.nn.retrofit(jax_model, **KINDS[kind]))
    mhc_torch.retrofit(torch_model, **KINDS[kind])
    np.testing.assert_allclose(logits(torch_model(torch.from_numpy(TOKENS))), plain, atol=1e-5)
    # A checkpoint of one framework, read in the other, and back.
    bridge.save(tmp_path / "jax.safetensors", jax_model)
    bridge.convert_file(
        tmp_path / "jax.safetensors", tmp_path / "torch.safetensors", jax_model, torch_model, to="torch"
    )
    bridge.load(tmp_path / "torch.safetensors", torch_model)
    found = logits(torch_model(torch.from_numpy(TOKENS)))
    np.testing.assert_allclose(found, logits(jax_model(jnp.asarray(TOKENS))), rtol=1e-3, atol=1e-4)
    assert abs(found - plain).max() > 1e-2
    twin = mhc_jax.nn.retrofit(pair()[0], **KINDS[kind])
    bridge.convert(torch_model, twin)
    states = (nnx.state(model, nnx.PathContains("hyper_connections")) for model in (twin, jax_model))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(("pair", "kind"), [(listed, "streams"), (scanned, "history")])
def test_it_is_proved(pair, kind):
    jax_model, torch_model = pair()
    stir(mhc_jax.nn.retrofit(jax_model, **KINDS[kind]))
    mhc_torch.retrofit(torch_model, **KINDS[kind])
    bridge.convert(jax_model, torch_model)
    options = {} if pair is scanned else {"outputs": {"logits": "logits"}}
    report = bridge.verify(jax_model, torch_model, TOKENS, **options)
    assert report.ok, report
    layers = {row.path for row in report.rows if row.check.startswith("layer alone")}
    assert {"model.layers.0.mlp", "model.layers.0.hyper_connections.mlp"} <= layers
    # A fault is found where it is born.
    with torch.no_grad():
        torch_model.model.layers[0].hyper_connections.mlp.get_parameter("bias" if kind == "streams" else "gain").add_(1)
    report = bridge.verify(jax_model, torch_model, TOKENS, training=False, **options)
    assert not report.ok
    assert all("model.layers.0" in fault for fault in report.faults)


@pytest.mark.parametrize("kind", ["streams", "history"])
def test_a_sum_inside_a_module_of_the_block_is_proved(post_norm, kind):
    jax_model, torch_model = post_norm
    stir(mhc_jax.nn.retrofit(jax_model, **KINDS[kind]))
    mhc_torch.retrofit(torch_model, **KINDS[kind])
    bridge.convert(jax_model, torch_model)
    x = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32)
    report = bridge.verify(jax_model, torch_model, x)
    assert report.verdict == "EQUAL", report
    layers = {row.path for row in report.rows if row.check.startswith("layer alone")}
    assert {"0", "0.up", "0.output.dense", "0.output.norm"} <= layers
    assert "0.output" not in layers  # it adds to states that only the block around it has
    torch_model[1].output.weight_of_x = 1.1
    report = bridge.verify(jax_model, torch_model, x, training=False)
    assert list(report.faults) == ["1"]


def test_what_differs_is_named():
    jax_model, torch_model = scanned()
    mhc_jax.nn.retrofit(jax_model, streams=2)
    with pytest.raises(ValueError, match=r"hyper_connections\.attention\.phi.* has no counterpart"):
        bridge.convert(jax_model, torch_model)
    mhc_torch.retrofit(torch_model, streams=2, iterations=5)
    with pytest.warns(UserWarning, match="streams: jax stack.layers.hyper_connections.attention has"):
        bridge.convert(jax_model, torch_model)
