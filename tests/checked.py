"""What holds arguments and results to their annotations in tests that are run with it (see CONTRIBUTING.md)."""

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, Self

import jaxtyping
from beartype import BeartypeConf, beartype

# As PEP 484 and mypy have it, an int will do where a float is asked for.
_checks = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises where an argument or its result is not what it is annotated to be."""
    # beartype knows Self where it is given whole classes only; jaxtyping gives it methods.
    function.__annotations__ = {name: Any if hint is Self else hint for name, hint in function.__annotations__.items()}
    return _checks(function)


_with_shapes = jaxtyping.jaxtyped


def _jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """`jaxtyping.jaxtyped`, but shapes are bound only where some are annotated: that takes a third of some tests' time.

    It also reads annotations that are text. A function inside of another would be made ready anew at every call;
    without shapes, mypy alone holds it.
    """

    def decorate(function: Any) -> Any:
        hints = getattr(function, "__annotations__", {}).values()
        if not isinstance(function, FunctionType) or any(isinstance(h, str) or "jaxtyping" in repr(h) for h in hints):
            return _with_shapes(function, typechecker=typechecker)
        if "<locals>" in function.__qualname__:
            return function
        strict = checked(function)

        @wraps(function)
        def either(*args: Any, **kwargs: Any) -> Any:
            return (function if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

        return either

    return decorate


jaxtyping.jaxtyped = _jaxtyped
