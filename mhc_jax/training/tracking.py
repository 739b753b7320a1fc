"""Trackers of the training program: a file of its metrics, TensorBoard without torch, and several at once."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mhc_jax.monitoring.dashboard import Heatmaps, Tracker


class MetricsFile:
    """A line of JSON for every report: `{"step": 10, "train/loss": 2.5, ...}`.

    Args:
        path: the file; it is made with its folder, or gone on with.
        size: bytes of it to keep, what was in it when the checkpoint was made from which the run goes on.
    """

    def __init__(self, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(min(size, self._file.tell()))

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._file.tell()

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a line, which a program that is killed afterwards has written."""
        self._file.write(json.dumps({"step": step} | dict(metrics)).encode() + b"\n")
        self._file.flush()

    def log_text(self, key: str, text: str, step: int) -> None:
        """Add a line."""
        self.log_metrics({key: text}, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Hyperparameters lie with the checkpoints."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars and text in TensorBoard's files; needs the package `tensorboard` alone.

    Args:
        folder: for its files.
        step: where the run begins: what an earlier program wrote of later steps is not shown.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(self._stamped(step=step, session_log=start))

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Numbers, as scalars."""
        make = self._summary.Summary.Value
        self._add([make(tag=name, simple_value=float(value)) for name, value in metrics.items()], step)

    def log_text(self, key: str, text: str, step: int) -> None:
        """A text, in Markdown."""
        from tensorboard.plugins.text.summary import text_pb

        self._add(text_pb(key, text).value, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """As text."""
        self.log_text("config", f"```\n{json.dumps(params, indent=1)}\n```", 0)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()

    def _add(self, values: Any, step: int) -> None:
        self._writer.add_event(self._stamped(step=step, summary=self._summary.Summary(value=values)))

    def _stamped(self, **fields: Any) -> Any:
        return self._event.Event(wall_time=time.time(), **fields)


@runtime_checkable
class Texts(Protocol):
    """A tracker that also takes texts."""

    def log_text(self, key: str, text: str, step: int) -> None: ...


@runtime_checkable
class Closes(Protocol):
    """A tracker that has an end."""

    def close(self) -> None: ...


class Several:
    """Trackers as one: each gets what it takes."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """To all of them."""
        for tracker in self.trackers:
            tracker.log_metrics(metrics, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """To all of them."""
        for tracker in self.trackers:
            tracker.log_hyperparams(params)

    def log_mixing_weights(self, key: str, weights: Mapping[str, Any], step: int) -> None:
        """To those that draw."""
        for tracker in self.trackers:
            if isinstance(tracker, Heatmaps):
                tracker.log_mixing_weights(key, weights, step)

    def log_text(self, key: str, text: str, step: int) -> None:
        """To those that take texts."""
        for tracker in self.trackers:
            if isinstance(tracker, Texts):
                tracker.log_text(key, text, step)

    def close(self) -> None:
        """Ends all of them."""
        for tracker in self.trackers:
            if isinstance(tracker, Closes):
                tracker.close()
