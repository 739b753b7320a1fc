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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")

# Two saves of Orbax in threads of one process take each other's signals, and write before their directories are there.
_ONE_AT_A_TIME = threading.Lock()


def save(path: str | os.PathLike[str], tree: Any, *, metadata: Mapping[str, Any] | None = None) -> None:
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
        metadata: what JSON can hold, kept with the arrays for `read_metadata`.

    Raises:
        FileExistsError: `path` exists, or another save to it was faster.
        OSError: the file system refuses, as when it is full; what was written is removed.
        TypeError: a leaf is not an array; the message gives its name.
        ValueError: a leaf is empty, or the processes gave different paths.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(f"{directory}/7", {"weights": jnp.arange(3.0)})
        ...     restore(latest(directory), like={"weights": jnp.zeros(3)})
        {'weights': Array([0., 1., 2.], dtype=float32)}
    """
    start_saving(path, tree, metadata=metadata).wait()


class Saving:
    """A save that goes on in a thread; made by `start_saving`."""

    def __init__(self, path: Path, lock: "_Lock", checkpointer: ocp.StandardCheckpointer, folder: Path) -> None:
        self._path, self._lock, self._checkpointer, self._folder = path, lock, checkpointer, folder
        self._error: Exception | None = None
        # No daemon: a program that ends waits for its last checkpoint.
        self._thread = threading.Thread(target=self._finish, name="mhc checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when the checkpoint is on disk under its name. In a program of several processes all must call it.

        Raises:
            FileExistsError, OSError: as `save`.
        """
        self._thread.join()
        if jax.process_index() != 0 and self._error is not None:
            raise self._error
        _on_first_process(self._result)

    def _finish(self) -> None:
        """What nobody waits for: Orbax gives the folder its name when all processes have written."""
        try:
            try:
                with self._checkpointer:
                    self._checkpointer.wait_until_finished()
            except ValueError as error:  # so TensorStore says whatever a file system refuses, the reason last
                reason = str(error).rsplit(": ", 1)[-1]
                raise OSError(f"path: {self._path} could not be written: {reason}") from error
            if jax.process_index() == 0:
                _publish(self._folder / "checkpoint", self._path)
        except Exception as error:
            self._error = error
        finally:
            self._lock.remove()
            _ONE_AT_A_TIME.release()

    def _result(self) -> str:
        if self._error is not None:
            raise self._error
        return ""


