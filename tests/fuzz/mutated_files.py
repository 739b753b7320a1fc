"""Damaged and hostile files of weights: only the documented errors, no code run, and never other values in silence."""

import io
import json
import os
import pickle
import shutil
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import bridge

SECONDS = 20  # far more than a small file takes on a busy machine, far less than one whose work doubles with each byte
CHECKSUMS = b"mhc.crc32"
DTYPES = ("float32", "float64", "int16", "uint8", "bool")


def trial(seed: int) -> None:
    """One file, damaged or made up, is loaded: it comes back as it was written, or ValueError says what is wrong."""
    random = np.random.default_rng(seed)
    make = MAKERS[int(random.integers(len(MAKERS)))] if random.random() < 0.97 else _orbax
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of pickles that are not its own
        path, expected = make(random, Path(folder))
        start = time.monotonic()
        loaded, error = None, None
        try:
            loaded = bridge.load(path)
        except Exception as raised:
            error = raised
        took = time.monotonic() - start
        # A shard that is missing is a file that is missing.
        documented = (ValueError, FileNotFoundError) if make is _index else ValueError
        if error is not None and not (isinstance(error, documented) and "path: " in str(error)):
            raise AssertionError(f"{make.__name__}: {type(error).__name__}: {error}") from error
        assert took < SECONDS, f"{make.__name__}: {took:.0f} s for {_size(path)} bytes"
        assert not (Path(folder) / "ran").exists(), f"{make.__name__}: code in the file was run"
        if loaded is not None and expected is not None:
            assert _same(loaded, expected), f"{make.__name__}: other values, and no error"


def _arrays(random: np.random.Generator) -> dict[str, np.ndarray]:
    found = {}
    for i in range(int(random.integers(1, 4))):
        shape = tuple(random.integers(0, 6, int(random.integers(0, 3))))
        found[f"layer{i}.w"] = np.asarray(random.integers(0, 2, shape)).astype(random.choice(DTYPES))
    return found


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    kind = lambda x: (x.dtype, x.shape, x.tobytes())  # noqa: E731
    return a.keys() == b.keys() and all(kind(a[name]) == kind(b[name]) for name in a)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(x.stat().st_size for x in path.rglob("*") if x.is_file())


def _damage(random: np.random.Generator, whole: bytes) -> bytes:
    """Flipped bits, bytes cut off, put in, doubled or overwritten."""
    content = bytearray(whole)
    for _ in range(int(random.integers(1, 4))):
        i = int(random.integers(len(content) + 1))
        j = min(len(content), i + int(random.integers(1, 40)))
        match int(random.integers(6)):
            case 0:
                content[i:j] = b""
            case 1:
                content[i:i] = random.bytes(j - i)
            case 2:
                content[i:j] = content[i:j] * 2
            case 3:
                content[i:j] = random.bytes(j - i)
            case 4:
                del content[i:]
            case _:
                for place in random.integers(0, len(content), 2) if content else ():
                    content[place] ^= 1 << int(random.integers(8))
    return bytes(content)


def _safetensors(random: np.random.Generator, folder: Path) -> tuple[Path, dict | None]:
    path, arrays = folder / "x.safetensors", _arrays(random)
    bridge.save(path, arrays)
    damaged = _damage(random, path.read_bytes())
    path.write_bytes(damaged)
    # Where the name of the entry is hit, the checksums cannot be found; one value alone has no second witness then.
    return path, arrays if CHECKSUMS in damaged else None


def _header(random: np.random.Generator, folder: Path) -> tuple[Path, None]:
    """A header that is JSON, of values that have no place there."""
    odd = [
        None,
        True,
        -1,
        2.5,
        10**30,
        "",
        "F32",
        "\ud800",
        [],
        [0, 8],
        [1, "a"],
        {},
        {"a": 1},
        "{}",
        "[1]",
        '{"a": 3}',
    ]
    pick = lambda: odd[int(random.integers(len(odd)))]  # noqa: E731
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    content: dict = {"a": entry}
    for _ in range(int(random.integers(1, 3))):
        match int(random.integers(6)):
            case 0:
                content["__metadata__"] = pick()
            case 1:
                content["__metadata__"] = {("crc32", "mhc.crc32", "format")[int(random.integers(3))]: pick()}
            case 2:
                content["a"] = pick()
            case 3:
                entry[list(entry)[int(random.integers(3))]] = pick()
            case 4:
                entry["shape"] = [pick(), *([0] * int(random.integers(100)))]
            case _:
                content = pick() if random.random() < 0.3 else {**content, "b": {**entry, "data_offsets": [8, pick()]}}
        if not isinstance(content, dict):
            break
    text = json.dumps(content).encode()
    if random.random() < 0.1:
        text = b"[" * 20_000
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    return folder / "x.safetensors", None


