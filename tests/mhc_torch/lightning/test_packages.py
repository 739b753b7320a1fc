"""What is made for `lightning` says so where it meets `pytorch_lightning`, in place of what Lightning says."""

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from torch import nn

from mhc_torch.lightning import EarlyStoppingConfig, EMAConfig, ModelCheckpointConfig, TrainerConfig
from tests.mhc_torch.lightning_models import WIDTH, Classifier, loader

QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
SETTINGS = {"accelerator": "cpu", "max_epochs": 1, "logger": False, **QUIET}


class Other(pytorch_lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 3)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("config", [EMAConfig(), ModelCheckpointConfig(monitor="train_loss")])
def test_callbacks_say_that_the_trainer_is_of_the_other_package(config, tmp_path):
    """Before: "Expected a parent", and at the first checkpoint "Found more than one stateful callback"."""
    callback = config.create_callback()
    other = pytorch_lightning.Trainer(**SETTINGS, callbacks=[callback], default_root_dir=tmp_path)
    message = f"^{type(config).__name__} is of lightning.pytorch, Trainer is a Trainer of pytorch_lightning"
    with pytest.raises(TypeError, match=message):
        other.fit(Other(), loader(1))
    own = pl.Trainer(**SETTINGS, callbacks=[callback], default_root_dir=tmp_path)
    own.fit(Classifier(), loader(1))
    assert own.state.finished


@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_a_configured_trainer_says_that_the_module_is_of_the_other_package(call):
    """Before: "`model` must be a `LightningModule`", of something that is one."""
    trainer = TrainerConfig(accelerator="cpu", additional_trainer_kwargs=QUIET).create_trainer()
    with pytest.raises(TypeError, match=r"Other is a LightningModule of pytorch_lightning, .* from lightning\.pytorch"):
        getattr(trainer, call)(Other(), loader(1))


def test_what_works_with_both_does(tmp_path):
    stopping = EarlyStoppingConfig(monitor="train/loss").create_callback()
    other = pytorch_lightning.Trainer(**SETTINGS, callbacks=[stopping], enable_checkpointing=False)
    other.fit(Other(), loader(1))
    assert other.state.finished


def test_checkpoints_keep_the_state_of_callbacks_under_lightnings_names():
    made = ModelCheckpointConfig(monitor="val_loss").create_callback()
    assert made.state_key == pl.callbacks.ModelCheckpoint(monitor="val_loss").state_key
    assert EMAConfig().create_callback().state_key == pl.callbacks.EMAWeightAveraging().state_key
