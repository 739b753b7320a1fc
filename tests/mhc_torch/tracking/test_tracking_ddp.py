"""Two real processes under DDP, made by TrainerConfig: one run in every backend, written by rank zero."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mhc_torch.tracking.git import git_state
from tests.mhc_torch import readers

ROOT = Path(__file__).parents[2]


def launch(folder, strategy):
    command = [sys.executable, "-m", "tests.mhc_torch.ddp_training", str(folder), strategy]
    # Without what other trainings in this process have left there.
    ranks = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    done = launch(folder, "ddp")
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_trained_and_agree(folder):
    ranks = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
    assert sorted(rank["rank"] for rank in ranks) == [0, 1]
    assert {rank["world"] for rank in ranks} == {2}
    assert {rank["steps"] for rank in ranks} == {8}, "eight batches, halved, in two epochs"
    assert ranks[0]["weights"] == pytest.approx(ranks[1]["weights"])
    assert len(list((folder / "checkpoints").iterdir())) == 1


def test_there_is_one_run_in_every_backend(folder):
    assert [path.name for path in (folder / "tensorboard/p/two").iterdir()] == ["version_0"]
    assert len(list((folder / "tensorboard/p/two/version_0").glob("events*"))) == 1
    assert len(list((folder / "clearml/offline").glob("*.zip"))) == 1
    assert not (folder / "unsent").exists()


def test_metrics_are_reduced_over_both_and_written_once(folder):
    tensorboard, _ = readers.tensorboard(folder / "tensorboard/p/two/version_0")
    clearml, _ = readers.clearml_session(folder / "clearml", "")
    for scalars in (tensorboard, clearml):
        assert list(scalars["val/rank"].values()) == [0.5, 0.5]
        assert scalars["train_loss"].keys() == set(range(8))
        assert scalars["system/cpu_percent"].keys() == {0}
    parameters = readers.clearml_parameters(folder / "clearml")
    assert parameters["depth"] == "5"
    assert parameters["trainer/num_devices"] == "2"
    assert parameters["trainer/strategy"] == "DDPStrategy"
    assert ("git/commit" in parameters) == ("git/commit" in git_state(ROOT))
    assert readers.tensorboard_parameters(folder / "tensorboard/p/two/version_0")["from_every_rank"] is True


def test_processes_that_do_not_run_the_script_are_refused_in_words(tmp_path):
    done = launch(tmp_path, "ddp_fork")
    assert done.returncode != 0
    assert "use strategy='ddp', which starts the script again in each process" in done.stderr
