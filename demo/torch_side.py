"""The PyTorch side: the same network from `mhc_torch`, trained by Lightning with the callback and TensorBoard files."""

import logging
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from demo.data import CLASSES, PIXELS, Split, epoch_batches
from demo.record import Run
from demo.settings import DEPTH, EPOCHS, LEARNING_RATE, MIXING, STEPS_PER_EPOCH, WIDTH, WINDOW, decay
from mhc_torch import MHCSequential
from mhc_torch.utils import MHCLightningCallback, extract_mixing_weights


class Block(nn.Module):
    """One branch: normalize, mix the features, bend."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        return functional.gelu(self.linear(self.norm(x)))


class Classifier(nn.Module):
    """Digits from pixels: embedding, `DEPTH` blocks with history mixing, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, WIDTH)
        self.body = MHCSequential((Block(WIDTH) for _ in range(DEPTH)), **MIXING)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Float[Tensor, "batch 64"]) -> Float[Tensor, "batch 10"]:
        return self.head(self.norm(self.body(self.embed(images))))


class Digits(L.LightningModule):
    """The classifier with its loss and its optimizer, as Lightning wants them."""

    def __init__(self, net: Classifier) -> None:
        super().__init__()
        self.net = net
        self.losses: list[Tensor] = []
        self.accuracies: list[float] = []

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch.images), batch.digits)
        self.losses.append(loss.detach())
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Split, batch_idx: int) -> None:
        accuracy = (self.net(batch.images).argmax(-1) == batch.digits).float().mean()
        self.accuracies.append(accuracy.item())
        self.log("accuracy", accuracy, prog_bar=True, batch_size=len(batch.digits))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer, schedule = make_optimizer(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Epochs(IterableDataset):
    """The batches that the JAX side gets, epoch after epoch."""

    def __init__(self, split: Split) -> None:
        self.split, self.epoch = split, 0

    def __iter__(self) -> Iterator[Split]:
        yield from map(as_tensors, epoch_batches(self.split, self.epoch))
        self.epoch += 1

    def __len__(self) -> int:
        return STEPS_PER_EPOCH


def as_tensors(split: Split) -> Split:
    """The same images and digits as tensors."""
    return Split(torch.from_numpy(split.images), torch.from_numpy(split.digits))


def cross_entropy(logits: Float[Tensor, "batch 10"], digits: Int[Tensor, "batch"] | Int[np.ndarray, "batch"]) -> Tensor:
    return functional.cross_entropy(logits, torch.as_tensor(digits).long())


def make_optimizer(net: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    return optimizer, LambdaLR(optimizer, decay)


def take_steps(net: Classifier, batches: Iterable[Split]) -> Classifier:
    """Takes one optimizer step on each batch, in place."""
    optimizer, schedule = make_optimizer(net)
    for images, digits in batches:
        optimizer.zero_grad()
        cross_entropy(net(torch.from_numpy(images)), digits).backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def predict(net: Classifier, images: Float[np.ndarray, "items 64"]) -> Int[np.ndarray, "items"]:
    return net(torch.from_numpy(images)).argmax(-1).numpy()


def train(name: str, net: Classifier, train_split: Split, test_split: Split, logs: Path) -> Run:
    """Trains `net` in place for `EPOCHS` epochs; what the report shows of it is read from the TensorBoard files."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    logger = TensorBoardLogger(logs.parent, name=logs.name, version="")
    module = Digits(net)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=logger,
        callbacks=[MHCLightningCallback(log_gradients=True, log_interval=20)],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    held_out: DataLoader = DataLoader([as_tensors(test_split)], batch_size=None)  # type: ignore[arg-type]
    started = time.perf_counter()
    trainer.fit(module, DataLoader(Epochs(train_split), batch_size=None), held_out)
    seconds = time.perf_counter() - started
    layers = list(extract_mixing_weights(module))
    steps, entropy = _series(logs, [f"mhc/{layer}/entropy" for layer in layers])
    _, gradient_norms = _series(logs, [f"mhc/{layer}/grad_norm" for layer in layers])
    return Run(
        name=name,
        losses=torch.stack(module.losses).numpy(),
        accuracies=np.array(module.accuracies),
        seconds=seconds,
        gradient_norms=gradient_norms[0],
        weights=np.array([_padded(weights) for weights in extract_mixing_weights(module).values()]),
        entropy_steps=steps,
        entropy=entropy,
    )


def _series(logs: Path, tags: list[str]) -> tuple[Int[np.ndarray, "points"], Float[np.ndarray, "points layers"]]:
    """The steps and values of scalars in a TensorBoard folder."""
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0})
    events.Reload()
    scalars = [events.Scalars(tag) for tag in tags]
    steps = np.array([point.step for point in scalars[0]])
    return steps, np.array([[point.value for point in scalar] for scalar in scalars]).T


def _padded(weights: Float[Tensor, "live"]) -> Float[np.ndarray, "window"]:
    """Live weights with the latest state in the last column, as the JAX side has them."""
    return np.pad(weights.numpy(), (WINDOW - len(weights), 0))
