"""Every example of "Advanced: Lightning Integration", word for word, runs with `mhc_torch.lightning`.

Filled in is only what the document leaves open: models, data, metrics, `...`; GPUs are CPUs here, and
`validation_epoch_end`, which Lightning 2 removed, is `on_validation_epoch_end`.
"""
# The documents have a style of their own.

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from typing_extensions import override

import mhc_torch.lightning
from mhc_torch.lightning import (
    DatasetsConfig,
    EarlyStoppingConfig,
    FinetuneDataModule,
    ModelCheckpointConfig,
    TrainerConfig,
    create_optimizer,
)

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}


# fmt: off
class FinetuneModuleBase(LightningModule):
    def training_step(self, batch, batch_idx):
        output = self(batch)
        loss = self._compute_loss(output["predicted_properties"], self.batch_to_labels(batch))
        return loss

    def validation_step(self, batch, batch_idx):
        output = self(batch)
        self._compute_loss(output["predicted_properties"], self.batch_to_labels(batch))

    def test_step(self, batch, batch_idx):
        output = self(batch)
        self._compute_loss(output["predicted_properties"], self.batch_to_labels(batch))

    def configure_optimizers(self):
        return create_optimizer(self.hparams.optimizer, self.parameters())


class MatterTuneDataModule(LightningDataModule):
    def prepare_data(self):
        # Download data if needed
        pass

    def setup(self, stage):
        # Create train/val/test splits
        self.datasets = self.hparams.create_datasets()

    def train_dataloader(self):
        return self.lightning_module.create_dataloader(
            self.datasets["train"],
            has_labels=True
        )

    def val_dataloader(self):
        return self.lightning_module.create_dataloader(
            self.datasets["validation"],
            has_labels=True
        )
# fmt: on


class Forces(FinetuneModuleBase, mhc_torch.lightning.FinetuneModuleBase):
    """What the document leaves to the user, and the metric that its callbacks watch."""

    def __init__(self):
        super().__init__(optimizer={"name": "SGD", "lr": 0.1}, batch_size=4)
        torch.manual_seed(0)
        self.net = nn.Linear(3, 3)

    def forward(self, batch):
        return {"predicted_properties": self.net(batch[0])}

    def batch_to_labels(self, batch):
        return batch[1]

    def _compute_loss(self, predictions, labels):
        loss = F.l1_loss(predictions, labels)
        if not self.trainer.training:
            self.log("val/forces_mae", loss)
        return loss


class Synthetic(DatasetsConfig):
    def create_datasets(self):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
        return {"train": TensorDataset(x, 2 * x), "validation": TensorDataset(x, 2 * x)}


class Data(MatterTuneDataModule, FinetuneDataModule):
    """The documented methods over the library's `hparams` and `lightning_module`."""


def test_core_components_train():
    module = Forces()
    before = module.net.weight.detach().clone()
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(module, Data(Synthetic()))
    assert not torch.equal(module.net.weight, before)
    assert trainer.callback_metrics["val/forces_mae"] > 0


def test_1_checkpoint_management(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # fmt: off
    checkpoint_callback = ModelCheckpointConfig(
        monitor="val/forces_mae",
        dirpath="./checkpoints",
        filename="best-model",
        save_top_k=1,
        mode="min"
    ).create_callback()
    # fmt: on
    trainer = Trainer(callbacks=[checkpoint_callback], max_epochs=2, **QUIET)
    trainer.fit(Forces(), Data(Synthetic()))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best-model.ckpt"]


def test_2_early_stopping():
    # fmt: off
    early_stopping = EarlyStoppingConfig(
        monitor="val/forces_mae",
        patience=20,
        mode="min"
    ).create_callback()
    # fmt: on
    class Frozen(Forces):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = Trainer(callbacks=[early_stopping], max_epochs=50, enable_checkpointing=False, **QUIET)
    trainer.fit(Frozen(), Data(Synthetic()))
    assert trainer.current_epoch == 21


@pytest.mark.parametrize("devices", [[0], [0, 1]])
def test_3_multi_gpu_training(devices):
    gpus = {"accelerator": "gpu", "devices": devices} | ({"strategy": "ddp"} if len(devices) > 1 else {})
    if torch.cuda.device_count() >= len(devices):
        assert Trainer(**gpus).num_devices == len(devices)
    else:
        with pytest.raises(MisconfigurationException, match="gpu"):
            TrainerConfig(**gpus).create_trainer()


def test_4_logging():
    class Logs(Forces):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            energy_mae = forces_mae = loss
            self.log("train_loss", loss)
            # fmt: off
            self.log_dict({
                "energy_mae": energy_mae,
                "forces_mae": forces_mae
            })
            # fmt: on
            return loss

    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Logs(), Data(Synthetic()))
    assert {"train_loss", "energy_mae", "forces_mae"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_5_precision_settings(precision):
    if precision == "16-mixed" and not torch.cuda.is_available():
        precision = "bf16-mixed"  # half precision on a CPU is bfloat16
    trainer = Trainer(precision=precision, max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Forces(), Data(Synthetic()))
    assert trainer.precision == precision


def test_available_trainer_configurations():
    # fmt: off
    trainer_config = TrainerConfig(
        # Hardware
        accelerator="gpu",
        devices=[0,1],
        precision="16-mixed",

        # Training
        max_epochs=100,
        gradient_clip_val=1.0,

        # Validation
        val_check_interval=1.0,
        check_val_every_n_epoch=1,

        # Callbacks
        early_stopping=EarlyStoppingConfig(monitor="val/forces_mae"),
        checkpoint=ModelCheckpointConfig(monitor="val/forces_mae"),

        # Logging
        loggers=["tensorboard", "wandb"]
    )
    # fmt: on
    assert [config.type for config in trainer_config.loggers] == ["tensorboard", "wandb"]


def test_advanced_usage():
    seen = []

    class Advanced(Forces):
        # fmt: off
        # Custom training loop
        @override
        def training_step(self, batch, batch_idx):
            if self.trainer.global_rank == 0:
                # Do something only on main process
                seen.append("rank zero")

            # Access trainer properties
            if self.trainer.is_last_batch:
                # Special handling for last batch
                seen.append("last")
            return super().training_step(batch, batch_idx)

        # Custom validation
        @override
        def on_validation_epoch_end(self):
            # Compute epoch-level metrics
            seen.append("validated")
        # fmt: on

    Trainer(max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET).fit(
        Advanced(), Data(Synthetic())
    )
    assert seen == ["rank zero", "rank zero", "last", "validated"]
