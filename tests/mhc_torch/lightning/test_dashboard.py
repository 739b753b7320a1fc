"""MHCLightningCallback under a real Trainer: when it clears, when and what it logs, what it must not change."""

import copy
import math
import threading
import time

import lightning as L
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn

from mhc_torch import HistoryBuffer, MHCBasicBlock, MHCConv2d, MHCLightningCallback, inject_mhc, plot_mixing_weights
from tests.mhc_torch import readers
from tests.mhc_torch.lightning_models import WIDTH, Classifier, blocks, loader, trainer


def dashboard_of(folder, model=None, batches=4, callback=None, **settings):
    """Train with a TensorBoard logger; returns the scalars and pictures that were written."""
    callback = callback or MHCLightningCallback(log_interval=1)
    callbacks = [callback, *settings.pop("callbacks", [])]
    model = model or Classifier()
    trainer(logger=TensorBoardLogger(folder, "", ""), callbacks=callbacks, **settings).fit(model, loader(batches))
    return readers.tensorboard(folder)


def module_of(lightning, lr):
    """The stack of `Classifier` in a module of either package."""

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Classifier().net

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=lr)

    return Module()


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Keeps(Classifier):
    """A module that keeps states from batch to batch, in its own list and in a buffer deep inside."""

    def __init__(self):
        super().__init__()
        self.kept = []
        self.inner = nn.Sequential(nn.ModuleDict({"buffer": HistoryBuffer()}))
        self.seen = []

    def clear_history(self):
        self.kept.clear()

    def forward(self, x):
        buffer = self.inner[0]["buffer"]
        self.seen.append((self.trainer.state.stage.value, len(self.kept), len(buffer)))
        self.kept.append(x)
        buffer.append(x)
        return super().forward(x)


def test_history_is_empty_at_the_start_of_every_kind_of_batch():
    # Published 0.5.5: no predict hook, and buffers outside of MHCSequential are never cleared.
    model, t = Keeps(), trainer(callbacks=[MHCLightningCallback()])
    t.fit(model, loader(2), loader(2))
    t.test(model, loader(2), verbose=False)
    t.predict(model, loader(2))
    assert {stage for stage, *_ in model.seen} == {"sanity_check", "train", "validate", "test", "predict"}
    assert {kept for _, *kept in model.seen for kept in kept} == {0}


def test_conv_blocks_and_nested_injected_models_are_cleared():
    # Published 0.5.5: conv blocks keep their history, and of injected models only the outermost is cleared.
    inner = inject_mhc(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear, clear_on_forward=False)
    model = nn.Sequential(MHCConv2d(1, 2, 3), MHCBasicBlock(2, 2), nn.ModuleDict({"deep": inner}))
    inner(torch.ones(2, 4))
    buffers = [m for m in model.modules() if isinstance(m, HistoryBuffer)]
    for buffer in buffers:
        buffer.append(torch.ones(1))
    assert sum(len(buffer) for buffer in buffers) > len(buffers)
    module = L.LightningModule()
    module.model = model
    for stage in ("train", "validation", "test", "predict"):
        buffers[0].append(torch.ones(1))
        getattr(MHCLightningCallback(), f"on_{stage}_batch_start")(trainer(), module, None, 0)
        assert [len(buffer) for buffer in buffers] == [0] * len(buffers)


@pytest.mark.parametrize(
    ("settings", "interval", "steps"),
    [
        ({}, 1, {0, 1, 2, 3, 4, 5}),
        ({}, 4, {0, 4}),
        ({}, 50, {0}),
        ({"accumulate_grad_batches": 2}, 1, {0, 1, 2}),
        ({"max_epochs": 2}, 5, {0, 5, 10}),
    ],
)
def test_the_interval_counts_optimizer_steps(tmp_path, settings, interval, steps):
    callback = MHCLightningCallback(log_interval=interval)
    scalars, pictures = dashboard_of(tmp_path, batches=6, callback=callback, **settings)
    assert set(scalars["mhc/net.skip_layers.2/entropy"]) == steps
    assert set(pictures) == steps


