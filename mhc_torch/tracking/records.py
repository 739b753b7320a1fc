"""Records that no backend has: those that wait, in memory or in a temporary file, and those to keep for good."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Record = tuple[str, dict[str, Any]]

MEMORY = 16 * 2**20  # bytes that may wait in memory
_LENGTH = struct.Struct("<Q")
_LINES = 1000  # as many are written at once


class Backlog:
    """The records that wait, first in, first out.

    What is more than ``MEMORY`` goes to a temporary file without a name, which is gone with the process. A record
    that a file cannot hold exactly, or that the disk has no room for, stays in memory all the same.

    Args:
        folder: of the temporary file.
        report: told once that the disk has no room.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self._folder, self._report = folder, report
        # A record with its size in memory, or [start, end] of records one after the other in the file. A signal may
        # end a call anywhere: what is on disk counts only once it stands here, by one assignment.
        self._entries: deque[tuple[Record, int] | list[int]] = deque()
        self._bytes = 0
        self._file: int | None = None
        self._reported = False

    def __bool__(self) -> bool:
        return bool(self._entries)

    def append(self, record: Record) -> None:
        size = _size(record[1])
        if self._bytes + size > MEMORY and self._spill(record):
            return
        self._entries.append((record, size))
        self._bytes += size

    def popleft(self) -> Record:
        """The oldest record.

        Raises:
            IndexError: there is none.
            OSError: the file cannot be read; what stood there is lost.
        """
        first = self._entries[0]
        if isinstance(first, tuple):
            self._entries.popleft()
            self._bytes -= first[1]
            return first[0]
        try:
            start = first[0] + _LENGTH.size
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, first[0]))
            method, arguments = json.loads(self._read(length, start))
        except OSError:
            self._entries.popleft()
            raise
        first[0] = start + length
        if first[0] == first[1]:
            self._entries.popleft()
            if self._file is not None and not any(isinstance(entry, list) for entry in self._entries):
                os.ftruncate(self._file, 0)
        if "picture" in arguments:
            arguments["picture"] = _from_png(arguments["picture"])
        return method, arguments

    def _spill(self, record: Record) -> bool:
        """Write a record to the file; False where that cannot be."""
        method, arguments = record
        try:
            if "picture" in arguments:
                arguments = arguments | {"picture": _to_png(arguments["picture"])}
            if not _is_plain(arguments):
                return False
            data = json.dumps([method, arguments]).encode()
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._file = os.dup(file.fileno())
            start = os.lseek(self._file, 0, os.SEEK_END)
            done, error = _append(self._file, _LENGTH.pack(len(data)) + data)
            if error is not None:
                os.ftruncate(self._file, start)
                raise error
        except OSError as error:
            if not self._reported:
                self._reported = True
                self._report(f"no more records fit into {self._folder} ({error}): they wait in memory")
            return False
        end = start + done
        last = self._entries[-1] if self._entries else None
        if isinstance(last, list) and last[1] == start:
            last[1] = end
        else:
            self._entries.append([start, end])
        return True

    def _read(self, count: int, start: int) -> bytes:
        assert self._file is not None
        data = b""
        while len(data) < count:
            if not (part := os.pread(self._file, count - len(data), start + len(data))):
                raise OSError(f"{count} bytes at {start} of the records that waited on disk are gone")
            data += part
        return data

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Kept:
    """The file of what a backend did not take: one JSON object a line, whole lines only.

    What the disk has no room for waits in memory for the next try.

    Args:
        path: of the file, which is made when there is something to keep.
        report: told once that the disk has no room.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path, self._report = path, report
        self.waiting: deque[bytes] = deque()
        self._reported = False

    def add(self, backend: str, records: Iterable[Record], reason: str) -> int:
        """Keep records, in order; returns their number."""
        number = 0
        for method, arguments in records:
            line = json.dumps({"backend": backend, "call": method, **arguments, "error": reason}, default=_readable)
            self.waiting.append(line.encode() + b"\n")
            number += 1
            if number % _LINES == 0:
                self.write()
        self.write()
        return number

    def write(self) -> None:
        """Write what waits, as far as there is room."""
        if not self.waiting:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while self.waiting:
                    self._write_some(file)
            finally:
                os.close(file)
        except OSError as error:
            if not self._reported:
                self._reported = True
                self._report(f"cannot write to {self.path} ({error}): records wait in memory")

    def _write_some(self, file: int) -> None:
        data = b"".join(islice(self.waiting, _LINES))
        done, error = _append(file, data)
        if error is not None:  # take back the part of a line
            whole = data.rfind(b"\n", 0, done) + 1
            os.ftruncate(file, os.lseek(file, 0, os.SEEK_END) - (done - whole))
            done = whole
        for _ in range(data.count(b"\n", 0, done)):
            self.waiting.popleft()
        if error is not None:
            raise error


def _append(file: int, data: bytes) -> tuple[int, OSError | None]:
    """How many bytes were written, and what stopped it."""
    done = 0
    try:
        while done < len(data):
            done += os.write(file, memoryview(data)[done:])
    except OSError as error:
        return done, error
    return done, None


def _size(value: Any) -> int:
    """About how much memory a value takes, in bytes."""
    if isinstance(value, Mapping):
        return sys.getsizeof(value) + sum(_size(key) + _size(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sys.getsizeof(value) + sum(map(_size, value))
    if hasattr(value, "getbands"):  # a picture
        return value.width * value.height * len(value.getbands())
    return int(getattr(value, "nbytes", 0)) + sys.getsizeof(value)


def _is_plain(value: Any) -> bool:
    """Whether JSON gives back just this."""
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _to_png(picture: Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, format="png")
    return base64.b64encode(stream.getvalue()).decode()


def _from_png(text: str) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(text)))


def _readable(value: Any) -> str:
    """What JSON does not know: a picture as PNG in base64, anything else as it prints."""
    return _to_png(value) if hasattr(value, "getbands") else str(value)
