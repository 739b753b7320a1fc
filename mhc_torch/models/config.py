"""The sizes of a decoder of the Llama and Qwen3 family."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch rotary positions to longer texts (`rope_type` "llama3" of transformers).

    Args:
        factor: by which slow frequencies are divided.
        low_frequency, high_frequency: turns in `length` positions below which a frequency is slow, and from which on it
            is fast, and left as it is; between them it is interpolated.
        length: longest text before the stretching.

    Raises:
        ValueError: one of them is out of its range.
    """

    factor: float = 8.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    length: int = 8192

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be finite and at least 1, got {self.factor}")
        if not 0 < self.low_frequency < self.high_frequency < math.inf:
            frequencies = f"{self.low_frequency} and {self.high_frequency}"
            raise ValueError(f"low_frequency must be above 0 and below high_frequency, got {frequencies}")
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder, as a hashable value.

    Args:
        vocabulary: number of tokens V.
        features: width C.
        mlp_features: width of the SwiGLU network inside a layer.
        depth: number of layers L.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, a divisor of num_heads; None is num_heads.
        head_dim: width of a head, even; None is features / num_heads.
        qk_norm: whether queries and keys get an RMSNorm a head, as in Qwen3.
        tied: whether the output layer is the embedding.
        rope_theta: base of the rotary frequencies.
        rope_scaling: of Llama 3.1 and later.
        norm_epsilon: added to the mean square in every RMSNorm.

    Raises:
        ValueError: a size is below 1, or one does not divide another as it must; a number is out of its range.
        TypeError: qk_norm or tied is no bool, rope_scaling no RopeScaling.

    Example:
        >>> DecoderConfig(256, features=64, mlp_features=192, depth=2, num_heads=4, num_kv_heads=2).head_width
        16
    """

    vocabulary: int
    features: int
    mlp_features: int
    depth: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    tied: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocabulary", "features", "mlp_features", "depth", "num_heads", "num_kv_heads", "head_dim"):
            size = getattr(self, name)
            if size is None and name in ("num_kv_heads", "head_dim"):
                continue
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        for name in ("qk_norm", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be of type bool, got {getattr(self, name)!r}")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise TypeError(f"rope_scaling must be a RopeScaling or None, got {self.rope_scaling!r}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be finite and above 0, got {self.rope_theta}")
        if not 0 <= self.norm_epsilon < math.inf:
            raise ValueError(f"norm_epsilon must be finite and not negative, got {self.norm_epsilon}")
        if self.head_dim is None and self.features % self.num_heads:
            raise ValueError(
                f"features must be a multiple of num_heads={self.num_heads}, or head_dim given; got {self.features}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads, got {self.kv_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_dim must be even, for rotary positions, got {self.head_width}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.features // self.num_heads if self.head_dim is None else self.head_dim

    @classmethod
    def from_transformers(cls, config: Any) -> "DecoderConfig":
        """The sizes of a Llama or Qwen3 of transformers.

        Args:
            config: a `LlamaConfig` or `Qwen3Config`, or what their `config.json` holds.

        Raises:
            ValueError: it is of another model, lacks something, or asks for what this decoder does not do.
        """
        given = dict(config) if isinstance(config, Mapping) else config.to_dict()
        if given.get("model_type") not in ("llama", "qwen3"):
            raise ValueError(f"config: model_type must be 'llama' or 'qwen3', got {given.get('model_type')!r}")
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
        for name, value in plain.items():
            if given.get(name, value) != value:
                raise ValueError(f"config: {name} must be {value!r}, got {given[name]!r}")
        # One dictionary since transformers 5; before, the base apart from the scaling, which plain models leave out.
        rope = given.get("rope_parameters") or {
            "rope_theta": given.get("rope_theta"),
            **(given.get("rope_scaling") or {}),
        }
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "llama3"):
            raise ValueError(f"config: rope_type must be 'default' or 'llama3', got {kind!r}")
        scaling = None
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = RopeScaling(*(_given(rope, name) for name in names))
        return cls(
            vocabulary=_given(given, "vocab_size"),
            features=_given(given, "hidden_size"),
            mlp_features=_given(given, "intermediate_size"),
            depth=_given(given, "num_hidden_layers"),
            num_heads=_given(given, "num_attention_heads"),
            num_kv_heads=given.get("num_key_value_heads"),
            head_dim=given.get("head_dim"),
            qk_norm=given["model_type"] == "qwen3",
            tied=given.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta") or 10_000.0,
            rope_scaling=scaling,
            norm_epsilon=_given(given, "rms_norm_eps"),
        )


def _given(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ValueError(f"config: {name} is missing")
    return config[name]
