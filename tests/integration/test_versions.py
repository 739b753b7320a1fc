"""What pyproject.toml claims to work with is what the tests run on."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What is only measured against or developed with is claimed to nobody.
EXTRAS = {name: names for name, names in PROJECT["optional-dependencies"].items() if name not in ("bench", "dev")}
CLAIMED = [
    requirement
    for text in sum(EXTRAS.values(), PROJECT["dependencies"])
    if (requirement := Requirement(text)).name != PROJECT["name"]
]


def pinned(lock: str) -> dict[str, Version]:
    lines = (ROOT / lock).read_text().splitlines()
    pins = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {pin.name.replace("_", "-"): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


@pytest.mark.parametrize("requirement", CLAIMED, ids=str)
def test_a_lower_bound_is_a_version_that_the_tests_run_on(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == ">="
    lowest = pinned("requirements-lowest.lock")
    ran_on = lowest.get(requirement.name) or pinned("requirements.lock")[requirement.name]
    assert Version(specifier.version) == ran_on


@pytest.mark.parametrize("requirement", [Requirement(text) for text in PROJECT["dependencies"]], ids=str)
def test_the_lowest_versions_are_installed_of_all_that_is_required(requirement):
    assert requirement.name in pinned("requirements-lowest.lock")
