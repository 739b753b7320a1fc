"""`lightning` and `pytorch_lightning`: two copies of one package, whose classes do not know each other."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class EitherTrainer(Protocol):
    """What is asked of a Trainer, whichever of the two it is of."""

    @property
    def global_step(self) -> int: ...

    @property
    def is_global_zero(self) -> bool: ...

    @property
    def loggers(self) -> list[Any]: ...

    @property
    def callback_metrics(self) -> dict[str, Any]: ...

    @property
    def accelerator(self) -> Any: ...

    @property
    def strategy(self) -> Any: ...


@runtime_checkable
class EitherLogger(Protocol):
    """What is asked of a logger, whichever of the two it is of."""

    @property
    def name(self) -> str | None: ...

    @property
    def save_dir(self) -> str | None: ...


def refuse_the_other(owner: str, given: object) -> None:
    """`given`, with which `owner` is to work, must not be of `pytorch_lightning`.

    Raises:
        TypeError: it is; what Lightning itself says then names a class that seems to be right.
    """
    for kind in type(given).__mro__:
        if kind.__module__.split(".")[0] == "pytorch_lightning":
            raise TypeError(
                f"{owner} is of lightning.pytorch, {type(given).__name__} is a {kind.__name__} of pytorch_lightning, "
                f"which is another class: import {kind.__name__} from lightning.pytorch"
            )
