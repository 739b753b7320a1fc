"""The hyper-connections of whole models of transformers in JAX, layer by layer on the streams that the models have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Model
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel
from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config
from transformers.models.hy_v4.modeling_hy_v4 import HYV4Model

import bridge
import mhc_torch.nn
from bridge.proof.exact_torch import Exact
from mhc_jax import streams
from mhc_jax.nn import HyperConnections, StreamHead

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "num_experts_per_tok": 1,
    "n_routed_experts": 2,
    "index_n_heads": 1,
    "index_head_dim": 8,
    "index_topk": 4,
    "hc_mult": 3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DENSE = {"intermediate_size": 16, "kv_lora_rank": 8, "v_head_dim": 8, "mlp_layer_types": ["dense"] * 2}


def deepseek_v4():
    own = {"head_dim": 16, "sliding_window": 8, "o_groups": 2, "o_lora_rank": 4, "partial_rotary_factor": 0.5}
    kinds = {"layer_types": ["sliding_attention"] * 2, "mlp_layer_types": ["moe"] * 2}
    return DeepseekV4Model(DeepseekV4Config(**SIZES, **own, **kinds, hc_sinkhorn_iters=7, hc_eps=1e-3))


def hy_v4():
    own = {"head_dim": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "hc_magnitude": 1.5}
    return HYV4Model(HYV4Config(**SIZES, **DENSE, **own))


def glm5_next():
    own = {
        "qk_nope_head_dim": 8,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "num_key_value_heads": 2,
        "index_kpool": 2,
    }
    return Glm5NextTextModel(Glm5NextTextConfig(**SIZES, **DENSE, **own, layer_types=["linear_attention"] * 2))


def filled(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


MODELS = [deepseek_v4, glm5_next, hy_v4]


@pytest.mark.parametrize("make", MODELS)
def test_every_layer_computes_what_it_does_in_the_model(make):
    model = filled(make)
    met = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: met.update({name: args[0].detach().double()}))
        for name, module in model.named_modules()
        if name in bridge.hyper_connections(model)
    ]
    model(input_ids=torch.arange(8)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    twins = bridge.hyper_connections(model.double())
    assert list(met) == list(twins)
    assert len(met) == 4 + (make is not glm5_next)
    for name, twin in twins.items():
        with Exact(), torch.no_grad():
            expected = model.get_submodule(name)(met[name])
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        with jax.enable_x64(True):
            x = jnp.asarray(met[name].numpy())
            if isinstance(twin, StreamHead):
                found = [twin(x)]
            else:
                collapsed, post, res = streams.read(twin.params(), x, twin.config)
                # Theirs is applied transposed, and where nothing is mixed there is none.
                found = [post, *([] if res is None else [res.mT]), collapsed]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12 * theirs.abs().max())


@pytest.mark.parametrize("make", MODELS)
def test_there_and_back_is_bit_for_bit(make):
    model = filled(make)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    twins = bridge.hyper_connections(model)
    other = make()
    other.load_state_dict(model.state_dict())
    for name in twins:
        for parameter in other.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    bridge.return_hyper_connections(twins, other)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("option", [{"order": "rows"}, {"norm": "streams"}, {"pre_epsilon": 0.1}, {"post_scale": 1.5}])
def test_convert_tells_options_that_differ(option):
    ours, theirs = HyperConnections(jnp.tanh, 3, **option), mhc_torch.nn.HyperConnections(nn.Tanh(), 3)
    with pytest.warns(UserWarning, match=next(iter(option))):
        bridge.convert(ours, theirs)


def test_what_does_not_fit_is_refused_and_nothing_is_written():
    model = filled(hy_v4)
    twins = bridge.hyper_connections(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, *_ = twins
    other = twins[first]

    def refused(changed, match):
        with pytest.raises(ValueError, match=match):
            bridge.return_hyper_connections(changed, model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    last = list(twins)[-1]
    twins[last].bias[...] = twins[last].bias[...] + 1  # to be written, if anything is
    refused({name: twin for name, twin in twins.items() if name != first}, r"\['layers.0.attn_hc'\] are missing")
    refused(twins | {"layers.7.attn_hc": other}, r"\['layers.7.attn_hc'\] are not")
    config = other.config
    other.config = dataclasses.replace(config, post_scale=2.0)
    refused(twins, "layers.0.attn_hc must have the options .*post_scale=1.5.*, its twin has .*post_scale=2.0")
    other.config = config
    other.bias.set_value(other.bias[...].astype(jnp.bfloat16))
    refused(twins, "the bias of layers.0.attn_hc must be float32 of shape .*, its twin has bfloat16 of")
    with pytest.raises(ValueError, match="Linear has no hyper-connections that are known: DeepseekV4HyperConnection"):
        bridge.hyper_connections(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        bridge.hyper_connections({})
