"""A thread in front of one backend: training hands over and goes on, whatever the backend does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from mhc_torch.monitoring.logging import get_logger
from mhc_torch.tracking.records import Backlog, Kept, Record

_log = get_logger("mhc.tracking")


class Refused(Exception):
    """Raised by ``send`` where a backend took a part of a record: ``rest`` is the part that it did not take."""

    def __init__(self, rest: dict[str, Any], cause: BaseException) -> None:
        super().__init__(rest)
        self.rest, self.cause = rest, cause


class Interrupts:
    """While it is entered, in the main thread, Ctrl-C is counted; what it usually does happens when it is left."""

    count = 0
    _before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if before not in (None, signal.SIG_IGN):  # None: a handler that Python did not set and cannot restore
                self._before = before
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self.count:
                signal.raise_signal(signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Outbox:
    """Sends records to a backend in order, each once, from a thread of its own.

    A record that the backend refuses is written to the file ``unsent``, one JSON object a line, and reported; the
    next ones are sent all the same. A backend that takes longer than ``timeout`` over one record counts as hung: that
    is reported while training goes on, and at the end what still waits goes into the same file. Each record is either
    sent or in that file. The one exception is the record over which a backend hangs: nobody can know whether it
    arrives, so it is in the file, which says so.

    Args:
        backend: its name, for messages.
        send: called with a method name and its arguments, in the thread; may raise ``Refused``.
        idle: called in the thread when everything was sent.
        unsent: file for what could not be sent; made only when needed.
        timeout: seconds.

    Attributes:
        lost: number of records that the backend did not take.
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
        # What to log once the lock is free: logging may block, and training must not wait for it here.
        self._messages: deque[str] = deque()
        self._backlog = Backlog(unsent.parent, self._messages.append)
        self._kept = Kept(unsent, self._messages.append)
        self._waiting = 0  # for messages
        self._current: Record | None = None  # not that of the end
        self._finish: Record | None = None
        self._since = 0.0  # when the thread took up what it is doing
        self._busy = self._closed = self._interrupted = self._left = False
        self._reported_hang = self._reported_idle = False
        self._process = os.getpid()
        # Python's Condition and Event may break where Ctrl-C ends a call; a bare lock does not. So only the thread
        # waits on the condition, and what the main thread might miss to say, it finds by itself a little later.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name=f"mhc-tracking-{backend}", daemon=True)
        self._thread.start()

    @property
    def inside(self) -> bool:
        """Whether this is the outbox's own thread."""
        return threading.current_thread() is self._thread

    @property
    def gone(self) -> int:
        """How many records are neither sent nor, since the disk has no room, in the file."""
        return len(self._kept.waiting)

    def put(self, method: str, arguments: dict[str, Any]) -> None:
        """Hand over a record; never waits for the backend.

        Raises:
            RuntimeError: the outbox is closed, or this process is a fork of the one that it belongs to.
        """
        self._check_process()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self.backend}: the experiment has been stopped; start_logging starts another")
            self._backlog.append((method, arguments))
            self._waiting += 1
            self._changed.notify()
            hung = self._hung()
        if hung and not self._reported_hang:
            self._reported_hang = True
            _log.warning(
                "%s has taken nothing for %.0f s; %d records wait, training goes on",
                self.backend, self.timeout, self._waiting,
            )  # fmt: skip

    def flush(self) -> bool:
        """Wait until everything was sent, as long as the backend moves; False when it hangs."""
        self._check_process()
        return self._wait(lambda: not self._backlog and not self._busy, lambda: False)

    def close(self, finish: str, arguments: dict[str, Any], interrupts: Interrupts) -> None:
        """Send everything, then the record ``finish``; what a hung backend did not take goes into the file.

        At the first Ctrl-C what still waits goes into the file, and only ``finish`` is sent; at the second even that
        is left.
        """
        self._check_process()
        with self._lock:
            if self._closed:
                return
            self._finish, self._closed = (finish, arguments), True
            self._changed.notify()
        done = self._wait(lambda: not self._thread.is_alive(), lambda: interrupts.count > 0)
        if not done and interrupts.count:
            with self._lock:
                self._interrupted = True
            done = self._wait(lambda: not self._thread.is_alive(), lambda: interrupts.count > 1)
        if not done:
            with self._lock:
                self._leave("interrupted" if interrupts.count > 1 else f"no answer for {self.timeout} s")
        with self._lock:
            self._kept.write()
        self._report()

    def _leave(self, reason: str) -> None:
        self._left = True
        kept = 0
        if self._current is not None:
            kept = self._keep([self._current], f"{reason}: it may have arrived, or still arrive")
        kept += self._keep(self._take(), reason)
        self._finish = None
        self._messages.append(f"hangs and was left behind; {kept} records went to {self.unsent}")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{self.backend}: the experiment belongs to process {self._process}, and this one ({os.getpid()}) is a "
                "fork of it, in which nothing can be logged: log there, or start_logging another here"
            )

    def _wait(self, done: Callable[[], bool], stop: Callable[[], bool]) -> bool:
        """Whether it is ``done`` before it hangs or must ``stop``."""
        pause = 0.0005
        while True:
            with self._lock:
                if done():
                    return True
                if self._hung() or stop():
                    return False
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _hung(self) -> bool:
        return self._busy and time.monotonic() - self._since > self.timeout

    def _run(self) -> None:
        while (record := self._next()) is not None:
            left: dict[str, Any] | None = None
            reason: BaseException | None = None
            try:
                self._send(*record)
            except Refused as refused:
                left, reason = refused.rest, refused.cause
            except BaseException as error:  # even SystemExit must not end this thread
                left, reason = record[1], error
            with self._lock:
                if self._left:  # it is in the file
                    return
                if reason is not None:
                    self._refuse((record[0], left or {}), reason)
                self._current = None
                write = not self._backlog and not self._closed
            if write:
                self._write()
            self._report()
            with self._lock:
                self._busy = self._reported_hang = False
        self._report()

    def _next(self) -> Record | None:
        """The next record, with which the thread is busy from now on; None at the end."""
        with self._changed:
            while True:
                if self._interrupted:
                    kept = self._keep(self._take(), "interrupted before it was sent")
                    self._messages.append(f"interrupted; {kept} records went to {self.unsent}")
                for record in self._take():
                    self._current = record
                    self._busy, self._since = True, time.monotonic()
                    return record
                if self._closed:
                    last, self._finish = self._finish, None
                    self._busy, self._since = last is not None, time.monotonic()
                    return last
                self._changed.wait(0.5)

    def _take(self) -> Iterator[Record]:
        """What waits, as far as it can be read."""
        while self._backlog:
            try:
                record = self._backlog.popleft()
            except OSError as error:
                self._messages.append(f"records that waited on disk are lost ({error})")
                continue
            self._waiting -= 1
            yield record

    def _write(self) -> None:
        """Let the backend write what it holds. If it fails, the records were sent all the same."""
        try:
            self._idle()
        except BaseException as error:
            if not self._reported_idle:
                self._reported_idle = True
                self._messages.append(f"could not write what it took ({type(error).__name__}: {error})")

    def _refuse(self, record: Record, error: BaseException) -> None:
        if self._current is None:
            self._messages.append(f"the run did not end well ({type(error).__name__}: {error})")
            return
        if not self.lost:
            self._messages.append(f"refused a record ({type(error).__name__}: {error})")
        self._keep([record], f"{type(error).__name__}: {error}")

    def _report(self) -> None:
        while self._messages:
            _log.error("%s: %s", self.backend, self._messages.popleft())

    def _keep(self, records: Iterable[Record], reason: str) -> int:
        kept = self._kept.add(self.backend, records, reason)
        self.lost += kept
        return kept
