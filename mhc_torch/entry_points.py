"""What Lightning calls for every Trainer, in every project of an environment in which this library is installed.

So it imports nothing: where no experiment was started there is nothing to add. pyproject.toml declares it as
``lightning.pytorch.callbacks_factory`` and ``pytorch_lightning.callbacks_factory``.
"""

import sys
from typing import Any


def lightning_callbacks() -> list[Any]:
    """The callbacks that join a new Trainer: those of :mod:`mhc_torch.tracking`, if it is in use."""
    session = sys.modules.get("mhc_torch.tracking.session")
    return session.attachments() if session is not None else []
