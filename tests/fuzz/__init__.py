"""Random trials against independent references, faults and damaged files: `python -m tests.fuzz --minutes 10`.

A subject is a module here with a function `trial(seed)`, which draws all it needs from
`numpy.random.default_rng(seed)`, tries one case, and raises an AssertionError that says what was wrong. To add a
subject, add its file: the command and `make test` find it by themselves.
"""

import importlib
import pkgutil
import time
from collections.abc import Callable

_NO_SUBJECTS = ("__main__", "test_fuzz")
SUBJECTS = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in _NO_SUBJECTS)


class Failure(AssertionError):
    """A trial that failed, with the command that runs it again."""


def trial(subject: str) -> Callable[[int], None]:
    """What tries one case of `subject`.

    Raises:
        ValueError: there is no such subject.
    """
    if subject not in SUBJECTS:
        raise ValueError(f"subject must be one of {', '.join(SUBJECTS)}, got {subject!r}")
    return importlib.import_module(f"{__name__}.{subject}").trial


def run(subject: str, seed: int, *, seconds: float, trials: int | None = None) -> int:
    """Trials of `subject` with seed, seed + 1, ... until the time is spent or so many have run; returns their number.

    Raises:
        Failure: a trial failed; its error is the cause.
    """
    attempt = trial(subject)
    end = time.monotonic() + seconds
    done = 0
    while done == 0 or (time.monotonic() < end and (trials is None or done < trials)):
        try:
            attempt(seed + done)
        except Exception as error:
            again = f"python -m tests.fuzz {subject} --seed {seed + done} --trials 1"
            raise Failure(f"{type(error).__name__}: {error}\n  again: {again}") from error
        done += 1
    return done
