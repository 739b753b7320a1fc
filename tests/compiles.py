"""How many programs JAX compiles."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_compiled: list[str] = []


def _listener(event: str, _duration: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listener)


@contextmanager
def counted() -> Iterator[list[str]]:
    """A list with one entry for each program that was compiled inside."""
    _compiled.clear()
    yield _compiled
