"""Kills a training again and again, at any moment, and compares what it reports with one that nobody killed.

    python -m tests.mhc_jax.training.kills FOLDER 20

Prints a line for each kill. The processes are forks of this one, which has imported JAX and not used it: a start takes
no longer than what it compiles.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from mhc_jax.models import DecoderConfig
from mhc_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from mhc_jax.training.program import Run

STEPS = 20
TIMES = ("train/tokens_per_second", "train/peak_fraction")


def config(folder):
    sizes = DecoderConfig(256, features=8, mlp_features=16, depth=2, num_heads=2)
    return TrainingConfig(
        folder=folder,
        steps=STEPS,
        model=ModelConfig(sizes),
        data=DataConfig(folder.parent / "text", length=16, batch=4),
        optimizer=OptimizerConfig(warmup=5, accumulate=2),
        evaluation=EvaluationConfig(every=6, batches=2, sample_length=0),
        checkpoints=CheckpointConfig(every=3),
        log_every=1,
        dashboard=False,
    )


def start(folder):
    """A process that trains; its own id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        run = Run(config(folder))
        run.train(run.begin())
        code = 0
    finally:
        os._exit(code)


def reported(folder):
    """Every report of a run, but for times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def size(folder):
    """Bytes that a run has reported."""
    metrics = folder / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def main(folder, kills):
    text = folder / "text"
    text.mkdir()
    for name in ("a", "b", "c"):
        (text / name).write_text(f"{name} is a letter. " * 50)
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0, "the training failed that nobody killed"
    expected = reported(folder / "whole")
    assert [line["step"] for line in expected if "train/loss" in line] == list(range(STEPS))
    draw, number = random.Random(0), 0
    for kill in range(1, kills + 1):
        run = folder / str(number)
        child, before, further = start(run), size(run), draw.choice((None, 0, 100, 200, 400, 800))
        if further is None:  # while it starts
            time.sleep(draw.uniform(0, 2))
        else:
            while size(run) <= before + further and not ended(child):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = sorted(path.name for path in run.glob("checkpoints/*"))
        print(f"kill {kill}: run {number} has {left}", flush=True)
        number += str(STEPS) in left
    for each in range(number + 1):
        assert os.waitpid(start(folder / str(each)), 0)[1] == 0, "a training that was killed does not go on"
        assert reported(folder / str(each)) == expected, "a training that was killed went on in another way"
    print("equal", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
