"""Killed processes that save to one path, and readers: the file is always whole, and nothing is left for ever."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import bridge

ROOT = Path(__file__).parents[2]
# Each save is all of one number. One process, which forks for each writer: the imports take seconds.
_SERVER = """
import os, sys, threading
import numpy as np
import bridge
for line in sys.stdin:
    path, number, size, threads = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    def save(number):
        while True:
            bridge.save(path, {"a": np.full(int(size), number), "b": np.full(7, number)})
    for i in range(int(threads)):
        threading.Thread(target=save, args=(int(number) + i,), daemon=True).start()
    threading.Event().wait()
"""
_servers: list[subprocess.Popen] = []


def _writer(path: Path, number: int, size: int, threads: int) -> int:
    """The process id of a new writer, which saves to `path` without end."""
    if not _servers:
        command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)" + _SERVER]
        _servers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    server = _servers[0]
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{path}\t{number}\t{size}\t{threads}\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def trial(seed: int) -> None:
    """Some writers save to one path and are killed, at random moments, while this process loads it."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x" + (".safetensors", ".pt")[int(random.integers(2))])
        through = path
        if random.random() < 0.3:  # through a link
            through = Path(folder, f"link{path.suffix}")
            through.symlink_to(path.name)
        kept = {path.name, through.name}
        bridge.save(through, {"a": np.full(5, 0), "b": np.full(7, 0)})
        path.chmod(0o640)
        size = int(random.integers(1, 300_000))
        pids = [
            _writer(through, 10 * i + 1, size, int(random.integers(1, 3))) for i in range(int(random.integers(1, 4)))
        ]
        try:
            end = time.monotonic() + random.uniform(0, 0.3)
            while pids:
                _check(through)
                if time.monotonic() >= end:
                    _kill(pids.pop())
                    end = time.monotonic() + random.uniform(0, 0.05)
        finally:
            for pid in pids:
                _kill(pid)
        _check(through)
        bridge.save(through, {"a": np.full(5, -1), "b": np.full(7, -1)})
        _check(through)
        assert (left := set(os.listdir(folder)) - kept) == set(), f"{left} is left after the next save"
        assert path.stat().st_mode & 0o777 == 0o640, f"the mode became {path.stat().st_mode:o}"
        assert through == path or through.is_symlink(), "the link was replaced"


def _check(path: Path) -> None:
    arrays = bridge.load(path)
    numbers = {int(x) for array in arrays.values() for x in (array.min(), array.max())}
    assert arrays.keys() == {"a", "b"}, f"the arrays are {sorted(arrays)}"
    assert len(numbers) == 1, f"a file of several saves: {numbers}"


def _kill(pid: int) -> None:
    """Kills it, and waits until it is gone: only then is its lock free for sure."""
    os.kill(pid, signal.SIGKILL)
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.001)
