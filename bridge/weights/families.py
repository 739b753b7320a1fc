"""What NNX models of well-known families usually call the parts that transformers calls otherwise: a table each."""

from collections.abc import Mapping

from flax import nnx
from torch import nn

from bridge.weights import rules
from bridge.weights.suggest import Suggestion, suggest

# The end of a name in transformers -> what it is called in NNX models.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_QUERY, _KEY, _VALUE = ("query", "q", "q_proj", "wq"), ("key", "k", "k_proj", "wk"), ("value", "v", "v_proj", "wv")
_OUT = ("out", "o", "o_proj", "out_proj", "wo", "output", "proj")
_FIRST = ("norm1", "ln1", "ln_1", "layer_norm1", "attention_norm", "attn_norm", "pre_attention_norm", "norm_before")
_SECOND = ("norm2", "ln2", "ln_2", "layer_norm2", "mlp_norm", "ffn_norm", "pre_mlp_norm", "pre_ffw_norm", "norm_after")
_LAST = ("norm", "final_norm", "ln_f", "layer_norm", "encoder_norm", "final_layer_norm")
_TOKENS = ("embed", "embedder", "token_embedding", "word_embeddings", "tok_embeddings", "wte", "embed_tokens", "shared")
_LAYERS = ("layers", "blocks", "block", "layer", "encoder_layers")
_HEAD = ("head", "lm_head", "output", "unembed", "classifier", "fc")
_UP, _DOWN = (
    ("fc1", "linear1", "up", "wi", "dense1", "mlp_in", "intermediate"),
    ("fc2", "linear2", "down", "wo", "dense2"),
)

LLAMA = {
    "embed_tokens": _TOKENS,
    "layers": _LAYERS,
    "norm": _LAST,
    "lm_head": _HEAD,
    "input_layernorm": _FIRST,
    "post_attention_layernorm": _SECOND,
    "self_attn": _ATTENTION,
    **{"q_proj": _QUERY, "k_proj": _KEY, "v_proj": _VALUE, "o_proj": _OUT},
    **{"gate_proj": ("gate", "w1", "gate_proj"), "up_proj": ("up", "w3", "up_proj"), "down_proj": ("down", "w2")},
}
BERT = {
    "word_embeddings": _TOKENS,
    "position_embeddings": ("position_embedding", "pos_embed", "position_embeddings", "wpe"),
    "token_type_embeddings": ("type_embedding", "segment_embedding", "token_type_embeddings"),
    "embeddings.LayerNorm": ("embed_norm", "embedding_norm", "norm", "layer_norm"),
    "encoder.layer": _LAYERS,
    "attention.output.LayerNorm": _FIRST,
    "output.LayerNorm": _SECOND,
    "attention": _ATTENTION,
    **{"self.query": _QUERY, "self.key": _KEY, "self.value": _VALUE, "attention.output.dense": _OUT},
    **{"intermediate.dense": _UP, "output.dense": _DOWN, "pooler.dense": ("pooler",)},
}
VIT = {
    "cls_token": ("cls_token", "cls", "class_token"),
    "position_embeddings": ("pos_embed", "position_embeddings", "pos_embedding", "position_embedding"),
    "patch_embeddings.projection": ("patch_embed", "patch_embedding", "patch_embeddings", "embedding", "conv"),
    "layers": _LAYERS,
    "layernorm_before": _FIRST,
    "layernorm_after": _SECOND,
    "layernorm": _LAST,
    "attention": _ATTENTION,
    **{"q_proj": _QUERY, "k_proj": _KEY, "v_proj": _VALUE, "o_proj": _OUT},
    **{"fc1": _UP, "fc2": _DOWN, "pooler.dense": ("pooler",), "classifier": _HEAD},
}
RESNET = {
    "embedder.embedder.convolution": ("conv1", "stem", "conv_init", "stem_conv"),
    "embedder.embedder.normalization": ("bn1", "norm1", "bn_init", "stem_norm"),
    "encoder.stages": ("stages", "layers"),
    **{f"layer.{i}.convolution": (f"conv{i + 1}", f"conv_{i + 1}") for i in range(3)},
    **{f"layer.{i}.normalization": (f"bn{i + 1}", f"norm{i + 1}", f"norm_{i + 1}") for i in range(3)},
    "shortcut.convolution": ("conv_proj", "downsample_conv", "shortcut", "shortcut_conv", "proj"),
    "shortcut.normalization": ("norm_proj", "downsample_norm", "shortcut_norm", "bn_proj"),
    "classifier.1": _HEAD,
}
T5 = {
    "shared": _TOKENS,
    "block": _LAYERS,
    "layer.0.layer_norm": _FIRST,
    "layer.0.SelfAttention": _ATTENTION,
    "layer.1.layer_norm": (*_SECOND, "cross_norm", "cross_attention_norm"),
    "layer.1.EncDecAttention": ("cross_attention", "cross_attn", "encdec_attention"),
    "layer.2.layer_norm": ("norm3", "ln3", "mlp_norm", "ffn_norm"),
    "layer.1.DenseReluDense": ("mlp", "ffn", "feed_forward"),
    "layer.2.DenseReluDense": ("mlp", "ffn", "feed_forward"),
    **{"q": _QUERY, "k": _KEY, "v": _VALUE, "o": _OUT, "wi": ("wi", "up", "fc1"), "wo": ("wo", "down", "fc2")},
    **{"wi_0": ("gate", "wi_0"), "wi_1": ("up", "wi_1")},
    "relative_attention_bias": ("relative_attention_bias", "rel_bias", "relative_bias", "rel_embedding"),
    "final_layer_norm": _LAST,
    "lm_head": _HEAD,
}


class Family:
    """A table of names: for the end of a name in transformers, the names that NNX models usually have.

    Example:
        >>> import bridge
        >>> bridge.families["llama"].names["q_proj"]
        ('query', 'q', 'q_proj', 'wq')
    """

    def __init__(self, names: Mapping[str, tuple[str, ...]]) -> None:
        self.names = names

    def register(self, jax_model: nnx.Module, torch_model: nn.Module) -> Suggestion:
        """Declares the rules for the types of these two models and of all below, as `bridge.register` does.

        Args:
            jax_model: an NNX model, whose names the table has.
            torch_model: the model of transformers.

        Returns:
            What was declared; print it.

        Raises:
            ValueError: something has no counterpart, or only its place in the order would tell which; nothing is
                declared then.
        """
        found = suggest(jax_model, torch_model, names=self.names)
        open_ = [f"{p.jax_type.__name__}: {entry}: {doubt}" for p, entry, doubt in found.entries() if doubt]
        if problems := [*found.problems, *open_]:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise ValueError(f"the names of {type(jax_model).__name__} do not tell all; see bridge.suggest:\n{lines}")
        for proposal in found.proposals:
            rules.declare(proposal.jax_type, proposal.torch_type, proposal.rule())
        return found


class Families(dict[str, Family]):
    """The families whose usual names are known: "llama" (also Qwen3, Mistral), "bert", "vit", "resnet", "t5".

    Example:
        >>> import bridge
        >>> sorted(bridge.families)
        ['bert', 'llama', 'resnet', 't5', 'vit']
    """

    def __missing__(self, name: str) -> Family:
        raise KeyError(
            f"{name!r} is none of the families {sorted(self)}: bridge.suggest(jax_model, torch_model) proposes rules "
            "for any two models"
        )


families = Families(llama=Family(LLAMA), bert=Family(BERT), vit=Family(VIT), resnet=Family(RESNET), t5=Family(T5))
