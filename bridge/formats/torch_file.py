"""Files of torch.save: a zip archive, with checksums, that holds a pickle of tensors."""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from bridge.arrays import dtype_name, to_numpy, to_torch
from bridge.formats.base import Piece, Reader, Spec, flatten, gather, replacing


class TorchReader(Reader):
    """A saved state dict, or the entry "state_dict" of a Lightning checkpoint. Nothing but tensors is loaded."""

    def __init__(self, path: Path) -> None:
        try:
            zipped = zipfile.is_zipfile(path)
            if zipped:
                with zipfile.ZipFile(path) as archive:
                    if (damaged := archive.testzip()) is not None:
                        raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            # Torch goes on to recommend weights_only=False, which runs whatever the file says.
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0].partition(". ")[0]
            raise ValueError(
                f"path: {path} is damaged or holds more than tensors: {reason}; "
                "save the state dict alone, torch.save(model.state_dict(), path)"
            ) from None
        except Exception as error:  # zipfile, pickle and torch raise whatever the damage leads to
            raise ValueError(
                f"path: {path} is not a torch file, or it is damaged: {type(error).__name__} {error}"
            ) from None
        if not isinstance(content, Mapping):
            raise ValueError(f"path: {path} holds a {type(content).__name__}, not a state dict")
        if isinstance(content.get("state_dict"), Mapping):
            content = content["state_dict"]
        self._tensors = flatten(content)
        others = {name: type(x).__name__ for name, x in self._tensors.items() if not isinstance(x, torch.Tensor)}
        if others:
            raise ValueError(f"path: {path} holds more than a state dict: {others}; save the state dict alone")
        self.specs = {name: Spec(dtype_name(x.dtype), tuple(x.shape)) for name, x in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return to_numpy(self._tensors[name])


def write_torch(path: Path, specs: Mapping[str, Spec], pieces: Iterable[Piece]) -> None:
    """Writes a state dict that `torch.load(path, weights_only=True)` reads."""
    tensors = {name: to_torch(array) for name, array in gather(specs, pieces).items()}
    with replacing(path) as new:
        torch.save(tensors, new)
