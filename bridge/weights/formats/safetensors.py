"""Safetensors: the length of the header, a JSON header, the values; here with a checksum per tensor in the metadata."""

import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from bridge.weights.arrays import assign, numpy_dtype
from bridge.weights.formats.base import MAX_HEADER, Checksum, Piece, Reader, Spec, as_bytes, check, checksum, parse_json
from bridge.weights.formats.replacing import replacing

_CHUNK = 1 << 24  # bytes; bounds what the writer holds beside the array that it was given
_MAX_DIMS = 64  # of numpy
_CACHED = 1 << 19  # bytes that are read at once, so that they are still in the cache when they are looked at
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_SAFETENSORS_NAMES = {name: code for code, name in _SAFETENSORS.items()}
_METADATA = "__metadata__"  # the one name that is no tensor's
_CHECKSUMS = "mhc.crc32"  # key in the metadata, of a JSON object: name of the tensor -> checksum


class SafetensorsReader(Reader):
    """One .safetensors file. Only the header is read in advance."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self._open(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self.close()
            raise

    def _open(self, size: int) -> None:
        start = self._file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"path: {self.path} is not a safetensors file, or it is cut short")
        header = self._file.read(length)
        try:
            entries = parse_json(header)
            metadata = entries.pop(_METADATA, None) or {}
            self._checksums = parse_json(metadata.get(_CHECKSUMS, "{}"))
            self.specs, self._offsets = self._parse(entries, size - 8 - length)
            if self._checksums and self._checksums.keys() != self.specs.keys():
                raise ValueError(f"it lost or gained {sorted(self._checksums.keys() ^ self.specs.keys())}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"path: {self.path} has a damaged header: {error}") from None
        self._data = 8 + length

    @staticmethod
    def _parse(entries: dict[str, Any], size: int) -> tuple[dict[str, Spec], dict[str, int]]:
        specs, offsets, end = {}, {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            spec = Spec(_SAFETENSORS[entry["dtype"]], tuple(entry["shape"]))
            start, stop = entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*spec.shape, start, stop)):  # true is no number
                raise ValueError(f"tensor {name!r} has shape {spec.shape} in bytes {start} to {stop}")
            if start != end or stop - start != spec.nbytes or not _is_possible(spec):
                raise ValueError(f"tensor {name!r} is said to be {spec} in bytes {start} to {stop}")
            specs[name], offsets[name], end = spec, start, stop
        if end != size:
            raise ValueError(f"it announces {end} bytes of values, and the file has {size}")
        return specs, offsets

    def read(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        array = np.empty(spec.shape, numpy_dtype(spec.dtype))
        self._file.seek(self._data + self._offsets[name])
        values = as_bytes(array)
        parts = (values[start : start + _CACHED] for start in range(0, len(values), _CACHED))
        check(self.path, name, spec, _filled(self._file, parts), self._checksums.get(name))
        return array

    def close(self) -> None:
        self._file.close()


def write_safetensors(path: Path, specs: Mapping[str, Spec], pieces: Iterable[Piece]) -> None:
    """Writes the pieces as they come, in any order; ValueError if the format has no such dtype."""
    for name, spec in specs.items():
        if spec.dtype not in _SAFETENSORS_NAMES:
            raise ValueError(f"{name}: safetensors has no {spec.dtype}")
        if name == _METADATA:
            raise ValueError(f"{name}: safetensors has another use for this name")
    # Widest first keeps every tensor aligned to its own element size.
    order = sorted(specs, key=lambda name: (-numpy_dtype(specs[name].dtype).itemsize, name))
    ends = np.cumsum([specs[name].nbytes for name in order]).tolist()
    offsets = {name: end - specs[name].nbytes for name, end in zip(order, ends, strict=True)}

    def header(checksums: dict[str, str]) -> bytes:
        # transformers asks for the key "format" and for one of the values that it knows.
        entries: dict[str, Any] = {_METADATA: {"format": "pt", _CHECKSUMS: json.dumps(checksums)}}
        for name in order:
            dtype, shape = specs[name]
            span = [offsets[name], offsets[name] + specs[name].nbytes]
            entries[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": span}
        text = json.dumps(entries).encode()
        return text + b" " * (-len(text) % 8)

    # The checksums are known last but stand first: the header is written twice, the same length both times.
    draft = header(dict.fromkeys(order, "0" * 8))
    data = 8 + len(draft)
    checksums: dict[str, str] = {}
    # A checksum takes as long as writing does: of a tensor that comes whole, another thread makes it meanwhile.
    with replacing(path) as new, new.open("w+b") as file, ThreadPoolExecutor(1) as beside:
        _reserve(file, data + (ends[-1] if ends else 0))
        for name, start, values in pieces:
            file.seek(data + offsets[name] + start * values.itemsize)
            found = Checksum(name, specs[name]) if values.nbytes == specs[name].nbytes else None
            for block in _blocks(values):
                summed = beside.submit(found.add, as_bytes(block)) if found else None
                file.write(as_bytes(block))
                if summed:
                    summed.result()
            if found:
                checksums[name] = str(found)
            del values, block, summed  # or they would be held while the next array is read
        buffer = memoryview(bytearray(_CACHED))
        for name in [name for name in order if name not in checksums]:
            file.seek(data + offsets[name])
            parts = (buffer[: specs[name].nbytes - start] for start in range(0, specs[name].nbytes, _CACHED))
            checksums[name] = checksum(name, specs[name], _filled(file, parts))
        file.seek(0)
        file.write(struct.pack("<Q", len(draft)) + header({name: checksums[name] for name in order}))


def _is_possible(spec: Spec) -> bool:
    """Whether numpy can have such an array: an empty one can claim to be large in its other axes."""
    return len(spec.shape) <= _MAX_DIMS and math.prod(n or 1 for n in spec.shape) * 16 < sys.maxsize


def _reserve(file: BufferedRandom, size: int) -> None:
    """Makes the file as large as it will be: with its place on the disk, where the system can give it in advance.

    A full disk then shows before the work is done, and writing is faster by a quarter.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _filled(file: BufferedRandom | FileIO, parts: Iterable[memoryview]) -> Iterator[memoryview]:
    """Each part, with the next bytes of the file read into it."""
    for part in parts:
        if file.readinto(part) != len(part):
            raise ValueError(f"{file.name} was cut short while it was read")
        yield part


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """The values in C order, in blocks of rows: a transposed view is copied block by block, never as a whole."""
    if values.flags.c_contiguous:
        yield values
        return
    rows = max(1, _CHUNK * len(values) // values.nbytes)
    buffer = np.empty((rows, *values.shape[1:]), values.dtype)
    for i in range(0, len(values), rows):
        source = values[i : i + rows]
        block = buffer[: len(source)]
        assign(block, source)
        yield block
