"""The same experiment from JAX and from Lightning: one network, one batch, the same numbers under the same keys."""

import lightning as L
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bridge
from mhc_jax.monitoring.diagnostics import diagnose
from mhc_jax.nn import MHCStack
from mhc_jax.training import TrainState, make_train_step, train
from mhc_torch import MHCLightningCallback, MHCSequential
from mhc_torch.tracking import start_logging
from tests.mhc_torch import readers
from tests.mhc_torch.lightning_models import trainer

DEPTH, WIDTH = 5, 4
SETTINGS = {"max_history": 3, "init": "uniform", "use_gating": True}
HEATMAP = "mhc/mixing_weights"


class JaxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.net = MHCStack(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), depth=DEPTH, rngs=rngs, **SETTINGS)

    def __call__(self, x):
        return self.net(x)


class TorchModel(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = MHCSequential([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)], **SETTINGS)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = (self(batch[0]) ** 2).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What both frameworks wrote to TensorBoard and ClearML during three updates, every second one reported."""
    folder = tmp_path_factory.mktemp("runs")
    x = np.random.default_rng(0).normal(size=(3, 8, WIDTH)).astype(np.float32)
    source, target = JaxModel(), TorchModel()
    bridge.convert(source, target)

    def config(name):
        return {"save_dir": str(folder / name), "track_git": False, "metrics_interval": 60}

    with start_logging("n", "p", ["tensorboard", "clearml"], config=config("jax")) as experiment:
        optimizer = optax.sgd(0.05)
        step = make_train_step(lambda model, batch: ((model(batch) ** 2).mean(), {}), optimizer, diagnose=diagnose)
        state = TrainState.create(source, optimizer)
        train(state, step, list(x), tracker=experiment, log_interval=2, hyperparams={"depth": DEPTH})
    with start_logging("n", "p", ["tensorboard", "clearml"], config=config("torch")):
        data = DataLoader(TensorDataset(torch.from_numpy(x.reshape(-1, WIDTH))), batch_size=8)
        callback = MHCLightningCallback(log_gradients=True, log_interval=2)
        trainer(callbacks=[callback], log_every_n_steps=1).fit(target, data)
    return {
        name: (
            readers.tensorboard(folder / name / "tensorboard/p/n/version_0"),
            readers.clearml_session(folder / name / "clearml", HEATMAP),
            readers.clearml_parameters(folder / name / "clearml"),
        )
        for name in ("jax", "torch")
    }


@pytest.mark.parametrize("backend", [0, 1], ids=["tensorboard", "clearml"])
def test_the_dashboards_have_the_same_keys_steps_and_values(written, backend):
    ours, theirs = (
        {key: series for key, series in written[name][backend][0].items() if key.startswith("mhc/")}
        for name in ("jax", "torch")
    )
    assert ours.keys() == theirs.keys()
    assert {"mhc/net/gain_forward", "mhc/net/gain_backward", "mhc/net.skip_layers.4/alpha_2"} <= ours.keys()
    for key, series in theirs.items():
        assert ours[key].keys() == series.keys() == {0, 2}
        assert list(ours[key].values()) == pytest.approx(list(series.values()), rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("backend", [0, 1], ids=["tensorboard", "clearml"])
def test_so_have_the_heatmaps(written, backend):
    ours, theirs = written["jax"][backend][1], written["torch"][backend][1]
    assert ours.keys() == theirs.keys() == {0, 2}
    for step in (0, 2):
        assert np.abs(ours[step].astype(float) - theirs[step]).mean() < 0.1


def test_the_loop_logs_its_own_metrics_parameters_and_the_machine(written):
    scalars, _ = written["jax"][0]
    losses = written["torch"][0][0]["train/loss"]
    assert scalars["train/loss"] == pytest.approx({step: losses[step] for step in (0, 2)}, rel=1e-4)
    assert scalars["train/grad_norm"].keys() == {0, 2}
    assert scalars["system/cpu_percent"].keys() == {0}
    assert written["jax"][2]["depth"] == str(DEPTH)


def test_gains_are_those_of_a_product_written_out(written):
    scalars, _ = written["torch"][0]
    product = np.eye(3)
    gates = 1 / (1 + np.exp(-2.0))  # the gate's initial logit
    for layer in range(DEPTH):
        live = min(layer + 1, 3)
        matrix = np.zeros((3, 3))
        matrix[0, 1] = matrix[1, 2] = 1
        matrix[2, 3 - live :] = gates / live
        product = matrix @ product
    assert scalars["mhc/net/gain_forward"][0] == pytest.approx(np.abs(product).sum(1).max(), rel=1e-6)
    assert scalars["mhc/net/gain_backward"][0] == pytest.approx(np.abs(product).sum(0).max(), rel=1e-6)


def test_a_tracker_of_ones_own_and_bad_input():
    class Own:
        def __init__(self):
            self.seen = []

        def log_metrics(self, metrics, step):
            self.seen.append((step, sorted(metrics)))

        def log_hyperparams(self, params):
            self.seen.append(params)

    optimizer, own = optax.sgd(0.1), Own()
    state = TrainState.create(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optimizer)
    step = make_train_step(lambda model, x: ((model(x) ** 2).mean(), {"by": {"row": x.sum()}}), optimizer)
    state = train(state, step, [np.eye(2)] * 2, tracker=own, log_interval=1, hyperparams={"lr": 0.1})
    names = ["train/by/row", "train/grad_norm", "train/loss"]
    assert own.seen == [{"lr": 0.1}, (0, names), (1, names)]
    state = train(state, step, [np.eye(2)], tracker=own, log_interval=3)
    assert len(own.seen) == 3, "update 2 is not a third one: the count goes on where the state was"
    with pytest.raises(ValueError, match="log_interval must be at least 1 update, got 0"):
        train(state, step, [], log_interval=0)
    rows = make_train_step(lambda model, x: ((model(x) ** 2).mean(), {"rows": x.sum(1)}), optimizer)
    with pytest.raises(ValueError, match=r"metric 'rows' has shape \(2,\)"):
        train(state, rows, [np.eye(2)], tracker=own, log_interval=1)
