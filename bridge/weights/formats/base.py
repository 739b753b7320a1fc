"""What all file formats share: specs, readers, pieces, checksums."""

import json
import math
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np

from bridge.weights.arrays import assign, numpy_dtype

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation of safetensors


class Spec(NamedTuple):
    """What an array is before it is read: name of the dtype (see `bridge.weights.arrays`) and shape."""

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
    """Named arrays in a file that stays open, so that all come from one version of it, whoever replaces it meanwhile.

    Attributes:
        specs: what is there.
        versions: of the modules whose state it is, by path, where the file has them.
    """

    specs: dict[str, Spec]
    versions: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The array, or ValueError if its bytes are not those that were written.

        One that may not be written to is a view of the file itself, and good only while that is left as it is.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Lets go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def gather(specs: Mapping[str, Spec], pieces: Iterable[Piece]) -> dict[str, np.ndarray]:
    """The arrays that the pieces make up."""
    arrays = {name: np.empty(spec.shape, numpy_dtype(spec.dtype)) for name, spec in specs.items()}
    for piece in pieces:
        flat = arrays[piece.name].reshape(-1)
        assign(flat[piece.start : piece.start + piece.values.size].reshape(piece.values.shape), piece.values)
    return arrays


def parse_json(text: bytes | str) -> Any:
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


class Checksum:
    """CRC-32 of the name, the dtype, the shape and the values in C order; its text is eight hexadecimal digits."""

    def __init__(self, name: str, spec: Spec) -> None:
        self._crc = zlib.crc32(f"{name} {spec}".encode())

    def add(self, block: memoryview | bytes) -> None:
        """Goes on with the values that follow."""
        self._crc = zlib.crc32(block, self._crc)

    def __str__(self) -> str:
        return f"{self._crc:08x}"


def checksum(name: str, spec: Spec, values: Iterable[memoryview | bytes]) -> str:
    """The text of the `Checksum` of all these values."""
    found = Checksum(name, spec)
    for block in values:
        found.add(block)
    return str(found)


def check(path: Path, name: str, spec: Spec, values: Iterable[memoryview], expected: str | None) -> None:
    """Goes through all blocks of the values; ValueError if a checksum was kept and they have another."""
    if expected is None:
        deque(values, maxlen=0)
    elif checksum(name, spec, values) != expected:
        raise ValueError(f"path: {name} in {path} is damaged, its checksum does not match")


def flatten(tree: Any) -> dict[str, Any]:
    """Nested mappings and lists as one mapping with dotted names.

    Raises:
        ValueError: a key is no name, two leaves would have the same name, or the names have no end: lists that hold
            themselves, or one another so often that a small file names millions of arrays.
    """
    leaves: dict[str, Any] = {}
    keys_of: dict[str, tuple] = {}
    room = MAX_HEADER
    left: list[tuple[str, tuple, Any]] = [("", (), tree)]
    while left:
        name, keys, node = left.pop()
        room -= len(name) + 100  # about what a header of safetensors would need for it
        if room < 0:
            raise ValueError(f"lists or mappings that hold themselves or one another have no end of names: {name[:60]}")
        if isinstance(node, (Mapping, list, tuple)):
            items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
            for key, x in reversed(items):
                if not isinstance(key, (str, int)):
                    raise ValueError(f"{name or 'the mapping'} has a key of type {type(key).__name__}, not a name")
                left.append((f"{name}.{key}" if keys else str(key), (*keys, key), x))
        elif name in leaves:
            both = f"{_subscripts(keys_of[name])} and {_subscripts(keys)}"
            raise ValueError(f"{both} are two arrays with one name, {name!r}")
        else:
            leaves[name], keys_of[name] = node, keys
    return leaves


def _subscripts(keys: tuple) -> str:
    return "".join(f"[{key!r}]" for key in keys)
