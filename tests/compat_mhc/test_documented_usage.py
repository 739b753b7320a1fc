"""Every example of the published documentation, word for word with `mhc` as `mhc_torch`, runs and does what it says.

Filled in is only what the documents leave open: imports they take for granted, data, `...`, an end to training.
"""
# The documents have a style of their own.
# ruff: noqa: E402, F811, F841, I001

import os
import socket

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mhc_torch import MHCSequential, check_model_stability, extract_mixing_weights, inject_mhc, plot_mixing_weights
from mhc_torch.utils import plot_gradient_flow
from tests.mhc_torch import readers

BRIEF = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def data(width, samples=8):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(samples, width), torch.randint(width, (samples,))), batch_size=4)


# Document 000, "Full Integration Example".
# fmt: off
class HoneyBadgerModule(L.LightningModule):
    def __init__(self, channels=64, depth=50):
        super().__init__()
        # 1. Define mHC segments
        self.net = MHCSequential(
            [nn.Linear(channels, channels) for _ in range(depth)],
            max_history=4,
            mode="mhc"
        )
        self.loss_fn = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        # MHCSequential handles the history pointers behind the scenes
        preds = self.net(x)
        loss = self.loss_fn(preds, y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)
# fmt: on


def test_000_real_time_stability_dashboard(tmp_path):
    # fmt: off
    from mhc_torch.utils import MHCLightningCallback
    import lightning as L

    mhc_callback = MHCLightningCallback(
        log_mixing_weights=True,  # Visualizes heatmaps of history use
        log_entropy=True,         # Measures "specialization" of layers
        log_gradients=True        # Monitors the "History Highway" health
    )

    # fmt: on
    trainer = L.Trainer(callbacks=[mhc_callback], logger=TensorBoardLogger(tmp_path, "", ""), **BRIEF)
    trainer.fit(HoneyBadgerModule(), data(64))
    scalars, pictures = readers.tensorboard(tmp_path)
    assert pictures.keys() == {0}
    for depth in range(50):
        layer = f"mhc/net.skip_layers.{depth}"
        alpha = [scalars[f"{layer}/alpha_{i}"][0] for i in range(max(3 - depth, 0), 4)]
        assert sum(alpha) == pytest.approx(1, abs=1e-5)
        assert alpha[-1] > 0.99, "at the start the model behaves like a standard ResNet"
        assert 0 <= scalars[f"{layer}/entropy"][0] < 0.01
        assert scalars[f"{layer}/grad_norm"][0] > 0


def test_000_full_integration_example(tmp_path):
    from mhc_torch import MHCLightningCallback

    train_loader = data(64)
    # Start training with the stability watchdog
    mhc_watchdog = MHCLightningCallback()
    trainer = L.Trainer(callbacks=[mhc_watchdog], default_root_dir=tmp_path, **BRIEF)
    module = HoneyBadgerModule()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer.fit(module, train_loader)
    still = [name for name, p in module.named_parameters() if torch.equal(p, before[name])]
    assert still == ["net.skip_layers.0.mixing_logits"], "layer 0 has one state: its weight is 1 whatever the logits"


def train_on_two_ranks(rank, port, folder):
    """One process of test_000_multi_gpu_and_distributed_training."""
    from mhc_torch import MHCLightningCallback

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "PL_GLOBAL_SEED": "0"}
    torch.set_num_threads(1)
    L.seed_everything(0)
    settings = BRIEF | {"logger": TensorBoardLogger(folder, "", "")}
    callback = MHCLightningCallback(log_interval=1, log_gradients=True)
    trainer = L.Trainer(strategy="ddp", devices=2, callbacks=[callback], **settings)
    module = HoneyBadgerModule(channels=8, depth=5)
    trainer.fit(module, data(8, samples=16))
    torch.save({"world": trainer.world_size, "state": module.state_dict()}, f"{folder}/rank{rank}.pt")