def _torch_file(random: np.random.Generator, folder: Path) -> tuple[Path, dict | None]:
    path, arrays = folder / "x.pt", _arrays(random)
    zipped = random.random() < 0.7
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    if random.random() < 0.3 and zipped:
        _rewrite(path, lambda name, content: content)
        if random.random() < 0.3:  # compressed and whole
            return path, arrays
    path.write_bytes(_damage(random, path.read_bytes()))
    return path, arrays if zipped else None  # the older format of torch has no checksums


def _rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """The same archive, compressed, with right checksums."""
    with zipfile.ZipFile(path) as old:
        entries = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in entries:
            new.writestr(name, change(name, content))


def _pickle_inside(random: np.random.Generator, folder: Path) -> tuple[Path, None]:
    """An archive whose checksums are right, around a pickle or values that are not."""
    path = folder / "x.pt"
    torch.save({name: torch.from_numpy(array) for name, array in _arrays(random).items()}, path)
    place = ("data.pkl", "data/0", "version", "byteorder")[int(random.integers(4))]
    _rewrite(path, lambda name, content: _damage(random, content) if name.endswith(place) else content)
    if random.random() < 0.5:
        with zipfile.ZipFile(path) as old:
            entries = [(name, old.read(name)) for name in old.namelist()]
        with zipfile.ZipFile(path, "w") as new:  # not compressed: torch maps it
            for name, content in entries:
                new.writestr(name, content)
    return path, None


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path / "ran"),))


def _structure(random: np.random.Generator, folder: Path) -> tuple[Path, None]:
    """Lists and mappings within one another, many times, in circles, with names that meet, and with code."""
    made: list = [torch.ones(2), 3, _Runs(folder)] if random.random() < 0.3 else [torch.ones(2)]
    keys = ["a", "b", "a.b", 1, "1", 2.5, None, "x" * 300, (1, 2)]
    for _ in range(int(random.integers(1, 60))):
        parts = [made[-1 - int(random.integers(min(2, len(made))))] for _ in range(int(random.integers(1, 4)))]
        if random.random() < 0.5:
            made.append(parts)
        else:
            made.append({keys[int(random.integers(len(keys)))]: x for x in parts})
    if random.random() < 0.2 and isinstance(made[-1], list):
        made[-1].append(made[-1])
    content = {"a": made[-1], "b": made[int(random.integers(len(made)))]}
    if random.random() < 0.2:
        content["c"] = content
    if random.random() < 0.3:
        content = {"state_dict": content}
    data = pickle.dumps(content, protocol=2) if random.random() < 0.2 else None
    if data is None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getvalue()
    (folder / "x.pt").write_bytes(data)
    return folder / "x.pt", None


def _index(random: np.random.Generator, folder: Path) -> tuple[Path, dict | None]:
    """An index of shards, damaged, or with values that are no file beside it."""
    arrays = _arrays(random)
    names = [f"model-{i}.safetensors" for i in range(len(arrays))]
    for name, key in zip(names, arrays, strict=True):
        bridge.save(folder / name, {key: arrays[key]})
    index = folder / "model.safetensors.index.json"
    weight_map: dict = dict(zip(arrays, names, strict=True))
    odd = ["..", ".", "", "/", "../x", "a/b", "a\\b", "C:x", "\0", "\ud800", index.name, "other.index.json"]
    odd += ["folder", "folder.safetensors", None, 3, [], {}, ["a"], "x" * 300, str(folder / names[0])]
    (folder / "folder.safetensors").mkdir()
    (folder / "folder").mkdir()
    if random.random() < 0.7:
        weight_map[list(arrays)[int(random.integers(len(arrays)))]] = odd[int(random.integers(len(odd)))]
        index.write_text(json.dumps({"weight_map": weight_map}))
        return index, arrays
    index.write_bytes(_damage(random, json.dumps({"weight_map": weight_map}).encode()))
    return index, None  # a name of an array may have been hit twice over: the shard would have to agree


def _orbax(random: np.random.Generator, folder: Path) -> tuple[Path, dict]:
    path, arrays = folder / "x", _arrays(random) | {"some": np.arange(3)}
    bridge.save(path, arrays)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[int(random.integers(len(files)))]
    if random.random() < 0.1:
        file.unlink()
    else:
        file.write_bytes(_damage(random, file.read_bytes()))
    if random.random() < 0.1:
        shutil.rmtree(path / "d", ignore_errors=True)
    # Without our own file it is a checkpoint of Orbax alone, which holds no empty arrays.
    return path, arrays if (path / "bridge.json").exists() else {n: x for n, x in arrays.items() if x.size}


MAKERS = (_safetensors, _header, _torch_file, _pickle_inside, _structure, _index)
