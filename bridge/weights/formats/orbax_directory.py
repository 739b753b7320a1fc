"""Orbax checkpoints: a directory with a nested dict of arrays, and our checksums in a file beside them."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from bridge.weights.arrays import dtype_name, numpy_dtype, to_numpy
from bridge.weights.formats.base import Piece, Reader, Spec, as_bytes, check, checksum, flatten, gather, parse_json
from bridge.weights.formats.replacing import scratch, sync, target_of

_EXTRA = "bridge.json"  # in the directory: what Orbax cannot keep, empty arrays and checksums


class OrbaxReader(Reader):
    """A checkpoint directory, written by Orbax alone, by `mhc_jax.training.checkpoint` or by `write_orbax`."""

    def __init__(self, path: Path) -> None:
        extra = path / _EXTRA
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                stored = checkpointer.metadata(path.absolute()).item_metadata.tree
                # As numpy arrays: without x64, jax arrays would lose half of a float64.
                asked = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
                tree = checkpointer.restore(path.absolute(), restore_args=asked)
            self._arrays = {name: to_numpy(x) for name, x in flatten(tree).items()}
            kept = parse_json(extra.read_bytes()) if extra.exists() else {"empty": {}, "crc32": {}}
            for name, (dtype, shape) in kept["empty"].items():
                self._arrays[name] = np.empty(0, numpy_dtype(dtype)).reshape(shape)
            checksums = dict(kept["crc32"])
            if checksums and checksums.keys() != self._arrays.keys():
                raise ValueError(f"it lost or gained {sorted(checksums.keys() ^ self._arrays.keys())}")
        except Exception as error:  # Orbax and tensorstore raise whatever the damage leads to
            raise ValueError(f"path: {path} is not an Orbax checkpoint, or it is damaged: {error}") from None
        self.specs = {name: Spec(dtype_name(x.dtype), x.shape) for name, x in self._arrays.items()}
        for name, array in self._arrays.items():
            check(path, name, self.specs[name], [as_bytes(array)], checksums.get(name))

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def write_orbax(path: Path, specs: Mapping[str, Spec], pieces: Iterable[Piece]) -> None:
    """Writes a new directory that `mhc_jax.training.checkpoint.restore` and Orbax alone can read, too.

    Raises:
        FileExistsError: it exists.
        ValueError: one name is the beginning of another, so that they make no tree; or all arrays are empty.
    """
    path = target_of(path)
    if path.exists():
        raise FileExistsError(f"path: {path} exists, and a checkpoint is never written over; choose a new name")
    arrays = gather(specs, pieces)
    extra = {
        "empty": {name: specs[name] for name, array in arrays.items() if array.size == 0},
        "crc32": {name: checksum(name, specs[name], [as_bytes(array)]) for name, array in arrays.items()},
    }
    for name in arrays:
        if any(name.startswith(f"{other}.") for other in arrays):
            raise ValueError(f"{name}: another array has the name of its parent, which Orbax cannot store")
    if not any(array.size for array in arrays.values()):
        raise ValueError(f"path: Orbax cannot store {path.name}, which has no value in any array; take .safetensors")
    with scratch(path) as directory:
        new = directory / "new"
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(new, traverse_util.unflatten_dict({n: x for n, x in arrays.items() if x.size}, sep="."))
        (new / _EXTRA).write_text(json.dumps(extra))
        sync(new / _EXTRA)
        sync(new)
        try:
            os.rename(new, path)
        except OSError as error:
            if not path.exists():
                raise
            raise FileExistsError(f"path: {path} was written by somebody else meanwhile; choose a new name") from error
        sync(path.parent)
