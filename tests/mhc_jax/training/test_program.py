"""The training program: it learns, goes on where it was ended, and refuses what is wrong before anything compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.models import DecoderConfig
from mhc_jax.streams import StreamConfig
from mhc_jax.training.__main__ import main, read_arguments
from mhc_jax.training.checkpoint import numbered, read_metadata
from mhc_jax.training.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ProcessConfig,
    TrainingConfig,
    load_config,
)
from mhc_jax.training.program import Run
from tests.mhc_jax.training.devices import with_devices

SIZES = DecoderConfig(256, features=8, mlp_features=16, depth=2, num_heads=2)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"{name} is a letter. " * 100)
    return folder


def config(text, **fields):
    given = {
        "folder": text.parent / "run",
        "steps": 6,
        "model": ModelConfig(SIZES, "residual"),
        "data": DataConfig(text, length=16, batch=8),
        "optimizer": OptimizerConfig(learning_rate=0.03, warmup=2),
        "evaluation": EvaluationConfig(every=3, batches=1, sample_length=0),
        "checkpoints": CheckpointConfig(every=2),
        "log_every": 1,
    }
    return TrainingConfig(**given | fields)


def run(config):
    new = Run(config)
    return new.train(new.begin())


def end_in_update(update, config):
    """A run that an error ends in this update."""
    ended = Run(config)
    ended._after = lambda state, step: (
        Run._after(ended, state, step) if step < update else (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):  # noqa: PT011  that of the line above
        ended.train(ended.begin())
    ended.checkpoints.wait()


def reports(folder, name):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


class Recorder:
    def __init__(self, folder):
        self.folder, self.metrics, self.params, self.heatmaps = folder, {}, None, []

    def log_metrics(self, metrics, step):
        self.metrics.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, params):
        self.params = params

    def log_mixing_weights(self, key, weights, step):
        self.heatmaps.append((key, step))


def test_a_run_learns_reports_and_keeps_the_last_and_the_best(text, capsys):
    recorders = []

    def tracker(folder):
        recorders.append(Recorder(folder))
        return recorders[-1]

    def hook(model, step):
        return {"depth": model.config.depth, "step": step}

    given = config(
        text,
        steps=30,
        model=ModelConfig(SIZES, "streams", streams=StreamConfig(streams=2)),
        evaluation=EvaluationConfig(every=10, batches=2, hook=hook, sample_length=5, prompt="a is"),
        checkpoints=CheckpointConfig(every=5, keep=1),
        log_every=5,
        tracker=tracker,
    )
    state = run(given)
    assert int(state.step) == 30
    folder = given.folder
    losses = reports(folder, "train/loss")
    assert list(losses) == [0, 5, 10, 15, 20, 25]
    assert 5 < losses[0] < 6.5
    assert losses[25] < 0.7 * losses[0]
    held_out = reports(folder, "evaluation/loss")
    assert list(held_out) == [10, 20, 30] == list(reports(folder, "sample"))
    assert reports(folder, "evaluation/step") == {10: 10, 20: 20, 30: 30}
    assert all(sample.startswith("a is") for sample in reports(folder, "sample").values())
    assert list(reports(folder, "train/tokens_per_second")) == [5, 10, 15, 20, 25]
    assert reports(folder, "train/learning_rate")[0] == 0
    best = min(held_out, key=held_out.get)
    assert [int(path.name) for path in numbered(folder / "checkpoints")] == sorted({best, 30})
    assert read_metadata(folder / "checkpoints" / "30")["position"] == 30

    (recorder,) = recorders
    assert recorder.folder == folder.absolute()
    assert recorder.params["model"]["streams"]["streams"] == 2
    assert recorder.metrics[10]["evaluation/depth"] == 2
    assert 0 <= recorder.metrics[5]["mhc/stack.layers.0.attn_hc/identity_distance"] < 0.1
    assert recorder.heatmaps == [("mhc/mixing_weights", step) for step in losses]
    assert "update 30: evaluation/loss" in capsys.readouterr().out


def test_a_run_that_goes_on_reports_what_one_run_does(text, capsys):
    whole = config(text, folder=text.parent / "whole", dashboard=False)
    run(whole)
    # As long a schedule, and an end in the middle.
    part = config(text, dashboard=False)
    end_in_update(5, part)
    assert numbered(part.folder / "checkpoints")[-1].name == "4"
    run(part)
    assert "going on after update 4" in capsys.readouterr().out
    for name in ("train/loss", "train/grad_norm", "evaluation/loss"):
        assert reports(part.folder, name) == reports(whole.folder, name)
    before = (part.folder / "metrics.jsonl").read_text()
    run(part)
    assert (part.folder / "metrics.jsonl").read_text() == before


def test_a_run_goes_on_in_another_placement_to_the_same_losses(text):
    evaluation = EvaluationConfig(every=3, batches=1, sample_length=3)
    whole = config(text, folder=text.parent / "whole", evaluation=evaluation)
    run(whole)
    end_in_update(5, config(text, evaluation=evaluation))
    run(config(text, evaluation=evaluation, tensor=2, sequence=2))
    for name in ("train/loss", "evaluation/loss"):
        moved, stayed = (reports(folder, name) for folder in (text.parent / "run", whole.folder))
        assert moved == pytest.approx(stayed, rel=1e-4)


def test_a_residual_checkpoint_begins_a_run_of_streams(text, capsys):
    residual = config(text, folder=text.parent / "residual", steps=12)
    run(residual)
    learned = reports(residual.folder, "evaluation/loss")[12]
    begin = CheckpointConfig(start_from=residual.folder / "checkpoints" / "12")
    run(config(text, steps=1, model=ModelConfig(SIZES), checkpoints=begin, optimizer=OptimizerConfig(warmup=1)))
    said = capsys.readouterr().out
    assert "new are: stack/layers/attn_hc/alpha, stack/layers/attn_hc/bias, stack/layers/attn_hc/phi" in said
    assert abs(reports(text.parent / "run", "evaluation/loss")[1] - learned) < 0.01


def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path):
    command = [sys.executable, "-m", "tests.mhc_jax.training.kills", str(tmp_path), "3"]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        command, env=os.environ | with_devices(1), cwd=root, capture_output=True, text=True, timeout=500
    )
    assert done.stdout.splitlines()[-1:] == ["equal"], done.stdout + done.stderr[-3000:]


def test_tensorboard_needs_no_torch(tmp_path, text):
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from mhc_jax.training.tracking import TensorBoard\n"
        "board = TensorBoard(Path(sys.argv[1]), 3)\n"
        "board.log_hyperparams({'steps': 3})\n"
        "board.log_metrics({'train/loss': 2.5}, 3)\n"
        "board.log_text('sample', 'a text', 3)\n"
        "board.close()\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "read = EventAccumulator(sys.argv[1]).Reload()\n"
        "assert [(e.step, e.value) for e in read.Scalars('train/loss')] == [(3, 2.5)], read.Tags()\n"
        "assert read.Tensors('sample')[0].tensor_proto.string_val == [b'a text']\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def refuse(config, message, kind=ValueError):
    with pytest.raises(kind, match=message), jax.log_compiles():
        Run(config)


def test_a_run_that_cannot_be_is_refused_before_anything_compiles(text, caplog):
    devices = jax.device_count()
    refuse(
        config(text, data=DataConfig(text, batch=devices + 1)), f"batch must be a multiple of {devices} devices, got"
    )
    parts = OptimizerConfig(warmup=1, accumulate=2)
    refuse(config(text, optimizer=parts), "multiple of 8 devices times optimizer.accumulate=2, got 8")
    refuse(config(text, data=DataConfig(text / "none")), "there is no file or folder", FileNotFoundError)
    (text / "d.bin").write_bytes(b"\xff\xfe")
    refuse(config(text), "d.bin is no text in UTF-8")
    given = {"data": DataConfig(text, "*.txt", length=16)}
    refuse(config(text, **given, optimizer=OptimizerConfig(warmup=1, train=("mlp/*",))), "no parameter has a name")
    gone = CheckpointConfig(start_from=text / "gone")
    refuse(config(text, **given, checkpoints=gone), "no complete checkpoint", FileNotFoundError)
    (text.parent / "file").write_text("")
    refuse(config(text, **given, folder=text.parent / "file" / "run"), "file", OSError)
    arrays = text.parent / "tokens.npy"
    np.save(arrays, np.arange(90) % 50)
    small = ModelConfig(DecoderConfig(50, features=8, mlp_features=16, depth=2, num_heads=2))
    sampled = EvaluationConfig(sample_length=3)
    refuse(
        config(text, data=DataConfig(arrays, length=4), model=small, evaluation=sampled),
        "prompt 'def ' has bytes that are not in the vocabulary of 50",
    )
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_the_folder_of_another_run_is_refused(text):
    run(config(text, steps=1, optimizer=OptimizerConfig(warmup=1)))
    other = DecoderConfig(256, features=16, mlp_features=16, depth=2, num_heads=2)
    refuse(config(text, model=ModelConfig(other, "residual")), r"another one, .*: model.sizes.features was 8, is 16$")
    refuse(config(text, model=ModelConfig(SIZES)), r"model.connection was 'residual', is 'streams'$")
    refuse(config(text, data=DataConfig(text, length=8), seed=1), r"data.length was 16, is 8; .*seed was 0, is 1$")
    (text / "d.txt").write_text("more")
    refuse(config(text), r"data.documents was 3, is 4; data.tokens was")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(connection="dense"), "connection must be one of 'residual', 'history', 'streams', got"),
        (lambda: ModelConfig(connection="residual", streams=StreamConfig(2)), "streams is of use to connection='str"),
        (lambda: ModelConfig(connection="history", block_length=2), "block_length is of use to connection='streams'"),
        (lambda: ModelConfig(dtype="float16"), "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        (lambda: ModelConfig(remat=("queries",)), "remat must name some of"),
        (lambda: ModelConfig(block_length=0), "block_length must be at least 1"),
        (lambda: DataConfig(length=0), "length must be finite and at least 1, got 0"),
        (lambda: DataConfig(held_out=1.0), r"held_out must be in \[0, 1\)"),
        (lambda: OptimizerConfig(learning_rate=-1.0), "learning_rate must be finite and at least 0"),
        (lambda: OptimizerConfig(beta2=1.0), r"beta2 must be in \[0, 1\)"),
        (lambda: OptimizerConfig(final=2.0), r"final must be in \[0, 1\]"),
        (lambda: OptimizerConfig(epsilon=0.0), "epsilon must be finite and above 0"),
        (lambda: OptimizerConfig(clip=0.0), "clip must be above 0"),
        (lambda: EvaluationConfig(prompt=""), "prompt must have a character"),
        (lambda: EvaluationConfig(every=0), "every must be finite and at least 1"),
        (lambda: CheckpointConfig(keep=0), "keep must be finite and at least 1"),
        (lambda: ProcessConfig(count=2), "coordinator, count and index go together"),
        (lambda: ProcessConfig(True, "host:1", 2, 2), r"index must be in 0..count-1, got 2 of 2"),
        (lambda: TrainingConfig(steps=10), "optimizer.warmup must be at most steps=10, got 20"),
        (
            lambda: TrainingConfig(optimizer=OptimizerConfig(accumulate=3)),
            "must be a multiple of optimizer.accumulate=3",
        ),
        (lambda: TrainingConfig(data=DataConfig(held_out=0.0)), "held_out must be above 0, or evaluation.batches 0"),
        (lambda: TrainingConfig(placement="random"), "placement must be one of"),
        (lambda: TrainingConfig(tensor=0), "tensor must be finite and at least 1"),
        (lambda: TrainingConfig(tensor=4), "model.sizes.num_heads must be a multiple of tensor=4, got 6"),
        (lambda: TrainingConfig(sequence=3), "data.length must be a multiple of tensor=1 times sequence=3, got 128"),
        (lambda: TrainingConfig(seed=-1), "seed must be in"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command_line_changes_fields_of_the_file(tmp_path, capsys, monkeypatch):
    file = tmp_path / "small.py"
    file.write_text(
        "from mhc_jax.training.config import OptimizerConfig, TrainingConfig\n"
        "config = TrainingConfig(steps=7, optimizer=OptimizerConfig(warmup=3, beta1=0.8))\n"
    )
    read = read_arguments([str(file), "--optimizer.warmup", "5", "--model.remat", "attention", "--data.path", "a"])
    assert read.steps == 7
    assert read.optimizer == OptimizerConfig(warmup=5, beta1=0.8)
    assert read.model.remat == ("attention",)
    assert read.data.path == Path("a")
    assert read_arguments([]) == TrainingConfig()
    file.write_text("config = 3")
    with pytest.raises(ValueError, match=r"small.py must say config = TrainingConfig\(...\), got 3"):
        load_config(file)

    def status(*arguments):
        monkeypatch.setattr(sys, "argv", ["training", *arguments])
        code = main()
        return code, capsys.readouterr().err.strip()

    assert status(str(file)) == (1, f"error: CONFIG: {file} must say config = TrainingConfig(...), got 3")
    assert status(str(tmp_path / "none.py")) == (1, f"error: CONFIG: no file {tmp_path}/none.py")
    with pytest.raises(SystemExit):
        status("--model.sizes.num-heads", "5")
    assert "features must be a multiple of num_heads=5" in capsys.readouterr().err


def test_a_full_disk_ends_a_run_with_one_error_and_the_last_checkpoint_whole(text, tmp_path):
    script = (
        "import resource, sys\n"
        "from mhc_jax.training import __main__ as program, checkpoint, retention\n"
        "def limited(*args, **options):\n"
        "    if args[0].name == '4':\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "    return checkpoint.start_saving(*args, **options)\n"
        "retention.start_saving = limited\n"
        "sys.exit(program.main())\n"
    )
    arguments = f"--folder {tmp_path}/run --steps 6 --optimizer.warmup 1 --model.connection residual --data.path {text}"
    arguments += " --data.length 16 --evaluation.sample-length 0 --checkpoints.every 2 --model.sizes.depth 2"
    arguments += " --model.sizes.features 64 --model.sizes.num-heads 2 --model.sizes.mlp-features 64 --no-dashboard"
    done = subprocess.run([sys.executable, "-c", script, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: path: {tmp_path}/run/checkpoints/4 could not be written: File too large [os_error_code='27']"
    ]
    (left,) = numbered(tmp_path / "run" / "checkpoints")
    assert left.name == "2"
    assert read_metadata(left)["position"] == 2
    assert jnp.isfinite(reports(tmp_path / "run", "train/loss")[0])
