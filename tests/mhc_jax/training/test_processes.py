"""Training started as two processes, each with four devices and half of the batch, is the training of one process."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.mhc_jax.training.devices import with_devices

SCRIPT = """
import json, sys
import jax, numpy as np, optax
from flax import nnx
rank, count, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=rank)
from mhc_jax.training.checkpoint import latest, restore, save
from mhc_jax.nn import MHCStack
from mhc_jax.training.sharding import data_mesh, fully_sharded, shard_batch
from mhc_jax.training import TrainState, make_train_step

assert jax.device_count() == 8 and jax.process_count() == count
mesh, optimizer = data_mesh(), optax.adam(1e-2)

def new_state(seed):
    model = MHCStack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 4, init="uniform", rngs=nnx.Rngs(seed))
    state = TrainState.create(model, optimizer)
    shardings = fully_sharded(state, mesh)
    return jax.jit(lambda state: state, out_shardings=shardings)(state), shardings

def batches(seed):
    x = np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32)
    return shard_batch(np.split(x, count)[rank], mesh)

state, shardings = new_state(0)
step = make_train_step(lambda model, x: (((model(x) - 1) ** 2).mean(), {}), optimizer, shardings=shardings)
losses = []
for seed in range(2):
    state, metrics = step(state, batches(seed))
    losses.append(float(metrics["loss"]))
save(f"{out}/checkpoints/2", state)
state = restore(latest(f"{out}/checkpoints"), new_state(1)[0])
for seed in range(2, 4):
    state, metrics = step(state, batches(seed))
    losses.append(float(metrics["loss"]))
for path, error in ((f"{out}/checkpoints/2", FileExistsError), (f"{out}/checkpoints/other-{rank}", ValueError)):
    try:
        save(path, state)
    except error as caught:
        assert str(caught).startswith("path"), caught
    else:
        assert error is ValueError and count == 1, path
with open(f"{out}/losses-{rank}.json", "w") as file:
    json.dump(losses, file)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def train(out: Path, processes: int) -> list[list[float]]:
    out.mkdir()
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(processes), str(port), str(out)],
            env=os.environ | with_devices(8 // processes),
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-3000:]
    return [json.loads((out / f"losses-{rank}.json").read_text()) for rank in range(processes)]


def test_two_processes_train_save_and_resume_as_one(tmp_path):
    (alone,) = train(tmp_path / "one", 1)
    first, second = train(tmp_path / "two", 2)
    assert first == second
    assert all(abs(a - b) < 1e-5 * a for a, b in zip(alone, first, strict=True)), (alone, first)
    assert alone[-1] < alone[0]


PROGRAM = """
--steps 6 --log-every 1 --optimizer.warmup 2 --data.length 16 --data.batch 8 --model.connection residual
--model.sizes.features 8 --model.sizes.mlp-features 16 --model.sizes.depth 2 --model.sizes.num-heads 2
--evaluation.every 2 --evaluation.batches 1 --evaluation.sample-length 0 --checkpoints.every 2 --no-dashboard
"""
# Processes that find a program in the cache do not wait long for those that compile it.
ALIKE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def run_program(folder: Path, processes: int, *arguments: str, killed: bool = False) -> list[dict]:
    """The program as `processes` of it, with two devices in all; what it has reported."""
    port = free_port()
    several = f"--processes.several --processes.coordinator localhost:{port} --processes.count {processes}".split()
    command = [sys.executable, "-m", "mhc_jax.training", *PROGRAM.split(), "--folder", str(folder), *arguments]
    running = [
        subprocess.Popen(
            [*command, *several, "--processes.index", str(rank)] if processes > 1 else command,
            env=os.environ | ALIKE | with_devices(2 // processes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]
    metrics = folder / "metrics.jsonl"
    if killed:
        while not (metrics.exists() and '"step": 4' in metrics.read_text()):
            assert all(process.poll() is None for process in running), running[0].communicate()[1].decode()[-3000:]
            time.sleep(0.01)
        for process in running:
            process.kill()
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert killed or process.returncode == 0, errors.decode()[-3000:]
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def test_the_program_as_two_processes_is_killed_and_goes_on(tmp_path):
    def losses(reports, name="train/loss"):
        return [report[name] for report in reports if name in report]

    whole = run_program(tmp_path / "whole", 2)
    assert len(losses(whole)) == 6
    assert len(losses(whole, "evaluation/loss")) == 3
    run_program(tmp_path / "killed", 2, killed=True)
    resumed = run_program(tmp_path / "killed", 2)
    for name in ("train/loss", "evaluation/loss"):
        assert losses(resumed, name) == losses(whole, name)
    # On another mesh, as one process with as many devices, from the same checkpoints.
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    for checkpoint in sorted((tmp_path / "other" / "checkpoints").iterdir(), key=lambda path: int(path.name))[1:]:
        shutil.rmtree(checkpoint)
    begun = int(next((tmp_path / "other" / "checkpoints").iterdir()).name)
    assert begun < 6
    other = run_program(tmp_path / "other", 1, "--placement", "replicated")
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-5)
