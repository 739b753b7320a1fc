"""What all file formats share: specs, readers, pieces, checksums, and files that appear whole or not at all."""

import json
import math
import os
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bridge.arrays import assign, numpy_dtype


class Spec(NamedTuple):
    """What an array is before it is read: name of the dtype (see `bridge.arrays`) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Piece(NamedTuple):
    """Part of an array on its way into a file: values for the C-ordered elements from `start` on."""

    name: str
    start: int
    values: np.ndarray


class Reader(ABC):
    """Named arrays in a file, each read when it is asked for.

    Attributes:
        specs: what is there.
    """

    specs: dict[str, Spec]

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The array, or ValueError if its bytes are not those that were written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path` that takes its place when, and only if, all went well."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def gather(specs: Mapping[str, Spec], pieces: Iterable[Piece]) -> dict[str, np.ndarray]:
    """The arrays that the pieces make up."""
    arrays = {name: np.empty(spec.shape, numpy_dtype(spec.dtype)) for name, spec in specs.items()}
    for piece in pieces:
        flat = arrays[piece.name].reshape(-1)
        assign(flat[piece.start : piece.start + piece.values.size].reshape(piece.values.shape), piece.values)
    return arrays


def parse_json(text: bytes) -> Any:
    """As json.loads, but a name that appears twice is a ValueError, and the second value does not win."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a name appears twice")
        return result

    return json.loads(text, object_pairs_hook=unique)


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def checksum(name: str, spec: Spec, values: Iterable[memoryview | bytes]) -> str:
    """CRC-32 of the name, the dtype, the shape and the values in C order, as eight hexadecimal digits."""
    crc = zlib.crc32(f"{name} {spec}".encode())
    for block in values:
        crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def check(path: Path, name: str, spec: Spec, values: Iterable[memoryview], expected: str | None) -> None:
    """Goes through all blocks of the values; ValueError if a checksum was kept and they have another."""
    if expected is None:
        deque(values, maxlen=0)
    elif checksum(name, spec, values) != expected:
        raise ValueError(f"path: {name} in {path} is damaged, its checksum does not match")


def flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted names."""
    if not isinstance(tree, (Mapping, list, tuple)):
        return {name: tree}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    return {path: x for key, node in items for path, x in flatten(node, f"{name}.{key}" if name else str(key)).items()}
