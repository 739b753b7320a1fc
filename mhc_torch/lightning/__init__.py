"""Training with Lightning: configurations, a base for fine-tuning, data, and the stability dashboard."""

from mhc_torch.lightning.dashboard import MHCLightningCallback  # isort: skip  says what to install

from mhc_torch.lightning.callbacks import EarlyStoppingConfig, EMAConfig, ModelCheckpointConfig
from mhc_torch.lightning.clearml_logger import ClearMLLogger
from mhc_torch.lightning.data import DatasetsConfig, FinetuneDataModule
from mhc_torch.lightning.finetune import FinetuneModuleBase
from mhc_torch.lightning.loggers import (
    ClearMLLoggerConfig,
    CometLoggerConfig,
    CSVLoggerConfig,
    MLFlowLoggerConfig,
    TensorBoardLoggerConfig,
    WandbLoggerConfig,
)
from mhc_torch.lightning.optimizers import OptimizerConfig, create_optimizer
from mhc_torch.lightning.trainer import TrainerConfig

__all__ = [
    "CSVLoggerConfig",
    "ClearMLLogger",
    "ClearMLLoggerConfig",
    "CometLoggerConfig",
    "DatasetsConfig",
    "EMAConfig",
    "EarlyStoppingConfig",
    "FinetuneDataModule",
    "FinetuneModuleBase",
    "MHCLightningCallback",
    "MLFlowLoggerConfig",
    "ModelCheckpointConfig",
    "OptimizerConfig",
    "TensorBoardLoggerConfig",
    "TrainerConfig",
    "WandbLoggerConfig",
    "create_optimizer",
]
