"""A thread in front of one backend: training hands over and goes on, whatever the backend does."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhc_torch.utils.logging import get_logger

_log = get_logger("mhc.tracking")

Record = tuple[str, dict[str, Any]]


class Outbox:
    """Sends records to a backend in order, each exactly once, from a thread of its own.

    A record that the backend refuses is written to the file ``unsent``, one JSON object a line, and reported; the
    next ones are sent all the same. A backend that takes longer than ``timeout`` over one record counts as hung: that
    is reported while training goes on, and at the end what still waits goes into the same file.

    Args:
        backend: its name, for messages.
        send: called with a method name and its arguments, in the thread.
        idle: called in the thread when everything was sent.
        unsent: file for what could not be sent; made only when needed.
        timeout: seconds.
    """

    def __init__(
        self,
        backend: str,
        send: Callable[[str, dict[str, Any]], None],
        idle: Callable[[], None],
        unsent: Path,
        timeout: float,
    ) -> None:
        self.backend, self.unsent, self.timeout = backend, unsent, timeout
        self.lost = 0
        self._send, self._idle = send, idle
        self._records: deque[Record] = deque()
        self._current: Record | None = None
        self._since = 0.0  # when the thread took up what it is doing
        self._busy = self._closed = self._reported_hang = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"mhc-tracking-{backend}", daemon=True)
        self._thread.start()

    @property
    def inside(self) -> bool:
        """Whether this is the outbox's own thread."""
        return threading.current_thread() is self._thread

    def put(self, method: str, arguments: dict[str, Any]) -> None:
        """Hand over a record; never waits.

        Raises:
            RuntimeError: the experiment has been stopped.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self.backend}: the experiment has been stopped; start_logging starts another")
            self._records.append((method, arguments))
            self._changed.notify_all()
            hung = self._hung()
            waiting = len(self._records)
        if hung and not self._reported_hang:
            self._reported_hang = True
            _log.warning(
                "%s has taken nothing for %.0f s; %d records wait, training goes on",
                self.backend, self.timeout, waiting,
            )  # fmt: skip

    def flush(self) -> bool:
        """Wait until everything was sent, as long as the backend moves; False when it hangs."""
        with self._changed:
            while self._records or self._busy:
                if self._hung():
                    return False
                self._changed.wait(0.05)
        return True

    def close(self, finish: str, arguments: dict[str, Any]) -> None:
        """Send everything, then the record ``finish``; what a hung backend did not take goes into the file."""
        self.put(finish, arguments)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self.flush():
            self._thread.join()
            return
        with self._changed:
            left = ([self._current] if self._current else []) + list(self._records)
            self._records.clear()
        left = [record for record in left if record[0] != finish]
        for record in left:
            self._keep(record, f"no answer for {self.timeout} s")
        _log.error("%s hangs and was left behind; %d records went to %s", self.backend, len(left), self.unsent)

    def _hung(self) -> bool:
        return self._busy and time.monotonic() - self._since > self.timeout

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._records and not self._closed:
                    self._changed.wait()
                if not self._records:
                    return
                self._current = self._records.popleft()
                self._busy, self._since = True, time.monotonic()
            method, arguments = self._current
            try:
                self._send(method, arguments)
                if not self._records and not self._closed:
                    self._idle()
            except Exception as error:
                if not self.lost:
                    _log.error("%s refused a record (%s: %s)", self.backend, type(error).__name__, error)
                self._keep(self._current, f"{type(error).__name__}: {error}")
            with self._changed:
                self._busy, self._current = False, None
                self._reported_hang = False
                self._changed.notify_all()

    def _keep(self, record: Record, reason: str) -> None:
        self.lost += 1
        method, arguments = record
        line = json.dumps({"backend": self.backend, "call": method, **arguments, "error": reason}, default=str)
        self.unsent.parent.mkdir(parents=True, exist_ok=True)
        with open(self.unsent, "a") as file:
            file.write(line + "\n")
