"""Every example in a docstring of bridge runs and prints what it says, and every public name has one."""

import doctest
import importlib
import pkgutil

import pytest

import bridge

MODULES = sorted(info.name for info in pkgutil.walk_packages(bridge.__path__, "bridge.") if "__main__" not in info.name)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize("name", bridge.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in getattr(bridge, name).__doc__
