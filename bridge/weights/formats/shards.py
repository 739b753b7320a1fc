"""Checkpoints in several files, with an index that names the file of each array."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path, PureWindowsPath

import numpy as np

from bridge.weights.formats.base import Reader, parse_json


class ShardsReader(Reader):
    """`model.safetensors.index.json` (or `.bin.index.json`) and the files that it names, all open at once."""

    def __init__(self, path: Path, open_shard: Callable[[Path], Reader]) -> None:
        try:
            names: dict[str, list[str]] = {}
            for tensor, name in parse_json(path.read_bytes())["weight_map"].items():
                names.setdefault(name, []).append(tensor)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"path: {path} is not an index of shards: {error!r}") from None
        for name in names:
            if not _is_file_name(name):
                raise ValueError(f"path: {path} names {name!r}, which is not a file beside it")
        self.specs = {}
        self._readers: dict[str, Reader] = {}
        with ExitStack() as opened:
            for name, tensors in sorted(names.items()):
                reader = opened.enter_context(open_shard(path.with_name(name)))
                if wrong := set(tensors) ^ reader.specs.keys():
                    raise ValueError(f"path: {path} and {path.with_name(name)} disagree about {sorted(wrong)}")
                self.specs |= reader.specs
                self._readers |= dict.fromkeys(tensors, reader)
            self._opened = opened.pop_all()

    def read(self, name: str) -> np.ndarray:
        return self._readers[name].read(name)

    def close(self) -> None:
        self._opened.close()


def _is_file_name(name: object) -> bool:
    """Whether it names something in the same folder, on every system: "..", "a/b", "a\\b" and "C:a" do not."""
    return isinstance(name, str) and PureWindowsPath(name).name == name not in ("", "..") and "\0" not in name
