"""What is asked of Trainers and loggers of `lightning` or of `pytorch_lightning`: the two have no base in common."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class EitherTrainer(Protocol):
    @property
    def global_step(self) -> int: ...

    @property
    def is_global_zero(self) -> bool: ...

    @property
    def loggers(self) -> list[Any]: ...

    @property
    def accelerator(self) -> Any: ...

    @property
    def strategy(self) -> Any: ...


@runtime_checkable
class EitherLogger(Protocol):
    @property
    def name(self) -> str | None: ...

    @property
    def save_dir(self) -> str | None: ...
