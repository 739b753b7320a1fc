"""Checkpoints: arrays of any pytree or NNX module to a directory and back, through Orbax behind two functions.

A checkpoint is never written over another. Save each under its own name and ask for the newest:

    save(f"runs/digits/{int(state.step)}", state)
    state = restore(latest("runs/digits"), like=state)
"""

import fcntl
import hashlib
import os
import platform
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")

# Two saves of Orbax in threads of one process take each other's signals, and write before their directories are there.
_ONE_AT_A_TIME = threading.Lock()


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes the arrays of `tree` to the new directory `path`, and returns when they are on disk.

    The directory is written beside, under a name that no other save uses, and gets its own name at once when it is
    complete. So an interrupted save leaves nothing that `latest` or `restore` would take for a checkpoint, and of
    several saves to one path, by threads or by programs that know nothing of each other, one succeeds. What a killed
    save leaves, `<name>.<host>.<token>.saving`, is removed by the next save into that folder on the same host.

    In a program of several processes (`jax.distributed`), every one must call it, from one thread, with the same path
    on a shared file system.

    Args:
        path: a local path that does not exist yet.
        tree: an NNX module, a `TrainState` or any pytree of arrays, sharded or not, typed PRNG keys included. On disk
            it is a nested dict with the names of the tree, readable with Orbax alone.

    Raises:
        FileExistsError: `path` exists, or another save to it was faster.
        TypeError: a leaf is not an array; the message gives its name.
        ValueError: a leaf is empty, or the processes gave different paths.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(f"{directory}/7", {"weights": jnp.arange(3.0)})
        ...     restore(latest(directory), like={"weights": jnp.zeros(3)})
        {'weights': Array([0., 1., 2.], dtype=float32)}
    """
    path = Path(path).absolute()
    arrays = traverse_util.unflatten_dict(_named_leaves(tree), sep="/")
    _check_one_path(path)
    lock = _Lock()
    with _ONE_AT_A_TIME:
        try:
            folder = Path(_on_first_process(lambda: _open_folder(path, lock)))
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / "checkpoint", arrays)
            _on_first_process(lambda: _publish(folder / "checkpoint", path))
        finally:
            lock.remove()


def restore(path: str | os.PathLike[str], like: Tree) -> Tree:
    """Reads the checkpoint at `path` into the structure and the shardings of `like`.

    Args:
        path: a directory written by `save`.
        like: the module or pytree to fill, which is left as it is. Its arrays, or `jax.ShapeDtypeStruct`s, say which
            shape, dtype and sharding each restored array has: a mesh other than the one it was saved from is fine.

    Returns:
        A new tree of the type of `like`, equal to the saved one bit for bit.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
        ValueError: the names, a shape or a dtype differ between the checkpoint and `like`; the message lists them.
    """
    path = Path(path).absolute()
    if not _is_complete(path):
        raise FileNotFoundError(f"path: no complete checkpoint at {path}")
    targets = {name: _target(leaf) for name, leaf in _named_leaves(like).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        stored = traverse_util.flatten_dict(checkpointer.metadata(path).item_metadata.tree, sep="/")
        _check_same(path, stored, targets)
        nested = checkpointer.restore(path, traverse_util.unflatten_dict(targets, sep="/"))
    restored = traverse_util.flatten_dict(nested, sep="/")
    graphdef, tree = nnx.split(like) if isinstance(like, nnx.Module) else (None, like)
    tree = jax.tree.unflatten(jax.tree.structure(tree), [restored[name] for name in targets])
    return tree if graphdef is None else nnx.merge(graphdef, tree)


def latest(directory: str | os.PathLike[str]) -> Path:
    """The complete checkpoint of the highest number among those that `directory` holds as `directory/<number>`.

    Raises:
        FileNotFoundError: there is none.
    """
    numbered = [path for path in Path(directory).absolute().glob("*") if path.name.isdecimal() and _is_complete(path)]
    if not numbered:
        raise FileNotFoundError(f"directory: no complete checkpoint named by a number in {directory}")
    return max(numbered, key=lambda path: int(path.name))


class _Lock:
    """A folder that is locked, as long as its process lives, by which it is known to be in use."""

    folder: Path | None = None
    _file = -1

    def take(self, folder: Path) -> bool:
        """Whether `folder` is there and nobody else has it."""
        try:
            file = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the two calls it may have been taken and removed.
            if os.path.samestat(os.fstat(file), os.stat(folder)):
                self.folder, self._file = folder, file
                return True
        except OSError:
            pass
        os.close(file)
        return False

    def remove(self) -> None:
        """Remove the folder, if one was taken, and only then unlock it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._file)
            self.folder = None


