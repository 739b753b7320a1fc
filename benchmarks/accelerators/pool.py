"""Two processes that compile, so that a compiler that gives up takes nothing with it."""

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accelerators.cases import KERNELS
from benchmarks.accelerators.figures import complaint
from benchmarks.accelerators.targets import TARGETS

PROCESSES = 2
# One program, with the schedules of its kernels written out.
MINUTES = 15


@dataclass(frozen=True, order=True)
class Job:
    """One program for one target."""

    case: str
    implementation: str
    target: str

    @property
    def kind(self) -> tuple[str, bool]:
        """What must be known before the process starts: the platform, and whether schedules are wanted."""
        return TARGETS[self.target].platform, self.implementation in KERNELS


class Worker:
    """A process that compiles jobs of one kind, started again after a compiler has ended it."""

    def __init__(self, kind: tuple[str, bool]) -> None:
        self.kind = kind
        self._folder = tempfile.TemporaryDirectory(prefix="accelerators-")
        self._process: subprocess.Popen[str] | None = None

    def ask(self, job: Job) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        clock = threading.Timer(60 * MINUTES, process.kill)
        clock.start()
        try:
            process.stdin.write(json.dumps(job.__dict__) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late = not clock.is_alive()
            clock.cancel()
        if line:
            return json.loads(line)
        self.close()
        if late:
            return {"error": f"not compiled in {MINUTES} minutes"}
        return {"error": f"the compiler ended its process: {complaint(self._log.read_text(errors='replace'))}"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "stderr"

    def _start(self) -> subprocess.Popen[str]:
        platform, schedules = self.kind
        command = [sys.executable, "-m", "benchmarks.accelerators.worker", platform]
        if schedules:
            command.append(str(Path(self._folder.name) / "schedules"))
        with self._log.open("w") as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def compile_all(jobs: Sequence[Job], done: Callable[[Job, dict[str, Any]], None]) -> dict[Job, dict[str, Any]]:
    """The results of all jobs; `done` is told of each as it comes."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in sorted(jobs, key=lambda job: job.kind):
        waiting.put(job)
    results: dict[Job, dict[str, Any]] = {}

    def run() -> None:
        worker: Worker | None = None
        try:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                if worker is None or worker.kind != job.kind:
                    if worker is not None:
                        worker.close()
                    worker = Worker(job.kind)
                results[job] = worker.ask(job)
                done(job, results[job])
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=run) for _ in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
