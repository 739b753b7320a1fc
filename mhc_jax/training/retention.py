"""Which checkpoints of a run stay: the last ones and the best."""

import math
from pathlib import Path
from typing import Any

import jax

from mhc_jax.training.checkpoint import Saving, discard, numbered, read_metadata, start_saving


class Checkpoints:
    """The checkpoints of a run, each under the number of updates that it has seen, made in the background.

    On several processes each call is one of all of them.

    Args:
        folder: holds them, on a shared file system.
        keep: how many of the latest stay. That with the least loss stays as well.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(Path(folder), keep=1)
        ...     for step, loss in enumerate([3.0, 1.0, 2.0, 2.5]):
        ...         checkpoints.save(step, {"weights": jnp.ones(2)}, loss=loss)
        ...     checkpoints.wait()
        ...     [path.name for path in numbered(folder)]
        ['1', '3']
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._saving: Saving | None = None
        self._losses: dict[str, float] = {}

    def save(self, step: int, tree: Any, metadata: dict[str, Any] | None = None, *, loss: float | None = None) -> None:
        """Start a save, once that before is done; `tree` may be donated when this returns.

        Args:
            loss: of an evaluation, by which the best is known; None where there was none.

        Raises:
            OSError, ValueError, TypeError: as `checkpoint.save`, of this save or of that before.
        """
        self.wait()
        known = {} if loss is None else {"loss": loss}
        self._saving = start_saving(self.folder / str(step), tree, metadata=known | (metadata or {}))

    def wait(self) -> None:
        """Returns when the last save is on disk, and what need not stay is gone.

        Raises:
            OSError: that save failed.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.wait()
        if jax.process_index() == 0:
            paths = numbered(self.folder)
            stay = {*paths[-self.keep :], min(paths, key=self._loss)}
            for path in set(paths) - stay:
                discard(path)

    def _loss(self, path: Path) -> float:
        """Infinite where there was no evaluation, or no number came of it."""
        if path.name not in self._losses:
            loss = read_metadata(path).get("loss", math.inf)
            self._losses[path.name] = loss if math.isfinite(loss) else math.inf
        return self._losses[path.name]