def test_000_multi_gpu_and_distributed_training(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_on_two_ranks, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["world"] == second["world"] == 2
    for name, value in first["state"].items():
        torch.testing.assert_close(second["state"][name], value, rtol=0, atol=0)
    assert len(list(tmp_path.glob("events*"))) == 1, "one set of charts"
    scalars, pictures = readers.tensorboard(tmp_path)
    # 16 samples in batches of 4 on two ranks are two steps.
    assert pictures.keys() == scalars["mhc/net.skip_layers.4/entropy"].keys() == {0, 1}
    assert len(scalars["mhc/net.skip_layers.4/grad_norm"]) == 2


# Document 001.
def test_001_injection_signature():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    injected = inject_mhc(
        module=model,
        target_types=nn.Linear,
        target_class_name=None,
        max_history=3,
        mode="mhc",
        detach_history=True,
    )
    assert injected(torch.randn(2, 4)).shape == (2, 4)
    weights = extract_mixing_weights(injected)
    assert len(weights) == 2
    assert all(alpha.sum() == pytest.approx(1) for alpha in weights.values())


def test_001_injection_by_class_name():
    class BertLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(4, 4)

        def forward(self, x):
            return self.dense(x).tanh()

    model = inject_mhc(nn.Sequential(BertLayer(), BertLayer()), target_class_name="BertLayer")
    model(torch.randn(2, 4)).sum().backward()
    assert len(extract_mixing_weights(model)) == 2


def test_001_visualization_and_stability():
    model = MHCSequential([nn.Linear(4, 4) for _ in range(5)], max_history=3)
    assert [len(alpha) for alpha in extract_mixing_weights(model).values()] == [1, 2, 3, 3, 3]
    axes = plot_mixing_weights(model).axes[0]
    assert "history index" in axes.get_xlabel()
    assert "depth" in axes.get_ylabel()
    assert plot_gradient_flow(model).axes
    assert check_model_stability(model)


def test_001_callback_features():
    from mhc_torch.utils import MHCLightningCallback

    for backend in ("wandb", "tensorboard"):
        callback = MHCLightningCallback(log_weights=True, log_entropy=True, logging_backend=backend)
        assert callback.log_mixing_weights


# Document 002, "The @mhc_compatible Decorator".
from mhc_torch import mhc_compatible, MHCSkip


@mhc_compatible
class MySuperLayer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # 1. Add the mixing engine
        self.skip = MHCSkip(max_history=4)
        self.layer = nn.Linear(dim, dim)

    def forward(self, x, history=None):
        # 2. Main transformation
        residual = x
        x = self.layer(x)
        # 3. Apply mHC mix
        # Note: 'history' is typically passed down by the container
        x = self.skip(x, history or [])
        return x


def test_002_a_compatible_layer_is_mixed_shown_and_not_injected():
    layer, x = MySuperLayer(4), torch.randn(2, 4)
    torch.testing.assert_close(layer(x), layer.layer(x))
    torch.testing.assert_close(layer(x, [x]), layer.layer(x) + x)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    assert list(extract_mixing_weights(model)) == ["1.skip"]
    inject_mhc(model, nn.Linear)
    assert not hasattr(layer.layer, "mhc_skip")
    assert hasattr(model[0], "mhc_skip")
    layer.clear_history()


# Document 002, "The Manual Buffer Loop".
from mhc_torch import HistoryBuffer, MHCSkip


class MyNonSequentialModel(nn.Module):
    def __init__(self):
        super().__init__()
        # Create a buffer for tracking the last 4 feature maps
        self.buffer = HistoryBuffer(max_history=4)
        self.skip = MHCSkip(max_history=4)
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        # 1. Fetch current history from the buffer
        hist = self.buffer.get()
        # 2. Transform input and apply the skip
        out = self.layer(x)
        out = self.skip(out, hist)
        # 3. Update the buffer with the new state
        # This will automatically evict the oldest state if count > max_history
        self.buffer.append(out)
        return out


def test_002_the_manual_buffer_loop():
    model, x = MyNonSequentialModel(), torch.randn(2, 64)
    outputs = [model(x) for _ in range(6)]
    assert len(model.buffer) == 4
    for kept, out in zip(model.buffer.get(), outputs[2:], strict=True):
        assert kept is out
    torch.testing.assert_close(outputs[0], model.layer(x))
    torch.testing.assert_close(outputs[1], model.layer(x) + outputs[0])


# Document 002, "The Auto-Reset Pattern".
class Training(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = mhc_compatible(type("Compatible", (MyNonSequentialModel,), {}))()

    def training_step(self, batch, batch_idx):
        # CRITICAL: Always clear history at the start of a training sample
        self.model.clear_history()
        x, y = batch
        preds = self.model(x)
        loss = F.cross_entropy(preds, y)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_002_the_auto_reset_pattern():
    module = Training()
    L.Trainer(logger=False, **BRIEF).fit(module, data(64))
    assert len(module.model.buffer) == 1, "no state of an earlier batch is left"
