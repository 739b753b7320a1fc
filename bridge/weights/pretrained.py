"""Public checkpoints of Llama and Qwen3 into the decoders of both packages."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

import mhc_jax.models as jax_models
import mhc_torch.models as torch_models
from bridge.weights.arrays import dtype_name, to_jax, to_torch
from bridge.weights.convert import jax_values
from bridge.weights.formats import Reader, open_file
from bridge.weights.leaves import aliases, torch_leaves, value
from bridge.weights.match import match
from mhc_jax.streams import StreamConfig as JaxStreamConfig
from mhc_torch.history.config import MHCConfig
from mhc_torch.streams import StreamConfig

Decoder = TypeVar("Decoder", bound=jax_models.Decoder | torch_models.Decoder)

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_EXACT = [("bfloat16", "float32"), ("float16", "float32")]  # what holds every value of what


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `config.json` of a checkpoint says, for `DecoderConfig.from_transformers`.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it holds no object of JSON.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import bridge
        >>> folder = tempfile.mkdtemp()
        >>> _ = Path(folder, "config.json").write_text('{"model_type": "llama", "hidden_size": 16}')
        >>> bridge.read_config(folder)
        {'model_type': 'llama', 'hidden_size': 16}
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, got {type(config).__name__}")
    return config


def load_pretrained(folder: str | os.PathLike[str], decoder: Decoder) -> Decoder:
    """Fills a decoder with the weights of a Llama or Qwen3 as transformers saves them, in place.

    A decoder of history or streams keeps its mixing logits and maps as they are: fresh maps compute what the residual
    model does, fresh logits almost that. Values are equal bit for bit; bfloat16 may go into float32, which holds it.

    Args:
        folder: has `config.json` and `model.safetensors`, or its index and shards.
        decoder: of either package, with `DecoderConfig.from_transformers(read_config(folder))`.

    Returns:
        `decoder`.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: the decoder has other sizes than the checkpoint, or a dtype that cannot hold its values; a weight is
            missing or left over. Nothing is written then.

    Example:
        >>> import tempfile
        >>> import bridge
        >>> from flax import nnx
        >>> from mhc_jax.models import Decoder, DecoderConfig
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> folder = tempfile.mkdtemp()
        >>> LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).save_pretrained(folder)
        >>> config = DecoderConfig.from_transformers(bridge.read_config(folder))
        >>> model = bridge.load_pretrained(folder, Decoder(config, "streams", rngs=nnx.Rngs(0)))
        >>> model.embed_tokens.embedding.shape
        (20, 8)
    """
    folder = Path(folder)
    stored, asked = (asdict(c) for c in (type(decoder.config).from_transformers(read_config(folder)), decoder.config))
    if other := [f"{name} is {stored[name]}, not {size}" for name, size in asked.items() if stored[name] != size]:
        raise ValueError(f"{folder} does not fit decoder.config: {', '.join(other)}")
    with open_file(folder / (_INDEX if (folder / _INDEX).exists() else _WHOLE)) as reader:
        _fill(decoder, reader, folder)
    return decoder


def _fill(decoder: jax_models.Decoder | torch_models.Decoder, reader: Reader, folder: Path) -> None:
    if isinstance(decoder, nn.Module):
        leaves = torch_leaves(decoder)
        sources = _sources(reader, leaves, folder)
        with torch.no_grad():
            for name, source in sources.items():
                leaves[name].copy_(to_torch(reader.read(source)))
        return
    found = match(decoder, _twin(decoder))
    sources = _sources(reader, found.torch, folder)
    links = {link.torch.path: link for link in found.links if link.torch.path in sources}
    likes = {path: value(leaf) for path, leaf in found.jax.items()}

    def read(path: str) -> np.ndarray:
        return reader.read(sources[path]).astype(likes[links[path].jax.path].dtype)

    for path, values in jax_values(links.values(), read, likes):
        found.jax[path].set_value(to_jax(values, getattr(likes[path], "sharding", None)))


def _twin(decoder: jax_models.Decoder) -> torch_models.Decoder:
    """The torch form of a JAX decoder, without memory for its weights."""
    config = asdict(decoder.config)
    if scaling := config["rope_scaling"]:
        config["rope_scaling"] = torch_models.RopeScaling(**scaling)
    connection: Any = "residual"
    if isinstance(decoder.connection, JaxStreamConfig):
        connection = StreamConfig(**asdict(decoder.connection))
    elif decoder.connection.mode != "residual":
        connection = MHCConfig(**asdict(decoder.connection))
    with torch.device("meta"):
        twin = torch_models.Decoder(torch_models.DecoderConfig(**config), connection)
    dtype = to_torch(np.zeros(0, decoder.embed_tokens.embedding.dtype)).dtype
    for name, parameter in twin.named_parameters():
        if not _of_connection(name):
            parameter.data = parameter.data.to(dtype)
    return twin


def _sources(reader: Reader, leaves: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """name of each leaf that the checkpoint has -> its name there, which for a tied leaf may be that of its twin."""
    names, problems = {}, []
    for name, twins in aliases(leaves).items():
        present = [twin for twin in twins if twin in reader.specs]
        if not present:
            problems += [] if _of_connection(name) else [f"{name} is missing"]
            continue
        names[name] = name if name in present else present[0]
        stored, leaf = reader.specs[names[name]], leaves[name]
        if tuple(stored.shape) != tuple(leaf.shape):
            problems.append(f"{name} has shape {tuple(stored.shape)}, the decoder's has {tuple(leaf.shape)}")
        elif stored.dtype != dtype_name(leaf.dtype) and (stored.dtype, dtype_name(leaf.dtype)) not in _EXACT:
            problems.append(f"{name} is {stored.dtype}, which the decoder's {dtype_name(leaf.dtype)} cannot hold")
    # Angles that old Llamas stored, and that follow from the config.
    rest = [name for name in reader.specs if name not in leaves and not name.endswith("rotary_emb.inv_freq")]
    problems += [f"{name} is left over" for name in rest]
    if problems:
        raise ValueError(f"{folder} does not fit the decoder:\n" + "\n".join(f"  {problem}" for problem in problems))
    return names


def _of_connection(name: str) -> bool:
    return any(part in ("skip", "attn_hc", "ffn_hc") for part in name.split("."))
