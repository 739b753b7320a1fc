"""The dashboard in every tracker: one training run with all loggers at once, read back from what each of them wrote."""

import math

import numpy as np
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from mhc_torch import MHCLightningCallback
from tests.mhc_torch import readers
from tests.mhc_torch.lightning_models import Classifier, loader, trainer

HEATMAP = "mhc/mixing_weights"
LAYERS = [f"net.skip_layers.{i}" for i in range(5)]


class Witness(Callback):
    """Independent record of logits and gradients at every optimizer step."""

    def __init__(self):
        self.logits, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        skips, branches = pl_module.net.skip_layers, pl_module.net.wrapped_modules
        self.logits.append([skip.mixing_logits.detach().double().numpy().copy() for skip in skips])
        self.gradients.append(
            [math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in branch.parameters())) for branch in branches]
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps, a chart at every second; returns the witness and (scalars, pictures) of each backend."""
    folder = tmp_path_factory.mktemp("runs")
    witness = Witness()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMET_START_ONLINE", "0")
        patch.setenv("COMET_INTERNAL_SENTRY_DSN", "")
        uri = f"sqlite:///{folder}/mlflow.db"
        mlflow = MLFlowLogger("mhc", tracking_uri=uri, artifact_location=str(folder / "artifacts"))
        comet = CometLogger(project="mhc", workspace="local", offline_directory=str(folder / "comet"))
        wandb = WandbLogger(project="mhc", save_dir=folder, offline=True)
        loggers = [TensorBoardLogger(folder, "tb", ""), CSVLogger(folder, "csv", ""), wandb, mlflow, comet]
        dashboard = MHCLightningCallback(log_gradients=True, log_interval=2)
        trainer(logger=loggers, callbacks=[dashboard, witness]).fit(Classifier(constraint="sparse"), loader(4))
        wandb.experiment.finish()
        comet.experiment.end()
    return witness, {
        "tensorboard": readers.tensorboard(folder / "tb"),
        "csv": readers.csv_file(folder / "csv", HEATMAP),
        "wandb": readers.wandb_offline(folder, HEATMAP),
        "mlflow": readers.mlflow_store(uri, mlflow.run_id, folder),
        "comet": readers.comet_archive(folder / "comet", HEATMAP),
    }


BACKENDS = ["tensorboard", "csv", "wandb", "mlflow", "comet"]


def sparse_simplex(logits):
    """Euclidean projection by trying every support size."""
    ordered = sorted(logits, reverse=True)
    threshold = max((sum(ordered[:k]) - 1) / k for k in range(1, len(ordered) + 1))
    return [max(v - threshold, 0.0) for v in logits]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalars_are_those_of_the_network_at_that_step(run, backend):
    witness, written = run
    scalars, _ = written[backend]
    for step in (0, 2):
        for depth, layer in enumerate(LAYERS):
            live = min(depth + 1, 3)
            alpha = sparse_simplex(witness.logits[step][depth][-live:])
            logged = [scalars[f"mhc/{layer}/alpha_{i}"][step] for i in range(3 - live, 3)]
            assert logged == pytest.approx(alpha, abs=1e-6)
            assert not {f"mhc/{layer}/alpha_{i}" for i in range(3 - live)} & scalars.keys()
            entropy = -sum(a * math.log(a) for a in alpha if a > 0)
            assert scalars[f"mhc/{layer}/entropy"][step] == pytest.approx(entropy, abs=1e-6)
            assert scalars[f"mhc/{layer}/grad_norm"][step] == pytest.approx(witness.gradients[step][depth], rel=1e-4)
            assert (scalars[f"mhc/{layer}/logits_grad_norm"][step] > 0) == (live > 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_those_of_the_interval(run, backend):
    scalars, pictures = run[1][backend]
    assert {step for key, series in scalars.items() if key.startswith("mhc/") for step in series} == {0, 2}
    assert pictures.keys() == {0, 2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_shows_the_same_heatmap(run, backend):
    _, written = run
    for step in (0, 2):
        np.testing.assert_array_equal(written[backend][1][step], written["tensorboard"][1][step])


def test_steps_agree_with_those_of_the_users_own_metrics(run):
    scalars, _ = run[1]["tensorboard"]
    assert scalars["train_loss"].keys() == {0, 1, 2, 3}