def test_gradients_are_logged_as_they_are_before_clipping(tmp_path):
    class Norms(L.Callback):
        found = ()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            flat = [p.grad.double().numpy().ravel() for p in pl_module.net.wrapped_modules[1].parameters()]
            self.found = (*self.found, np.linalg.norm(np.concatenate(flat)))

    norms = Norms()
    scalars, _ = dashboard_of(
        tmp_path,
        callback=MHCLightningCallback(log_gradients=True, log_interval=1),
        callbacks=[norms],
        gradient_clip_val=1e-4,
        accumulate_grad_batches=2,
    )
    logged = scalars["mhc/net.skip_layers.1/grad_norm"]
    assert [logged[step] for step in range(2)] == pytest.approx(list(norms.found), rel=1e-5)
    assert min(logged.values()) > 1e-3


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, {"alpha_2", "entropy"}),
        ({"log_mixing_weights": False}, {"entropy"}),
        ({"log_weights": False}, {"entropy"}),
        ({"log_entropy": False}, {"alpha_2"}),
        ({"log_weights": False, "log_entropy": False, "log_gradients": True}, {"grad_norm", "logits_grad_norm"}),
        ({"log_weights": False, "log_entropy": False}, set()),
    ],
)
def test_what_is_logged_can_be_chosen(tmp_path, switches, expected):
    callback = MHCLightningCallback(log_interval=1, prefix="history", **switches)
    scalars, pictures = dashboard_of(tmp_path, batches=1, callback=callback)
    first = "history/net.skip_layers.0/"
    assert {key.removeprefix(first) for key in scalars if key.startswith(first)} == expected
    assert bool(pictures) == ("alpha_2" in expected)


def test_one_backend_can_be_chosen(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / "tb", "", ""), CSVLogger(tmp_path / "csv", "", "")]
    callback = MHCLightningCallback(log_interval=1, logging_backend="csv")
    trainer(logger=loggers, callbacks=[callback]).fit(Classifier(), loader(1))
    assert not [key for key in readers.tensorboard(tmp_path / "tb")[0] if key.startswith("mhc/")]
    assert "mhc/net.skip_layers.0/entropy" in readers.csv_file(tmp_path / "csv", "mhc/mixing_weights")[0]


def test_a_backend_that_the_trainer_does_not_have_is_warned_about(tmp_path):
    callback = MHCLightningCallback(logging_backend="wandb")
    with pytest.warns(UserWarning, match="no wandb logger"):
        trainer(logger=CSVLogger(tmp_path), callbacks=[callback]).fit(Classifier(), loader(1))