def _open_folder(path: Path, lock: _Lock) -> str:
    """A new folder beside `path`, locked; removes those of dead processes."""
    if path.exists():
        raise _refusal(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"*.{platform.node()}.*.saving"):
        dead = _Lock()
        if dead.take(left):
            dead.remove()
    while True:
        # A name has 255 bytes, a character up to 4.
        folder = path.parent / f"{path.name[:30]}.{platform.node()}.{uuid.uuid4().hex}.saving"
        folder.mkdir()
        if lock.take(folder):
            return str(folder)


def _publish(complete: Path, path: Path) -> str:
    """Give a checkpoint its name, unless there is one of that name."""
    try:
        os.rename(complete, path)
    except OSError as error:
        if path.exists():
            raise _refusal(path) from error
        raise
    return ""


def _refusal(path: Path) -> FileExistsError:
    return FileExistsError(f"path: {path} exists, and a checkpoint is never written over; choose a new name")


def _check_one_path(path: Path) -> None:
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(os.fsencode(path)).digest(), np.uint8)
        digests = multihost_utils.process_allgather(digest)
        if (digests != digests[0]).any():
            raise ValueError(f"path must be the same on every process, got {path} on process {jax.process_index()}")


def _on_first_process(action: Callable[[], str]) -> str:
    """What `action` returns or raises on process 0, returned or raised on every process: none waits for a dead one."""
    if jax.process_count() == 1:
        return action()
    said, error = b"", None
    if jax.process_index() == 0:
        try:
            said = b"+" + action().encode()
        except OSError as caught:
            error = caught
            said = (b"x" if isinstance(caught, FileExistsError) else b"-") + str(caught).encode()[:4000]
    text = bytes(multihost_utils.broadcast_one_to_all(np.frombuffer(said.ljust(8192, b"\0"), np.uint8)))
    text = text.rstrip(b"\0")
    if error is not None:
        raise error
    if text[:1] != b"+":
        raise (FileExistsError if text[:1] == b"x" else OSError)(text[1:].decode(errors="replace"))
    return text[1:].decode()


def _is_complete(path: Path) -> bool:
    return (path / "_METADATA").exists()


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The array leaves of `tree` by their name, such as `params/layers/kernel`, in the order of its leaves."""
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    named = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # nnx.Variable holds its array as `.value`: the variable's own name says enough.
        if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
            keys = keys[:-1]
        name = jax.tree_util.keystr(keys, simple=True, separator="/") or "value"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
            raise TypeError(f"tree: leaf {name!r} is {leaf!r} of type {type(leaf).__name__}; only arrays are saved")
        if leaf.size == 0:
            raise ValueError(f"tree: leaf {name!r} of shape {leaf.shape} is empty, which Orbax cannot store")
        named[name] = leaf
    return named


def _target(leaf: Any) -> Any:
    """What Orbax shall restore in the place of `leaf`: NumPy stays NumPy, and JAX arrays keep their sharding."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)  # without x64, no float64 comes back
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def _check_same(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Orbax would cast, and name only some of the differences; a resumed run needs every one of them."""
    problems = [f"{name} is not in the checkpoint" for name in wanted.keys() - stored.keys()]
    problems += [f"{name} is in the checkpoint only" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        leaf = wanted[name]
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        if (leaf.shape, leaf.dtype) != (stored[name].shape, stored[name].dtype):
            saved = f"{stored[name].dtype}{list(stored[name].shape)}"
            problems.append(f"{name} was saved as {saved}, and like has {leaf.dtype}{list(leaf.shape)}")
    if problems:
        raise ValueError(f"like does not match the checkpoint {path}: " + "; ".join(sorted(problems)))
