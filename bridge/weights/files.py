"""Weights in files: of one model, and from a file of one framework to a file of the other.

JAX models are stored under the dotted paths of their variables ("body.layers.kernel"), torch models under the keys of
their state dict. Random streams and caches, which a model makes anew, are not stored.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np
from flax import nnx
from torch import nn
from torch.nn.parameter import UninitializedParameter

from bridge.weights.arrays import borrow, dtype_name, numpy_dtype, to_jax, to_numpy
from bridge.weights.convert import warn
from bridge.weights.formats import Piece, Reader, Spec, open_file, write
from bridge.weights.leaves import aliases, jax_leaves, jax_transients, put, torch_leaves, value
from bridge.weights.match import Dtypes, Link, Match, check_dtypes, fits, match
from bridge.weights.names import bare, understood
from mhc_torch.injection import published_keys
from mhc_torch.nn import MHCConv2d

Model = TypeVar("Model", bound=nnx.Module | nn.Module)


def save(path: str | os.PathLike[str], source: nnx.Module | nn.Module | Mapping[str, Any]) -> None:
    """Writes the weights of a model, or named arrays, bit for bit, with checksums.

    Args:
        path: `x.safetensors`, `x.pt` (.pth, .bin, .ckpt), or for an Orbax directory `x` or `x.orbax`.
            A file that is there is replaced only when the new one is complete.
        source: an nnx.Module, a torch.nn.Module, or name -> array (torch, jax or numpy).

    Raises:
        FileExistsError: the Orbax directory exists: those are never written over.
        TypeError: `source` is something else, or an array has a dtype that not all frameworks share.
        ValueError: the name or dtype fits no format.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/net.safetensors", torch.nn.Linear(4, 2))
        ...     print({name: array.shape for name, array in load(f"{folder}/net.safetensors").items()})
        {'bias': (2,), 'weight': (2, 4)}
    """
    arrays = {name: to_numpy(value(leaf)) for name, leaf in _leaves(source).items()}
    specs = {name: Spec(dtype_name(array.dtype), array.shape) for name, array in arrays.items()}
    write(path, specs, (Piece(name, 0, array) for name, array in arrays.items()))


@overload
def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]: ...
@overload
def load(path: str | os.PathLike[str], model: Model, *, dtype: Dtypes = "equal") -> Model: ...
def load(path: str | os.PathLike[str], model: Any = None, *, dtype: Dtypes = "equal") -> Any:
    """Reads weights bit for bit, into a model of the framework that they were saved from or as numpy arrays.

    Args:
        path: as in `save`; also the index of a sharded checkpoint (`x.safetensors.index.json`), a folder of a
            transformers model or of Orbax's CheckpointManager (its last step), and what a training program saved, of
            which the entry "state_dict", "model_state_dict", "model" or "params" is the model's.
        model: an nnx.Module or torch.nn.Module to fill in place. Nothing is written unless all fits. Names may have
            what `torch.compile`, data parallel modules, older versions of Flax and the published `mhc` package add.
        dtype: "equal", or "cast" to round floating-point values to the dtypes of `model` where the file has others.

    Returns:
        `model`; without one, name -> array (bfloat16 and float8 as dtypes of ml_dtypes).

    Raises:
        FileNotFoundError: nothing is at `path`, or a shard is missing.
        ValueError: the file is damaged, cut short, of another format, or holds objects other than arrays; or names,
            shapes or dtypes differ from the model's, all of which are listed. `dtype` is "cast" without a model.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/net.pt", torch.nn.Linear(4, 2))
        ...     load(f"{folder}/net.pt", torch.nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)
    """
    check_dtypes(dtype)
    if model is None and dtype != "equal":
        raise ValueError(f"dtype={dtype!r} needs a model, to whose dtypes to cast")
    with open_file(path) as reader:
        if model is None:
            return {name: _own(reader.read(name)) for name in reader.specs}
        reader = _understood(reader, model, path)
        leaves = _leaves(model)
        if isinstance(model, nn.Module):  # parameters that take their shape from the file, if it has them
            leaves |= {name: p for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)}
        names = _sources(reader, leaves, _ignored(model), path, dtype, _hint(reader.specs, leaves, model))
        arrays = {name: reader.read(source) for name, source in names.items()}
        if isinstance(model, nn.Module):
            model.load_state_dict({name: borrow(array) for name, array in arrays.items()})
            return model
        for name, array in arrays.items():
            array = array.astype(value(leaves[name]).dtype, copy=False)
            put(model, leaves, name, to_jax(_own(array), getattr(value(leaves[name]), "sharding", None)))
        return model


def convert_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    jax_model: nnx.Module,
    torch_model: nn.Module,
    to: Literal["jax", "torch"],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    dtype: Dtypes = "equal",
    untie: bool = False,
) -> None:
    """Turns a file of one framework's weights into one of the other's, array by array.

    The models may be abstract (`nnx.eval_shape`, `torch.device("meta")`): all that is taken from them are leaves that
    the source cannot know, such as the batch counter of a torch BatchNorm. From shards or safetensors to safetensors,
    no more than one array of the source is in memory at a time.

    Args:
        source: weights of the other framework, see `load`.
        target: where to write, see `save`.
        jax_model, torch_model: the two forms of the model.
        to: the framework of `target`.
        progress: is called with the number of bytes converted and the total.
        dtype, untie: as of `convert`.

    Raises:
        ValueError: the models do not correspond, or `source` does not fit; everything is listed, nothing is written.

    Warns:
        UserWarning: as `convert`.

    Example:
        >>> import tempfile, torch
        >>> torch_model, jax_model = torch.nn.Linear(4, 2), nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/net.pt", torch_model)
        ...     convert_file(f"{folder}/net.pt", f"{folder}/net.safetensors", jax_model, torch_model, to="jax")
        ...     print({name: array.shape for name, array in load(f"{folder}/net.safetensors").items()})
        {'bias': (2,), 'kernel': (4, 2)}
    """
    if to not in ("jax", "torch"):
        raise ValueError(f"to must be 'jax' or 'torch', got {to!r}")
    found = match(jax_model, torch_model, dtype=dtype, untie=("torch" if to == "jax" else "jax") if untie else None)
    warn(found)
    ours, theirs = (found.torch, found.jax) if to == "jax" else (found.jax, found.torch)
    specs = {name: _spec(leaf) for name, leaf in theirs.items()}
    done, total = 0, sum(spec.nbytes for spec in specs.values())

    def count(piece: Piece) -> Piece:
        nonlocal done
        done += piece.values.nbytes
        progress(done, total)
        return piece

    with open_file(source) as reader:
        reader = _understood(reader, torch_model if to == "jax" else jax_model, source)
        names = _sources(reader, ours, _ignored(torch_model if to == "jax" else jax_model), source, dtype)
        found.check_zeros("torch" if to == "jax" else "jax", lambda path: reader.read(names[path]))
        write(target, specs, map(count, _pieces(reader, names, found, specs, to)))


def _pieces(
    reader: Reader, names: Mapping[str, str], found: Match, specs: Mapping[str, Spec], to: str
) -> Iterator[Piece]:
    """Every array of the target, in parts, in the order of the source: each array of it is read once."""
    here, there = ("jax", "torch") if to == "torch" else ("torch", "jax")
    targets = getattr(found, there)
    names_of = aliases(targets)
    links: dict[str, dict[tuple, Link]] = {}
    for link in found.links:  # tied leaves have a link under each of their names: one of these is enough
        ours, theirs = getattr(link, here), getattr(link, there)
        links.setdefault(names[ours.path], {})[theirs.index, theirs.rows, id(targets[theirs.path])] = link
    for name in reader.specs:
        yield from _parts(reader.read(name), links.get(name, {}).values(), names_of, specs, to)
    linked = {alias for link in found.links for alias in names_of[getattr(link, there).path]}
    zeros = {path for side, path in found.zeros if side == there}
    for name in zeros:
        yield Piece(name, 0, np.zeros(specs[name].shape, numpy_dtype(specs[name].dtype)))
    for name in targets.keys() - linked - zeros:  # declared to have no counterpart, such as a counter of batches
        array = value(targets[name])
        if isinstance(array, jax.ShapeDtypeStruct) or getattr(array, "is_meta", False):
            raise ValueError(f"{there}_model: it must not be abstract, {name} has no counterpart in the source")
        yield Piece(name, 0, to_numpy(array))


def _parts(
    array: np.ndarray, links: Iterable[Link], names: Mapping[str, list[str]], specs: Mapping[str, Spec], to: str
) -> Iterator[Piece]:
    """What one array of the source becomes. When this ends, nothing holds it, and the next can be read."""
    for link in links:
        slot = link.torch if to == "torch" else link.jax
        shape = specs[slot.path].shape
        values = link.to_torch(array) if to == "torch" else link.to_jax(array, shape)
        values = values.astype(numpy_dtype(specs[slot.path].dtype), copy=False)
        for name in names[slot.path]:
            yield Piece(name, slot.start(shape), values)


class _Renamed(Reader):
    """Arrays of another reader by other names.

    Args:
        names: the names in the file -> those here, "" for what is left out.
    """

    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        self._reader = reader
        self._stored = {names.get(name, name): name for name in reader.specs if names.get(name, name)}
        self.specs = {name: reader.specs[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        return self._reader.read(self._stored[name])


def _understood(reader: Reader, model: nnx.Module | nn.Module, path: Any) -> Reader:
    """With the names of `model` for those that wrappers, training programs and the published `mhc` package give.

    Raises:
        ValueError: a module of the model refuses the state of the version that was saved.
    """
    versions = {bare(name): version for name, version in reader.versions.items()}
    if names := understood(reader.specs, [*_leaves(model), *_ignored(model)]):
        reader = _Renamed(reader, names)
    if not isinstance(model, nn.Module):
        return reader
    for name, module in model.named_modules():
        if isinstance(module, MHCConv2d) and (refusal := module.refusal(versions.get(bare(name)))):
            raise ValueError(f"{path} does not fit the model: {name or 'it'} is {refusal}")
    names = published_keys(model, reader.specs)
    return _Renamed(reader, names) if names else reader


def _ignored(model: nnx.Module | nn.Module) -> set[str]:
    """Names that a checkpoint of the model may have though they carry no weights: random streams, caches."""
    return jax_transients(model) if isinstance(model, nnx.Module) else set()


def _sources(
    reader: Reader, leaves: Mapping[str, Any], ignored: set[str], path: Any, dtype: Dtypes, hint: str = ""
) -> dict[str, str]:
    """name of each leaf -> the name under which the file has it, which for a tied leaf may be that of its twin.

    Raises:
        ValueError: names, shapes or dtypes differ; tied leaves have different values in the file.
    """
    names, problems = {}, []
    for name, twins in aliases(leaves).items():
        present = [twin for twin in twins if twin in reader.specs]
        shapeless = isinstance(leaves[name], UninitializedParameter)
        if not present:
            problems += [] if shapeless else [f"{name}, {_spec(leaves[name])}, is not in the file"]
            continue
        names[name] = name if name in present else present[0]
        stored = reader.specs[names[name]]
        wanted = stored if shapeless else _spec(leaves[name])
        if stored.shape != wanted.shape or not fits(stored.dtype, wanted.dtype, dtype):
            problems.append(f"{name} is {stored} in the file, {_spec(leaves[name])} in the model")
        elif name == present[0] and any(_differ(reader, name, twin) for twin in present[1:]):
            problems.append(f"{', '.join(present)} are one array in the model, and differ in the file")
    left = [name for name in reader.specs if name not in leaves and name not in ignored]
    problems += [f"{name}, {reader.specs[name]}, is in the file only" for name in left]
    if problems:
        raise ValueError(f"{path} does not fit the model{hint}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return names


def _hint(names: Iterable[str], leaves: Mapping[str, Any], model: Any) -> str:
    """What helps if a file has names that a model has not, as layers of the other framework have them."""
    ours, theirs = ("jax", "torch") if isinstance(model, nnx.Module) else ("torch", "jax")
    usual = {"jax": ("kernel", "embedding", "scale"), "torch": ("weight", "running_mean", "running_var")}[theirs]
    if not any(name.rpartition(".")[2] in usual for name in names if name not in leaves):
        return ""
    return f', for its names look like those of {theirs} (bridge.convert_file(..., to="{ours}") translates)'


def _own(array: np.ndarray) -> np.ndarray:
    """The array, or a copy where it would change or be lost when somebody writes into the file."""
    return array if array.flags.writeable else array.copy()


def _differ(reader: Reader, one: str, other: str) -> bool:
    return not np.array_equal(_bits(reader.read(one)), _bits(reader.read(other)))


def _bits(array: np.ndarray) -> np.ndarray:
    """The array's bits as integers, which are equal where NaNs are not."""
    return array.reshape(-1).view(f"u{min(array.itemsize, 8)}")


def _spec(leaf: Any) -> Spec:
    array = value(leaf)
    return Spec(dtype_name(array.dtype), tuple(array.shape))


def _leaves(source: Any) -> dict[str, Any]:
    if isinstance(source, nnx.Module):
        return jax_leaves(source)
    if isinstance(source, nn.Module):
        return torch_leaves(source)
    if isinstance(source, Mapping):
        if wrong := [name for name in source if not isinstance(name, str)]:
            raise TypeError(f"source: names must be strings, got {wrong}")
        return dict(source)
    raise TypeError(f"expected an nnx.Module, a torch.nn.Module or a mapping of arrays, got {type(source).__name__}")
