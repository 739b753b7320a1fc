"""Checkpoints while several processes save one path, some are killed, and others restore: whole, or not there."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from mhc_jax.training.checkpoint import latest, restore, save

ARRAYS = 10
LIMIT_S = 60.0  # for what takes a second
_SCRIPT = """
import sys, threading
import jax.numpy as jnp
from mhc_jax.training.checkpoint import save

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # at once, for print lets another thread in between
    sys.stdout.flush()

def attempt(number, size, path):
    try:
        save(path, {str(i): jnp.full(int(size), float(number)) for i in range(10)})
    except FileExistsError:
        say("exists", number, path)
    except BaseException as error:
        say("failed", number, path, repr(error).replace("\\n", " "))
    else:
        say("saved", number, path)

for line in sys.stdin:
    numbers, size, *paths = line.split()
    for path in paths:
        threads = [threading.Thread(target=attempt, args=(number, size, path)) for number in numbers.split(",")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    say("done")
"""


class _Saver:
    """A process that saves what it is told to, with a thread for each number."""

    def __init__(self) -> None:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.said: list[list[str]] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.split())

    def tell(self, numbers: list[int], size: int, paths: list[str]) -> None:
        self.said.clear()
        assert self.process.stdin is not None
        self.process.stdin.write(f"{','.join(map(str, numbers))} {size} {' '.join(paths)}\n")
        self.process.stdin.flush()

    @property
    def busy(self) -> bool:
        return self.reader.is_alive() and ["done"] not in self.said


_savers: list[_Saver] = []  # they start slowly, so those that live serve the next trial


def trial(seed: int) -> None:
    """Processes save the same paths at the same time, some are killed; whatever is restored is of one of them."""
    draw = np.random.default_rng(seed)
    size = int(draw.choice([10, 200_000]))
    killed = [saver for saver in range(2) if draw.random() < 0.1]
    while len(_savers) < 2:
        _savers.append(_Saver())
    savers = [_savers.pop(0) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, "run", str(step))) for step in range(int(draw.integers(1, 4)))]
        for number, saver in enumerate(savers):
            saver.tell([10 * number + thread for thread in range(int(draw.integers(1, 3)))], size, paths)
        due = time.monotonic() + draw.exponential(0.1)
        end = time.monotonic() + LIMIT_S
        found: dict[str, float] = {}
        while any(saver.busy for saver in savers):
            assert time.monotonic() < end, "the savers hang"
            if (
                killed
                and time.monotonic() > due
                and any(saver.said or Path(folder, "run").exists() for saver in savers)
            ):
                for number in killed:
                    savers[number].process.send_signal(signal.SIGKILL)
                killed, _ = [], _savers.append(_Saver())
            _restore_all(paths, size, found)
            time.sleep(0.005)
        _restore_all(paths, size, found)
        said = [words for saver in savers for words in saver.said if words != ["done"]]
        assert not [words for words in said if words[0] == "failed"], said
        for path in paths:
            winners = [int(words[1]) for words in said if words[0] == "saved" and words[2] == path]
            assert len(winners) <= 1, f"{path} was saved by {winners}"
            assert path in found or not winners, f"{path} was saved and is not there"
            assert not winners or found[path] == winners[0], f"{path} of {winners} holds {found[path]}"
        # What the killed left is removed by the next.
        save(Path(folder, "run", "99"), {"a": jnp.zeros(3)})
        assert latest(Path(folder, "run")).name == "99"
        names = {path.name for path in Path(folder, "run").iterdir()}
        assert names == {Path(path).name for path in found} | {"99"}, f"left behind: {names}"
    _savers.extend(saver for saver in savers if saver.process.poll() is None and saver.reader.is_alive())


def _restore_all(paths: list[str], size: int, found: dict[str, float]) -> None:
    """Each path has no checkpoint, or a whole one, of one saver, and always the same."""
    for path in paths:
        try:
            restored = restore(path, {str(i): jnp.zeros(size) for i in range(ARRAYS)})
        except FileNotFoundError:
            assert path not in found, f"{path} has gone"
            continue
        values = {float(value) for array in restored.values() for value in np.unique(array)}
        assert len(values) == 1, f"{path} has arrays of {sorted(values)}"
        (value,) = values
        assert found.setdefault(path, value) == value, f"{path} was of {found[path]}, now of {value}"
