"""Named arrays in files: safetensors (one file or shards), torch .pt, Orbax.

No format notices a flipped bit in the values by itself, so whatever is written here carries a CRC-32 per array, which
is checked when it is read: safetensors in the metadata, Orbax in a file beside, .pt in the zip archive that it is.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bridge.weights.formats.base import Piece, Reader, Spec
from bridge.weights.formats.folders import checkpoint_in
from bridge.weights.formats.orbax_directory import OrbaxReader, write_orbax
from bridge.weights.formats.replacing import target_of
from bridge.weights.formats.safetensors import SafetensorsReader, write_safetensors
from bridge.weights.formats.shards import ShardsReader
from bridge.weights.formats.torch_file import TorchReader, write_torch

__all__ = ["Piece", "Reader", "Spec", "open_file", "write"]

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FORMATS = "the formats are .safetensors, .pt (.pth, .bin, .ckpt) and Orbax directories (no suffix, or .orbax)"


def open_file(path: str | os.PathLike[str]) -> Reader:
    """Opens `x.safetensors`, `x.safetensors.index.json` (shards), `x.pt` (.pth, .bin, .ckpt) or an Orbax directory.

    Of a folder of Orbax's CheckpointManager it opens the last step, of one of a transformers model the weights.

    Raises:
        FileNotFoundError: there is nothing at `path`, or no file where the index says that a shard is.
        ValueError: the format is unknown, or the file is not what its name says, is cut short or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: no file or directory {path}")
    if path.is_dir():
        path = checkpoint_in(path)
    if path.is_dir():
        return OrbaxReader(path)
    if path.name.endswith(".index.json"):
        return ShardsReader(path, _open_one)
    return _open_one(path)


def _open_one(path: Path) -> Reader:
    """A single file, which a shard must be."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: {path} is not a file")
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if path.suffix in _TORCH_SUFFIXES:
        return TorchReader(path)
    raise ValueError(f"path: {path.name} is in no known format; {_FORMATS}")


def write(path: str | os.PathLike[str], specs: Mapping[str, Spec], pieces: Iterable[Piece]) -> None:
    """Writes arrays to `path`, in the format of its name. The old file stays whole until the new one is on the disk.

    Safetensors are written piece by piece; the other formats gather the arrays in memory first.

    Raises:
        FileExistsError: an Orbax directory exists already: those are never written over.
        FileNotFoundError: the directory that `path` is in does not exist.
        ValueError: the format is unknown, or cannot hold one of the arrays.
    """
    path = Path(path)
    target = target_of(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: there is no directory {target.parent} to write {target.name} to")
    if path.suffix == ".safetensors":
        write_safetensors(path, specs, pieces)
    elif path.suffix in _TORCH_SUFFIXES:
        write_torch(path, specs, pieces)
    elif path.suffix in ("", ".orbax"):
        write_orbax(path, specs, pieces)
    else:
        raise ValueError(f"path: {path.name} is in no format that can be written; {_FORMATS}")