class Numbers(Logger):
    name, version = "numbers", 0

    def __init__(self):
        super().__init__()
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics.update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class Pictures(Numbers):
    """Takes its time for every picture, and fails at one of the steps."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.taken, self.fails_at = [], fails_at

    def log_image(self, key, images, step):
        time.sleep(0.01)
        if step == self.fails_at:
            raise OSError("no space left for pictures")
        self.taken.append((step, threading.current_thread() is threading.main_thread()))


def test_pictures_are_drawn_beside_the_training_all_of_them_and_in_order():
    logger, callback = Pictures(), MHCLightningCallback(log_interval=1)
    trainer(logger=logger, callbacks=[callback]).fit(Classifier(), loader(5))
    assert logger.taken == [(step, False) for step in range(5)]
    trainer(logger=logger, callbacks=[copy.deepcopy(callback)]).fit(Classifier(), loader(1))
    assert logger.taken[5:] == [(0, False)]


@pytest.mark.parametrize("step", [1, 4])
def test_a_picture_that_cannot_be_logged_ends_the_training_as_a_number_does(step):
    logger = Pictures(fails_at=step)
    with pytest.raises(OSError, match="no space left for pictures"):
        trainer(logger=logger, callbacks=[MHCLightningCallback(log_interval=1)]).fit(Classifier(), loader(5))
    assert len(logger.taken) == step


def test_the_last_picture_of_a_training_that_fails_is_logged():
    class Fails(Classifier):
        def training_step(self, batch, index):
            if index == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, index)

    logger = Pictures()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(logger=logger, callbacks=[MHCLightningCallback(log_interval=1)]).fit(Fails(), loader(5))
    assert [step for step, _ in logger.taken] == [0, 1]


def test_a_logger_without_pictures_gets_the_numbers_and_a_warning():
    logger = Numbers()
    with pytest.warns(UserWarning, match="Numbers takes no pictures"):
        trainer(logger=logger, callbacks=[MHCLightningCallback()]).fit(Classifier(), loader(1))
    assert logger.metrics["mhc/net.skip_layers.1/alpha_1"] == 0.5


def test_the_dashboard_does_not_change_training(tmp_path):
    plain, watched = Classifier(), Classifier()
    trainer().fit(plain, loader())
    dashboard_of(tmp_path, watched, callback=MHCLightningCallback(log_gradients=True, log_interval=1))
    for name, parameter in parameters(plain).items():
        torch.testing.assert_close(parameters(watched)[name], parameter, rtol=0, atol=0)


def test_bfloat16_autocast(tmp_path):
    scalars, pictures = dashboard_of(tmp_path, precision="bf16-mixed")
    alpha = [scalars[f"mhc/net.skip_layers.4/alpha_{i}"][3] for i in range(3)]
    assert sum(alpha) == pytest.approx(1, abs=1e-6)
    assert set(pictures) == {0, 1, 2, 3}


@pytest.mark.usefixtures("unchecked")
def test_a_compiled_module_has_the_keys_and_weights_of_a_plain_one(tmp_path):
    plain, _ = dashboard_of(tmp_path / "plain")
    model = Classifier(wrap=lambda net: torch.compile(net, backend="aot_eager", fullgraph=True))
    compiled, pictures = dashboard_of(tmp_path / "compiled", model)
    assert compiled.keys() == plain.keys()
    for key in plain:
        assert list(compiled[key].values()) == pytest.approx(list(plain[key].values()), abs=1e-4)
    assert set(pictures) == {0, 1, 2, 3}


def test_moving_averages_of_the_weights_neither_disturb_nor_are_shown(tmp_path):
    plain, _ = dashboard_of(tmp_path / "plain")
    model = Classifier()
    averaged, _ = dashboard_of(tmp_path / "ema", model, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert averaged == plain
    unaveraged = Classifier()
    trainer().fit(unaveraged, loader())
    assert not torch.equal(model.net.skip_layers[2].mixing_logits, unaveraged.net.skip_layers[2].mixing_logits)


def test_training_goes_on_where_a_checkpoint_stopped(tmp_path):
    settings = {"max_epochs": 1, "callbacks": [MHCLightningCallback(log_interval=3)]}
    first = trainer(**settings)
    first.fit(Classifier(), loader(4))
    first.save_checkpoint(tmp_path / "model.ckpt")
    second = trainer(**settings | {"max_epochs": 2}, logger=TensorBoardLogger(tmp_path, "tb", ""))
    second.fit(Classifier(), loader(4), ckpt_path=tmp_path / "model.ckpt", weights_only=False)
    assert set(readers.tensorboard(tmp_path / "tb")[1]) == {6}


def test_it_works_under_pytorch_lightning_too(tmp_path):
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, "", "")
    pytorch_lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[MHCLightningCallback(log_interval=2)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(module_of(pytorch_lightning, lr=0.1), loader(4))
    scalars, pictures = readers.tensorboard(tmp_path)
    assert set(scalars["mhc/net.skip_layers.2/entropy"]) == set(pictures) == {0, 2}


def test_injected_models_and_fast_dev_run():
    model = Classifier()
    model.net = inject_mhc(nn.Sequential(*blocks(3)), nn.Linear)
    trainer(callbacks=[MHCLightningCallback(log_interval=1, log_gradients=True)], fast_dev_run=True).fit(
        model, loader()
    )


def test_a_model_without_history_trains_without_a_dashboard(tmp_path):
    model = Classifier()
    model.net = nn.Linear(WIDTH, WIDTH)
    with pytest.warns(UserWarning, match="found no mixing layer in Classifier"):
        scalars, pictures = dashboard_of(tmp_path, model)
    assert not [key for key in scalars if key.startswith("mhc/")]
    assert not pictures


def test_entropy_starts_at_log_k_under_uniform_weights(tmp_path):
    scalars, _ = dashboard_of(tmp_path, batches=1)
    for depth in range(5):
        entropy = scalars[f"mhc/net.skip_layers.{depth}/entropy"][0]
        assert entropy == pytest.approx(math.log(min(depth + 1, 3)), abs=1e-6)


@pytest.mark.parametrize(("depth", "history"), [(5, 3), (2, 4)])
def test_alpha_is_numbered_by_the_column_of_the_heatmap(tmp_path, depth, history):
    model = Classifier(depth=depth, max_history=history)
    scalars, _ = dashboard_of(tmp_path, model, batches=1)
    shown = plot_mixing_weights(model).axes[0].images[0].get_array()
    columns = [[i for i, weight in enumerate(row) if not np.isnan(weight)] for row in np.ma.filled(shown, np.nan)]
    pattern = "mhc/net.skip_layers.{}/alpha_{}"
    assert {key for key in scalars if "alpha_" in key} == {
        pattern.format(layer, i) for layer, row in enumerate(columns) for i in row
    }
    assert scalars[pattern.format(0, columns[-1][-1])] == {0: 1.0}


def entropies(trainer):
    return {key: float(value) for key, value in trainer.callback_metrics.items() if key.endswith("/entropy")}


def test_callback_metrics_hold_the_dashboard_without_a_logger_and_until_the_next_time():
    # Four optimizer steps an epoch, and the only measurement is the first step's.
    t = trainer(max_epochs=2, callbacks=[MHCLightningCallback(log_interval=100, log_gradients=True)])
    t.fit(Classifier(), loader(4), loader(1))
    found = entropies(t)
    assert list(found.values()) == pytest.approx([math.log(min(depth + 1, 3)) for depth in range(5)])
    assert t.callback_metrics["mhc/net.skip_layers.4/grad_norm"] > 0
    assert t.callback_metrics["mhc/net.skip_layers.0/alpha_2"] == 1
    assert {"train_loss", "val_loss"} <= t.callback_metrics.keys()
    assert not [key for key in t.logged_metrics if key.startswith("mhc/")], "they would be logged twice"


@pytest.mark.parametrize("lightning", [L, pytorch_lightning])
def test_early_stopping_on_an_entropy(lightning):
    key = "mhc/net.skip_layers.4/entropy"
    stop = lightning.pytorch.callbacks if lightning is L else lightning.callbacks
    stop = stop.EarlyStopping(key, mode="max", patience=0, check_on_train_epoch_end=True)

    t = lightning.Trainer(
        accelerator="cpu",
        max_epochs=9,
        logger=False,
        callbacks=[stop, MHCLightningCallback(log_interval=4)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    t.fit(module_of(lightning, lr=0.5), loader(4))
    # It starts at its maximum, log 3, so the second epoch cannot be better than the first.
    assert stop.stopped_epoch == 1
    assert 0 < float(t.callback_metrics[key]) < math.log(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_interval": 0}, "log_interval must be at least 1 step, got 0"),
        ({"logging_backend": "tensorbord"}, "logging_backend must be None or one of tensorboard.*'tensorbord'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MHCLightningCallback(**settings)