def start_saving(path: str | os.PathLike[str], tree: Any, *, metadata: Mapping[str, Any] | None = None) -> Saving:
    """`save`, which returns when the arrays are copied to the host: from then on `tree` may be donated.

    One save goes on at a time; another that is started meanwhile waits for it. Arguments and errors are those of
    `save`; those of the file system are raised by `Saving.wait`.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     saving = start_saving(f"{directory}/7", {"weights": jnp.arange(3.0)}, metadata={"loss": 0.5})
        ...     saving.wait()
        ...     read_metadata(latest(directory))
        {'loss': 0.5}
    """
    path = Path(path).absolute()
    arrays = traverse_util.unflatten_dict(_named_leaves(tree), sep="/")
    _check_one_path(path)
    lock = _Lock()
    _ONE_AT_A_TIME.acquire()
    try:
        folder = Path(_on_first_process(lambda: _open_folder(path, lock)))
        checkpointer = ocp.StandardCheckpointer()
        checkpointer.save(folder / "checkpoint", arrays, custom_metadata=dict(metadata or {}))
        return Saving(path, lock, checkpointer, folder)
    except BaseException:
        lock.remove()
        _ONE_AT_A_TIME.release()
        raise


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` was given as `metadata`.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
    """
    path = _complete(path)
    with ocp.StandardCheckpointer() as checkpointer:
        return dict(checkpointer.metadata(path).custom_metadata or {})


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
    path = _complete(path)
    targets = {name: _target(leaf) for name, leaf in _named_leaves(like).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        stored = traverse_util.flatten_dict(checkpointer.metadata(path).item_metadata.tree, sep="/")
        _check_same(path, stored, targets)
        nested = checkpointer.restore(path, traverse_util.unflatten_dict(targets, sep="/"))
    return _fill(like, traverse_util.flatten_dict(nested, sep="/"))


class Part(NamedTuple):
    """What `restore_part` found in common.

    Attributes:
        tree: of the type of `like`.
        new: names of leaves of `like` that the checkpoint does not have, and that kept their values.
        unused: names of leaves of the checkpoint that `like` does not have.
    """

    tree: Any
    new: tuple[str, ...]
    unused: tuple[str, ...]


def restore_part(path: str | os.PathLike[str], like: Any) -> Part:
    """What `like` and the checkpoint at `path` have in common, by name: such as a residual decoder's in one of streams.

    Args:
        path: a directory written by `save`.
        like: the module or pytree to fill, of arrays; those that the checkpoint does not have keep their values.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
        ValueError: a shape or a dtype differs, or nothing is in common.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(f"{directory}/0", {"kernel": jnp.ones(2), "step": jnp.int32(7)})
        ...     part = restore_part(f"{directory}/0", {"kernel": jnp.zeros(2), "logits": jnp.zeros(1)})
        >>> part.tree["kernel"], part.new, part.unused
        (Array([1., 1.], dtype=float32), ('logits',), ('step',))
    """
    path = _complete(path)
    leaves = _named_leaves(like)
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = traverse_util.flatten_dict(checkpointer.metadata(path).item_metadata.tree, sep="/")
        targets = {name: _target(leaf) for name, leaf in leaves.items() if name in stored}
        if not targets:
            raise ValueError(
                f"like and the checkpoint {path} have no name in common: {sorted(leaves)}, {sorted(stored)}"
            )
        _check_same(path, {name: stored[name] for name in targets}, targets)
        wanted = traverse_util.unflatten_dict(targets, sep="/")
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        nested = checkpointer.restore(path, args=arguments)
    tree = _fill(like, leaves | traverse_util.flatten_dict(nested, sep="/"))
    return Part(tree, tuple(sorted(leaves.keys() - stored.keys())), tuple(sorted(stored.keys() - leaves.keys())))


def discard(path: str | os.PathLike[str]) -> None:
    """Removes the checkpoint at `path`; interrupted, it leaves nothing that would be taken for one.

    Raises:
        FileNotFoundError: there is no complete checkpoint at `path`.
    """
    path = _complete(path)
    # Under the name of a save that was killed: the next save removes what a killed discard leaves.
    doomed = path.parent / f"{path.name[:30]}.{platform.node()}.{uuid.uuid4().hex}.saving"
    path.rename(doomed)
    shutil.rmtree(doomed)


def latest(directory: str | os.PathLike[str]) -> Path:
    """The complete checkpoint of the highest number among those that `directory` holds as `directory/<number>`.

    Raises:
        FileNotFoundError: there is none.
    """
    found = numbered(directory)
    if not found:
        raise FileNotFoundError(f"directory: no complete checkpoint named by a number in {directory}")
    return found[-1]


def numbered(directory: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints `directory/<number>`, by their numbers; none where there is no directory."""
    paths = Path(directory).absolute().glob("*")
    return sorted((path for path in paths if path.name.isdecimal() and _is_complete(path)), key=lambda p: int(p.name))


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


def _complete(path: str | os.PathLike[str]) -> Path:
    path = Path(path).absolute()
    if not _is_complete(path):
        raise FileNotFoundError(f"path: no complete checkpoint at {path}")
    return path


def _fill(like: Tree, leaves: Mapping[str, Any]) -> Tree:
    """A tree as `like`, of the leaves of these names."""
    names = list(_named_leaves(like))
    graphdef, tree = nnx.split(like) if isinstance(like, nnx.Module) else (None, like)
    tree = jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in names])
    return tree if graphdef is None else nnx.merge(graphdef, tree)


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
