"""A training script as a user has it: two processes under DDP, tracked; run by test_tracking_ddp."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from mhc_torch.lightning import EMAConfig, TrainerConfig
from mhc_torch.tracking import start_logging, stop_logging
from tests.mhc_torch.lightning_models import Classifier, loader


class Ranked(Classifier):
    """Logs its rank, whose mean over two processes is a half, and uses its logger on every rank."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"depth": 5})

    def on_train_start(self):
        self.loggers[0].log_hyperparams({"from_every_rank": True})

    def validation_step(self, batch, batch_idx):
        self.log("val/rank", float(self.global_rank), sync_dist=True)
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def train_dataloader(self):
        return DataLoader(loader(8).dataset, batch_size=4)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    start_logging("two", "p", ["tensorboard", "clearml"], config={"save_dir": str(folder), "metrics_interval": 60})
    trainer = TrainerConfig(
        accelerator="cpu",
        devices=2,
        strategy=sys.argv[2],
        max_epochs=2,
        log_every_n_steps=1,
        checkpoint={"dirpath": str(folder / "checkpoints"), "monitor": "val_loss"},
        early_stopping={"monitor": "val_loss", "patience": 5},
        ema=EMAConfig(decay=0.9) if sys.argv[2] == "ddp" else None,  # which spawned processes cannot be handed
        additional_trainer_kwargs={"enable_progress_bar": False, "enable_model_summary": False},
    ).create_trainer()
    model = Ranked()
    trainer.fit(model, model.train_dataloader(), loader(4))
    stop_logging()
    weights = {name: parameter.sum().item() for name, parameter in model.named_parameters()}
    done = {"world": trainer.world_size, "steps": trainer.global_step, "weights": weights, "rank": trainer.global_rank}
    (folder / f"rank_{trainer.global_rank}_{os.getpid()}.json").write_text(json.dumps(done))
