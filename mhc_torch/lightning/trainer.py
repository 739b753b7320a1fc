"""Configuration of a Lightning Trainer."""

from __future__ import annotations

import inspect
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
from pydantic import Field, field_validator

from mhc_torch.lightning.callbacks import EarlyStoppingConfig, EMAConfig, ModelCheckpointConfig
from mhc_torch.lightning.loggers import LoggerConfig
from mhc_torch.lightning.packages import refuse_the_other
from mhc_torch.lightning.settings import Settings

Precision = Literal["16-mixed", "bf16-mixed", "32-true", "64-true", "16-true", "bf16-true"]


class Trainer(pl.Trainer):
    """Lightning's; a TypeError says so where a module is of `pytorch_lightning`."""

    def fit(self, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        refuse_the_other("TrainerConfig", model)
        super().fit(model, *args, **kwargs)

    def validate(self, model: pl.LightningModule | None = None, *args: Any, **kwargs: Any) -> Any:
        refuse_the_other("TrainerConfig", model)
        return super().validate(model, *args, **kwargs)

    def test(self, model: pl.LightningModule | None = None, *args: Any, **kwargs: Any) -> Any:
        refuse_the_other("TrainerConfig", model)
        return super().test(model, *args, **kwargs)

    def predict(self, model: pl.LightningModule | None = None, *args: Any, **kwargs: Any) -> Any:
        refuse_the_other("TrainerConfig", model)
        return super().predict(model, *args, **kwargs)


class TrainerConfig(Settings):
    """The common settings of ``lightning.pytorch.Trainer``, with Lightning's meaning and defaults.

    Args:
        loggers: configurations or bare names, as ``["tensorboard", "csv"]``; none of them means no logging.
        checkpoint: which checkpoints to keep; None keeps none.
        additional_trainer_kwargs: any further argument of the Trainer.

    Raises:
        pydantic.ValidationError: an unknown field, a value out of range, or an ``additional_trainer_kwargs`` that is
            a field of its own or unknown to the Trainer.
    """

    accelerator: str = "auto"
    strategy: str = "auto"
    num_nodes: int = Field(1, ge=1)
    devices: int | str | list[int] = "auto"
    precision: Precision | None = None
    deterministic: bool | Literal["warn"] | None = None

    max_epochs: int | None = None
    min_epochs: int | None = None
    max_steps: int = -1
    min_steps: int | None = None
    max_time: str | timedelta | dict[str, int] | None = None

    val_check_interval: int | float | None = None
    check_val_every_n_epoch: int | None = 1
    log_every_n_steps: int | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None

    checkpoint: ModelCheckpointConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    ema: EMAConfig | None = None
    loggers: list[LoggerConfig] = Field(default_factory=list)
    additional_trainer_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("additional_trainer_kwargs")
    @classmethod
    def _known_to_the_trainer(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        known = inspect.signature(pl.Trainer).parameters.keys() - cls.model_fields.keys()
        known -= {"logger", "enable_checkpointing"}
        if unknown := sorted(kwargs.keys() - known):
            raise ValueError(
                f"{unknown} are fields of their own or unknown to the Trainer; allowed are {sorted(known)}"
            )
        return kwargs

    def create_trainer(self, **overrides: Any) -> pl.Trainer:
        """The Trainer of this configuration.

        Args:
            overrides: arguments of the Trainer that replace what the configuration says; ``callbacks`` come in
                addition to its own.

        Raises:
            ImportError: the package of a logger is missing; the message names the extra to install.
            ValueError: a folder cannot be written to.
        """
        own = {"checkpoint", "early_stopping", "ema", "loggers", "additional_trainer_kwargs"}
        arguments = {name: getattr(self, name) for name in type(self).model_fields.keys() - own}
        arguments |= self.additional_trainer_kwargs
        arguments["logger"] = [] if "logger" in overrides else [config.create_logger() for config in self.loggers]
        arguments["enable_checkpointing"] = self.checkpoint is not None
        arguments |= overrides
        configs = (self.checkpoint, self.early_stopping, self.ema)
        callbacks = [config.create_callback() for config in configs if config is not None]
        for more in (self.additional_trainer_kwargs.get("callbacks"), overrides.get("callbacks")):
            callbacks += more if isinstance(more, list) else [] if more is None else [more]
        return Trainer(**arguments | {"callbacks": callbacks})
