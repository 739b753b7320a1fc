"""One decoder in both frameworks, and the Llama and Qwen3 of transformers: one function, one set of names."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import bridge
from mhc_jax.models import Decoder, DecoderConfig
from mhc_torch.models import Decoder as TorchDecoder
from mhc_torch.models import DecoderConfig as TorchConfig
from tests.integration.text import windows

SIZES = {"vocabulary": 61, "features": 16, "mlp_features": 24, "depth": 2, "num_heads": 4, "num_kv_heads": 2}
CONNECTIONS = {
    "residual": {},
    "history": {"max_history": 3, "use_gating": True, "init": "uniform"},
    "streams": {"streams": 2},
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def transformers_model(kind, tied):
    """A tiny one with weights that are far from any initialization, bfloat16 values in float32."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    ends = {"eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": tied}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **ends, rope_parameters=LLAMA3))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **ends, head_dim=8))
    for parameter in model.parameters():
        mean = 1.0 if parameter.ndim == 1 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.3)
        parameter.data = parameter.data.bfloat16().float()
    return model.eval()


def scrambled(model):
    """The model with connections that are far from the start, so that a map or logit at the wrong place shows."""
    leaves = [leaf for path, leaf in nnx.to_flat_state(nnx.state(model)) if {"alpha", "bias", "phi"} & set(path)]
    for i, leaf in enumerate(leaves):
        leaf[...] = leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
    return model


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_the_bridge_moves_and_verifies_it(connection):
    options = CONNECTIONS[connection]
    sizes = SIZES | {"qk_norm": True, "tied": connection == "history", "depth": 2 if connection == "history" else 1}
    model = scrambled(Decoder(DecoderConfig(**sizes), connection, rngs=nnx.Rngs(0), **options))
    twin = bridge.convert(model, TorchDecoder(TorchConfig(**sizes), connection, **options))
    report = bridge.verify(model, twin, TOKENS.astype(np.int32))
    assert report.ok, report
    back = Decoder(DecoderConfig(**sizes), connection, rngs=nnx.Rngs(1), **options)
    bridge.convert(twin, back)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(back, nnx.Param), nnx.state(model, nnx.Param)))

    tokens = torch.from_numpy(TOKENS)
    np.testing.assert_allclose(model.loss(jnp.asarray(TOKENS), chunk=5), twin.loss(tokens, chunk=3).item(), rtol=1e-5)
    positions, segments = np.arange(9)[::-1] * np.ones((2, 1), int), np.sort(TOKENS // 30)
    packed = model(jnp.asarray(TOKENS), positions=jnp.asarray(positions), segments=jnp.asarray(segments))
    theirs = twin(tokens, positions=torch.from_numpy(positions), segments=torch.from_numpy(segments))
    np.testing.assert_allclose(packed, theirs.detach(), atol=1e-4)
    generated = model.generate(jnp.asarray(TOKENS), 5)
    np.testing.assert_array_equal(generated, twin.generate(tokens, 5))


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen3", True)])
def test_checkpoints_of_transformers_give_their_logits_and_tokens(kind, tied, tmp_path):
    theirs = transformers_model(kind, tied)
    # Saved in shards, and once in half the bytes, which hold these weights exactly.
    (copy.deepcopy(theirs).bfloat16() if tied else theirs).save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = DecoderConfig.from_transformers(bridge.read_config(tmp_path))
    assert config == DecoderConfig.from_transformers(theirs.config)
    model = bridge.load_pretrained(tmp_path, Decoder(config, rngs=nnx.Rngs(0)))
    twin = bridge.load_pretrained(tmp_path, TorchDecoder(TorchConfig.from_transformers(theirs.config)))
    assert twin.state_dict().keys() == theirs.state_dict().keys()

    tokens = torch.from_numpy(TOKENS)
    expected = theirs(tokens).logits.detach()
    np.testing.assert_allclose(twin(tokens).detach(), expected, atol=1e-5)
    np.testing.assert_allclose(model(jnp.asarray(TOKENS)), expected, atol=1e-5)
    continued = theirs.generate(tokens, max_new_tokens=6, do_sample=False)
    np.testing.assert_array_equal(twin.generate(tokens, 6), continued)
    np.testing.assert_array_equal(model.generate(jnp.asarray(TOKENS), 6), continued)


# Mixing logits start as weights of 1 - 1e-4, maps as those of the residual network.
@pytest.mark.parametrize(("connection", "tolerance"), [("history", 1e-2), ("streams", 1e-5)])
def test_a_checkpoint_starts_a_decoder_with_another_connection(connection, tolerance, tmp_path):
    theirs = transformers_model("qwen3", tied=False)
    theirs.save_pretrained(tmp_path)
    config = DecoderConfig.from_transformers(theirs.config)
    expected = theirs(torch.from_numpy(TOKENS)).logits.detach()
    model = bridge.load_pretrained(tmp_path, Decoder(config, connection, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(model(jnp.asarray(TOKENS)), expected, atol=tolerance)
    twin = bridge.load_pretrained(tmp_path, TorchDecoder(TorchConfig.from_transformers(theirs.config), connection))
    np.testing.assert_allclose(twin(torch.from_numpy(TOKENS)).detach(), expected, atol=tolerance)


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    theirs = transformers_model("llama", tied=False)
    theirs.save_pretrained(tmp_path)
    config = TorchConfig.from_transformers(theirs.config)
    with pytest.raises(ValueError, match="depth is 2, not 3"):
        bridge.load_pretrained(tmp_path, TorchDecoder(TorchConfig(**{**vars(config), "depth": 3})))
    with pytest.raises(ValueError, match=r"norm.weight is float32, which the decoder's bfloat16 cannot hold"):
        bridge.load_pretrained(tmp_path, TorchDecoder(config).bfloat16())
    broken = {name: value for name, value in theirs.state_dict().items() if name != "model.norm.weight"}
    bridge.save(tmp_path / "model.safetensors", broken | {"model.extra": torch.zeros(2)})
    decoder = TorchDecoder(config)
    before = decoder.lm_head.weight.clone()
    with pytest.raises(ValueError, match=r"(?s)model.norm.weight is missing.*model.extra is left over"):
        bridge.load_pretrained(tmp_path, decoder)
    assert torch.equal(decoder.lm_head.weight, before)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        bridge.load_pretrained(tmp_path / "nowhere", decoder)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json (is no JSON|must hold an object, got list)"):
            bridge.load_pretrained(tmp_path, decoder)


def test_a_trained_connection_is_not_dropped_on_the_way_to_a_residual_decoder():
    model = Decoder(DecoderConfig(**SIZES), "history", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"stack\.mixing_logits.*has no counterpart"):
        bridge.convert(model, TorchDecoder(TorchConfig(**SIZES)))
    twin = TorchDecoder(TorchConfig(**SIZES), "history")
    with pytest.raises(ValueError, match=r"skip\.mixing_logits.*has"):
        bridge.convert(twin, Decoder(DecoderConfig(**SIZES), rngs=nnx.Rngs(0)))


def test_both_packages_know_the_same_sizes_and_refuse_the_same():
    assert vars(DecoderConfig(**SIZES)) == vars(TorchConfig(**SIZES))
    for wrong, text in [
        ({"num_heads": 3, "num_kv_heads": 3}, "multiple of num_heads=3"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads, got 3"),
        ({"head_dim": 3}, "head_dim must be even"),
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
    ]:
        for kind in (DecoderConfig, TorchConfig):
            with pytest.raises(ValueError, match=text):
                kind(**{**SIZES, **wrong})
    given = transformers_model("llama", tied=False).config.to_dict()
    for wrong, text in [
        ({"model_type": "gpt2"}, "model_type must be 'llama' or 'qwen3', got 'gpt2'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be 'default' or 'llama3', got 'yarn'"),
    ]:
        for kind in (DecoderConfig, TorchConfig):
            with pytest.raises(ValueError, match=text):
                kind.from_transformers(given | wrong)


def test_the_form_of_older_config_files_is_read():
    old = {"model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "rms_norm_eps": 1e-5}
    old |= {"num_hidden_layers": 2, "num_attention_heads": 4, "rope_theta": 5e5}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    for kind in (DecoderConfig, TorchConfig):
        config = kind.from_transformers(old | {"rope_scaling": scaling})
        assert (config.rope_theta, config.rope_scaling.length, config.kv_heads) == (5e5, 8192, 4)
        assert kind.from_transformers(old | {"rope_scaling": None}).rope_scaling is None


def trained(connection, steps=40):
    """Bits per byte of the steps of training on the text."""
    config = DecoderConfig(256, features=32, mlp_features=80, depth=2, num_heads=2, tied=True)
    model = Decoder(config, connection, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        value, gradient = nnx.value_and_grad(lambda model: model.loss(tokens) / jnp.log(2))(model)
        optimizer.update(model, gradient)
        return value

    return np.array([step(model, optimizer, jnp.asarray(windows(8, 33, seed=i), jnp.int32)) for i in range(steps)])


def test_streams_learn_text_from_where_the_residual_network_starts():
    residual, streams = trained("residual"), trained("streams")
    np.testing.assert_allclose(streams[0], residual[0], rtol=1e-4)
    for bits in (residual, streams):
        assert bits[-5:].mean() < 0.7 * bits[0]
