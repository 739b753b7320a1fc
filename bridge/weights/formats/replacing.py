"""Files and directories that appear under their name whole or not at all, and leave nothing behind when killed."""

import errno
import hashlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing shows there that a writer is dead, so nothing of it is removed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name whose file takes the place of `path`, with the mode of that, when and only if all went well.

    Where `path` is a symbolic link, it is the file that it leads to that is replaced. When this ends, the new file is
    on the disk, not only in the memory of the system.
    """
    path = target_of(path)
    with scratch(path) as directory:
        new = directory / f"new{path.suffix}"
        yield new
        with new.open("rb+") as file:
            with suppress(FileNotFoundError):
                os.chmod(new, stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())
        os.replace(new, path)
        sync(path.parent)


def target_of(path: Path) -> Path:
    """Where a file named `path` is, once all symbolic links are followed; OSError if they lead in a circle."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, for this writer alone, that is removed at the end.

    Those that killed writers of `path` left are removed first. A writer holds the lock on a file in its directory for
    as long as it lives, however it dies. The names hold a hash of this host and of the name of `path`: the locks of
    other hosts need not show here, so theirs are never touched; and a long name gives no longer one.
    """
    key = hashlib.blake2b(f"{socket.gethostname()}/{path.name}".encode(errors="surrogateescape"), digest_size=8)
    prefix, suffix = f".{key.hexdigest()}.", ".new"
    for found in path.parent.glob(f"{prefix}*{suffix}"):
        with suppress(OSError), _locked(found, wait=False):  # alive, gone meanwhile, or of another user
            shutil.rmtree(found)
    while True:
        directory = Path(tempfile.mkdtemp(suffix, prefix, path.parent))
        with suppress(FileNotFoundError):  # taken for a dead one's before it was locked: once more
            lock = _locked(directory, wait=True)
            break
    try:
        with lock:
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _locked(directory: Path, *, wait: bool) -> BinaryIO:
    """The file that says while it is open that somebody works in `directory`.

    Raises:
        FileNotFoundError: the directory is gone.
        OSError: somebody does already, or (unless `wait`) nothing can be known, since the system has no such locks.
    """
    file = (directory / "lock").open("ab")
    try:
        if fcntl is None and not wait:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        if fcntl is not None:
            with suppress(OSError) if wait else nullcontext():
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(directory / "lock")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
    except BaseException:
        file.close()
        raise
    return file


def sync(path: Path) -> None:
    """Puts a file, or the names in a directory, on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
