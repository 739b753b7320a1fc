"""Compiling the nodes of a tape. That they compute what the ones in Python do is in test_tape.py."""

import re
import runpy

import pytest
import torch

from mhc_torch import native


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A user's cache in which nothing has been built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.nodes.cache_clear()
    yield tmp_path / "mhc_torch"
    native.nodes.cache_clear()


def test_what_has_been_built_is_not_built_again(compiled_nodes, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert native.build() == native.library() == compiled_nodes


def test_without_a_compiler(empty_cache, monkeypatch):
    assert native.nodes() is None
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/no/such/compiler")
    with pytest.raises(RuntimeError, match=r"nodes\.cpp did not compile.*/no/such/compiler"):
        native.build()
    assert not empty_cache.exists()


def test_the_command_says_in_one_line_why_there_are_none_and_what_that_costs(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler --quick")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("mhc_torch.native", run_name="__main__")
    assert re.fullmatch(r"nodes\.cpp did not compile.*/no/such/compiler.*longer on a CPU", stopped.value.code)


def test_what_the_compiler_refuses_is_an_error(empty_cache, monkeypatch, tmp_path):
    source = tmp_path / "nodes.cpp"
    source.write_text("no C++")
    monkeypatch.setattr(native, "SOURCE", source)
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    with pytest.raises(RuntimeError, match=r"nodes\.cpp did not compile into"):
        native.build()
    assert not list(empty_cache.iterdir())


@pytest.mark.parametrize("cache", ["unreadable", "no home"])
def test_without_a_cache_nothing_is_compiled_and_nothing_fails(empty_cache, monkeypatch, cache):
    if cache == "unreadable":
        (empty_cache.parent / "a file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache.parent / "a file"))
        with pytest.raises(RuntimeError, match=r"did not compile into .*a file"):
            native.build()
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native.Path, "home", _no_home)
    assert native.nodes() is None


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_torn_file_is_named(empty_cache):
    file = native.library()
    file.parent.mkdir()
    file.write_bytes(b"\x7fELF, half of it")
    with pytest.raises(ImportError, match=f"{file.name} cannot be loaded.*delete it"):
        native.nodes()


def test_another_torch_needs_another_file(monkeypatch):
    before = native.library()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert native.library() != before
    assert native.library().parent == before.parent
