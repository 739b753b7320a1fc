"""Configurations of the callbacks that most trainings need."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import EarlyStopping
from pydantic import Field

from mhc_torch.lightning.packages import refuse_the_other
from mhc_torch.lightning.settings import Settings, require_writable


# The names are Lightning's own, because checkpoints keep the state of a callback under the name of its class.
class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's; under a Trainer of `pytorch_lightning` a TypeError says that it is of `lightning`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_the_other("ModelCheckpointConfig", trainer)
        super().setup(trainer, pl_module, stage)


class EMAWeightAveraging(callbacks.EMAWeightAveraging):
    """Lightning's; under a Trainer of `pytorch_lightning` a TypeError says that it is of `lightning`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_the_other("EMAConfig", trainer)
        super().setup(trainer, pl_module, stage)


class ModelCheckpointConfig(Settings):
    """Which checkpoints are kept, and where; the fields are those of Lightning's ``ModelCheckpoint``."""

    dirpath: str | None = None
    filename: str | None = None
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    save_top_k: int = Field(1, ge=-1)
    save_last: bool | Literal["link"] | None = None
    save_weights_only: bool = False
    save_on_exception: bool = False
    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    train_time_interval: timedelta | None = None
    save_on_train_epoch_end: bool | None = None
    auto_insert_metric_name: bool = True
    enable_version_counter: bool = True
    verbose: bool = False

    def create_callback(self) -> ModelCheckpoint:
        """Raises ValueError where ``dirpath`` cannot be written to."""
        if self.dirpath is not None:
            require_writable("dirpath", self.dirpath)
        return ModelCheckpoint(**self.model_dump())


class EarlyStoppingConfig(Settings):
    """When training stops before its end; the fields are those of Lightning's ``EarlyStopping``."""

    monitor: str
    mode: Literal["min", "max"] = "min"
    patience: int = Field(3, ge=0)
    min_delta: float = 0.0
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    check_finite: bool = True
    check_on_train_epoch_end: bool | None = None
    strict: bool = True
    verbose: bool = False

    def create_callback(self) -> EarlyStopping:
        return EarlyStopping(**self.model_dump())


class EMAConfig(Settings):
    """Moving average of the weights, used in validation and at the end; fields as Lightning's EMAWeightAveraging."""

    decay: float = Field(0.999, ge=0, le=1)
    update_every_n_steps: int = Field(1, ge=1)
    update_starting_at_step: int | None = None
    update_starting_at_epoch: int | None = None

    def create_callback(self) -> EMAWeightAveraging:
        return EMAWeightAveraging(**self.model_dump())
