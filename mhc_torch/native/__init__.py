"""The nodes of a tape compiled for the CPU: `python -m mhc_torch.native` does it, once for each version of torch.

Without them a tape does the same by operations of torch, more slowly.
"""

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("nodes.cpp")
NAME = "mhc_torch_nodes"
_LOADING, _LOADED = threading.Lock(), dict[Path, ModuleType]()
COMPILE, LINK = ["-O3", "-g0", "-fopenmp"], ["-fopenmp"]


def library() -> Path:
    """The compiled file for this source, Python, torch and machine, in the user's cache; it need not exist.

    Raises:
        RuntimeError: there is no home folder.
    """
    machine = (sys.implementation.cache_tag, torch.__version__, platform.machine(), *platform.libc_ver())
    digest = hashlib.sha256("\n".join([SOURCE.read_text(), *machine, *COMPILE]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mhc_torch" / f"{NAME}-{digest}{importlib.machinery.EXTENSION_SUFFIXES[-1]}"


@functools.cache
def nodes() -> ModuleType | None:
    """The compiled nodes, or None if they have not been built, or this user has no cache.

    Raises:
        ImportError: the file is there and cannot be loaded.
    """
    try:
        file = library()
        if not file.is_file():
            return None
    except (OSError, RuntimeError):
        return None
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(file))
    specification = importlib.util.spec_from_file_location(NAME, file, loader=loader)
    assert specification is not None
    with _LOADING:
        if file not in _LOADED:  # two threads may come here at once, and classes of C++ register once
            try:
                module = importlib.util.module_from_spec(specification)
                loader.exec_module(module)
            except ImportError as error:
                raise ImportError(
                    f"{file} cannot be loaded ({error}); delete it, and build it again if you like"
                ) from error
            _LOADED[file] = module
        return _LOADED[file]


def build() -> Path:
    """Compile the nodes, unless that has been done; takes about half a minute.

    Returns:
        The compiled file.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed, and said on stderr why; or there is no cache to write to.
    """
    file = library()
    if file.exists():
        return file
    from setuptools import Distribution
    from setuptools.errors import CompileError, LinkError
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    extension = CppExtension(NAME, [str(SOURCE)], extra_compile_args=COMPILE, extra_link_args=LINK)
    command = BuildExtension.with_options(use_ninja=False)(Distribution({"ext_modules": [extension]}))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            command.build_lib = command.build_temp = folder
            command.ensure_finalized()
            command.run()
            os.replace(command.get_ext_fullpath(NAME), file)
    except (CompileError, LinkError, RuntimeError, OSError) as error:
        raise RuntimeError(f"{SOURCE.name} did not compile into {file.parent}: {error}") from error
    nodes.cache_clear()
    return file
