"""Send a picture to an experiment logger, each in its own way.

Loggers are told by the names of their classes: those of ``lightning`` and of ``pytorch_lightning`` are then the same,
and none has to be importable.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Drawing:
    """Draws and sends one picture after the other in a thread of its own, so that a training goes on meanwhile."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, draw: Callable[[], None]) -> None:
        """Call `draw` in the thread, once the one before has ended: no more than one picture waits.

        Raises:
            Exception: that of the one before.
        """
        self.finish()
        # No daemon: a script that ends waits for its last picture.
        self._thread = threading.Thread(target=self._run, args=(draw,), name="mhc pictures")
        self._thread.start()

    def finish(self) -> None:
        """Wait until everything is drawn and sent.

        Raises:
            Exception: what was raised there.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _run(self, draw: Callable[[], None]) -> None:
        try:
            draw()
        except Exception as error:
            self._error = error

    def __getstate__(self) -> dict[str, Any]:
        return {"_thread": None, "_error": None}  # copies draw their own


def log_picture(logger: Any, key: str, picture: Image, step: int) -> None:
    """Log ``picture`` under ``key`` at ``step``. A logger that takes no pictures gets none, with a warning."""
    if hasattr(logger, "log_picture"):  # one of mhc_torch.tracking, which sends it from a thread
        logger.log_picture(key, picture, step)
    else:
        send_picture(logger, key, picture, step)


def send_picture(logger: Any, key: str, picture: Image, step: int) -> None:
    """The same for a logger of Lightning itself, now."""
    send = next((_SENDERS[kind] for kind in logger_kinds(logger) if kind in _SENDERS), None)
    if send is not None:
        send(logger, key, picture, step)
    elif hasattr(logger, "log_image"):
        logger.log_image(key=key, images=[picture], step=step)
    else:
        warnings.warn(f"{type(logger).__name__} takes no pictures: {key} is not logged to it", stacklevel=2)


def logger_kinds(logger: Any) -> list[str]:
    """What a logger is, itself first, then its bases: ``["tensorboard"]`` for a ``TensorBoardLogger``."""
    names = [cls.__name__ for cls in type(logger).__mro__]
    return [name.removesuffix("Logger").lower() for name in names if name.endswith("Logger") and name != "Logger"]


def _to_tensorboard(logger: Any, key: str, picture: Image, step: int) -> None:
    logger.experiment.add_image(key, np.asarray(picture), global_step=step, dataformats="HWC")


def _to_mlflow(logger: Any, key: str, picture: Image, step: int) -> None:
    logger.experiment.log_image(logger.run_id, picture, key=key, step=step)


def _to_comet(logger: Any, key: str, picture: Image, step: int) -> None:
    logger.experiment.log_image(picture, name=key, step=step)


def _to_csv(logger: Any, key: str, picture: Image, step: int) -> None:
    """A table holds no pictures: they lie beside it, in a folder named like the metric."""
    path = Path(logger.log_dir, *key.split("/"), f"step={step}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    picture.save(unfinished, format="png")
    os.replace(unfinished, path)


_SENDERS: dict[str, Callable[[Any, str, Image, int], None]] = {
    "tensorboard": _to_tensorboard,
    "mlflow": _to_mlflow,
    "comet": _to_comet,
    "csv": _to_csv,
}
