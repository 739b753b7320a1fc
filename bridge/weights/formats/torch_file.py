"""Files of torch.save: a zip archive, with checksums, that holds a pickle of tensors."""

import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from bridge.weights.arrays import dtype_name, is_shared, to_numpy, to_torch
from bridge.weights.formats.base import Piece, Reader, Spec, flatten, gather
from bridge.weights.formats.replacing import replacing
from bridge.weights.names import ENTRIES

_ZIP = b"PK\x03\x04"  # what torch.load knows a zip archive by
_MAX_RATIO = 1032  # the most that deflate can make of a byte


class TorchReader(Reader):
    """A saved state dict, or the entry of a training program's checkpoint that is one. Nothing but tensors is loaded.

    The values stay in the file until they are read, unless it is compressed or older than torch 1.6.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            try:
                content = self._load(file)
            except pickle.UnpicklingError as error:
                # Torch goes on to recommend weights_only=False, which runs whatever the file says.
                reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
                reason = reason.partition("\n")[0].partition(". ")[0]
                raise ValueError(
                    f"path: {path} is damaged or holds more than tensors: {reason}; "
                    "save the state dict alone, torch.save(model.state_dict(), path)"
                ) from None
            except Exception as error:  # zipfile, pickle and torch raise whatever the damage leads to
                raise ValueError(
                    f"path: {path} is not a torch file, or it is damaged: {type(error).__name__} {error}"
                ) from None
            size = os.fstat(file.fileno()).st_size
        if not isinstance(content, Mapping):
            raise ValueError(f"path: {path} holds a {type(content).__name__}, not a state dict")
        content = _weights(content)
        saved = getattr(content, "_metadata", None)  # torch's own, beside every state dict
        if isinstance(saved, Mapping):
            self.versions = {path: about["version"] for path, about in saved.items() if "version" in about}
        try:
            self._tensors = flatten(content)
        except ValueError as error:
            raise ValueError(f"path: {path} is not a state dict: {error}") from None
        others = {name: type(x).__name__ for name, x in self._tensors.items() if not _is_plain(x)}
        if others:
            raise ValueError(f"path: {path} holds more than a state dict: {others}; save the state dict alone")
        self.specs = {name: Spec(dtype_name(x.dtype), tuple(x.shape)) for name, x in self._tensors.items()}
        for name, spec in self.specs.items():
            if spec.nbytes > size * _MAX_RATIO:  # one number, expanded to so many
                raise ValueError(f"path: {path} has {size} bytes, which cannot hold {name}, {spec}")

    def _load(self, file: BinaryIO) -> Any:
        zipped = file.read(len(_ZIP)) == _ZIP
        if zipped:
            with zipfile.ZipFile(file) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
                stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        # Torch maps files by name only. This is a name of the file that is open, whatever has its old name by now.
        name = f"/dev/fd/{file.fileno()}"
        self._mapped = zipped and stored and os.path.exists(name)
        file.seek(0)
        return torch.load(name if self._mapped else file, map_location="cpu", weights_only=True, mmap=self._mapped)

    def read(self, name: str) -> np.ndarray:
        array = to_numpy(self._tensors[name])
        if self._mapped:
            array.flags.writeable = False
        return array


def _weights(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The entry that is the model's, where others are no weights: an optimizer, a count of steps."""
    lightning, *others = ENTRIES
    if isinstance(content.get(lightning), Mapping):
        return content[lightning]
    try:
        if all(map(_is_plain, flatten(content).values())):
            return content
    except ValueError:  # which is said of the entry, if there is one
        pass
    return next((content[entry] for entry in others if isinstance(content.get(entry), Mapping)), content)


def _is_plain(x: Any) -> bool:
    """Whether it is a tensor of values that numpy can have: not sparse, quantized or on "meta"."""
    if not isinstance(x, torch.Tensor) or x.layout != torch.strided or x.device.type != "cpu":
        return False
    return is_shared(x.dtype)


def write_torch(path: Path, specs: Mapping[str, Spec], pieces: Iterable[Piece]) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` reads."""
    tensors = {name: to_torch(array) for name, array in gather(specs, pieces).items()}
    with replacing(path) as new:
        torch.save(tensors, new)
