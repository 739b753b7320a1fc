"""Configurations of experiment loggers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from lightning.pytorch import loggers
from pydantic import BeforeValidator, Field

from mhc_torch.lightning.clearml_logger import ClearMLLogger
from mhc_torch.lightning.settings import Settings, require, require_writable


class TensorBoardLoggerConfig(Settings):
    """Event files under ``save_dir/name/version``."""

    type: Literal["tensorboard"] = "tensorboard"
    save_dir: str = "."
    name: str | None = "lightning_logs"
    version: int | str | None = None

    def create_logger(self) -> loggers.TensorBoardLogger:
        require("tensorboard", "tensorboard")
        require_writable("save_dir", self.save_dir)
        return loggers.TensorBoardLogger(self.save_dir, name=self.name, version=self.version)


class CSVLoggerConfig(Settings):
    """A table ``metrics.csv`` under ``save_dir/name/version``."""

    type: Literal["csv"] = "csv"
    save_dir: str = "."
    name: str | None = "lightning_logs"
    version: int | str | None = None

    def create_logger(self) -> loggers.CSVLogger:
        require_writable("save_dir", self.save_dir)
        return loggers.CSVLogger(self.save_dir, name=self.name, version=self.version)


class WandbLoggerConfig(Settings):
    """A run of Weights & Biases; ``offline`` keeps it under ``save_dir/wandb``."""

    type: Literal["wandb"] = "wandb"
    project: str = "lightning_logs"
    name: str | None = None
    save_dir: str = "."
    offline: bool = False
    log_model: bool | Literal["all"] = False

    def create_logger(self) -> loggers.WandbLogger:
        require("wandb", "wandb")
        require_writable("save_dir", self.save_dir)
        return loggers.WandbLogger(**self.model_dump(exclude={"type"}))


class MLFlowLoggerConfig(Settings):
    """A run of MLflow; by default in a SQLite file here."""

    type: Literal["mlflow"] = "mlflow"
    experiment_name: str = "lightning_logs"
    run_name: str | None = None
    tracking_uri: str = "sqlite:///mlflow.db"
    artifact_location: str | None = None

    def create_logger(self) -> loggers.MLFlowLogger:
        require("mlflow", "mlflow")
        return loggers.MLFlowLogger(**self.model_dump(exclude={"type"}))


class CometLoggerConfig(Settings):
    """An experiment of Comet. Without network set the environment variable ``COMET_START_ONLINE=0``.

    ``CometLogger(online=False)`` of Lightning 2.6 is no way to do so: it records nothing at all.
    """

    type: Literal["comet"] = "comet"
    project: str | None = None
    workspace: str | None = None
    offline_directory: str | None = None

    def create_logger(self) -> loggers.CometLogger:
        require("comet_ml", "comet")
        given = self.model_dump(exclude={"type"}, exclude_none=True)
        return loggers.CometLogger(**given)


class ClearMLLoggerConfig(Settings):
    """A task of ClearML; ``offline`` keeps it under ``save_dir/offline``."""

    type: Literal["clearml"] = "clearml"
    project: str = "lightning_logs"
    name: str = "run"
    save_dir: str | None = None
    offline: bool = False

    def create_logger(self) -> ClearMLLogger:
        return ClearMLLogger(**self.model_dump(exclude={"type"}))


AnyLogger = (
    TensorBoardLoggerConfig
    | CSVLoggerConfig
    | WandbLoggerConfig
    | MLFlowLoggerConfig
    | CometLoggerConfig
    | ClearMLLoggerConfig
)


def _by_name(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


# A logger's configuration, or its bare name:
# "tensorboard", "csv", "wandb", "mlflow", "comet", "clearml".
LoggerConfig = Annotated[Annotated[AnyLogger, Field(discriminator="type")], BeforeValidator(_by_name)]
