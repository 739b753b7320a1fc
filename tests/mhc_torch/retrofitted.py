"""Tiny models of transformers for test_retrofit.py, and their branches as formulas of their modules."""

import torch
import transformers
from torch import nn

from tests.mhc_torch.own_block import WIDTH

TOKENS = 30
_TEXT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT |= {"vocab_size": TOKENS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": TOKENS, "n_positions": 20, "pad_token_id": 0}
_GPT2 |= {"bos_token_id": None, "eos_token_id": None}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT, num_key_value_heads=1))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_TEXT, num_key_value_heads=1, head_dim=8))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_TEXT, num_key_value_heads=1))


def gpt2(**settings):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2, **settings))


def bert(**settings):
    return transformers.BertForMaskedLM(transformers.BertConfig(**_TEXT, **settings))


def vit():
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


MODELS = {"llama": llama, "qwen3": qwen3, "mistral": mistral, "gpt2": gpt2, "bert": bert, "vit": vit}
GENERATORS = ("llama", "qwen3", "mistral", "gpt2")


def learned(name, dtype=torch.float32):
    """A model whose parameters, norms and biases too, are anything."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().to(dtype)


def inputs(name, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=dtype) if name == "vit" else torch.randint(1, TOKENS, (2, 5))


def _pre_norm(attention, norms, **at):
    """h + F(norm(h)): pairs of a branch and what comes after the sum."""
    return [
        (lambda b, h, args, kwargs: getattr(b, attention)(getattr(b, norms[0])(h), *args, **kwargs)[0], None),
        (lambda b, h, args, kwargs: b.mlp(getattr(b, norms[1])(h)), None),
    ]


_LLAMA = _pre_norm("self_attn", ("input_layernorm", "post_attention_layernorm"))
# By name: the blocks, and the two branches of one as functions of block, h and what else the block is given; then the
# norm after the sum.
FORMULAS = {
    "llama": (lambda m: m.model.layers, _LLAMA),
    "qwen3": (lambda m: m.model.layers, _LLAMA),
    "mistral": (lambda m: m.model.layers, _LLAMA),
    "gpt2": (
        lambda m: m.transformer.h,
        [
            (lambda b, h, args, kwargs: b.attn(b.ln_1(h), attention_mask=args[1])[0], None),
            (lambda b, h, args, kwargs: b.mlp(b.ln_2(h)), None),
        ],
    ),
    "bert": (
        lambda m: m.bert.encoder.layer,
        [
            (
                lambda b, h, args, kwargs: b.attention.output.dense(b.attention.self(h, attention_mask=args[0])[0]),
                lambda b: b.attention.output.LayerNorm,
            ),
            (lambda b, h, args, kwargs: b.output.dense(b.intermediate(h)), lambda b: b.output.LayerNorm),
        ],
    ),
    "vit": (lambda m: m.vit.layers, _pre_norm("attention", ("layernorm_before", "layernorm_after"))),
}
