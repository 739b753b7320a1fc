"""What holds arguments and results to their annotations in tests that are run with it (see CONTRIBUTING.md)."""

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

# As PEP 484 and mypy have it, an int will do where a float is asked for.
_checks = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises where an argument or its result is not what it is annotated to be."""
    # beartype knows Self where it is given whole classes only; jaxtyping gives it methods.
    function.__annotations__ = {name: Any if hint is Self else hint for name, hint in function.__annotations__.items()}
    return _checks(function)
