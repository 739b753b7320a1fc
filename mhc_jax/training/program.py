"""The training program: a run that is checked whole before anything compiles, and that goes on where it was ended."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from mhc_jax.monitoring.dashboard import Tracker
from mhc_jax.training.assembly import assemble
from mhc_jax.training.checkpoint import numbered, read_metadata, restore, restore_part
from mhc_jax.training.config import TrainingConfig, as_json
from mhc_jax.training.data import evaluation_batches, open_data, training_batches
from mhc_jax.training.evaluation import Evaluation
from mhc_jax.training.loop import train
from mhc_jax.training.optimizer import learning_rate
from mhc_jax.training.retention import Checkpoints
from mhc_jax.training.sharding import data_mesh, shard_batch
from mhc_jax.training.step import TrainState
from mhc_jax.training.throughput import Throughput, flops_per_token, peak
from mhc_jax.training.tracking import MetricsFile, Several, TensorBoard

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("the training program needs tqdm: pip install 'mhc-jax[train]'") from error


class Run:
    """A run, checked and not begun: nothing is compiled. It is the tracker of its own loop, and passes on.

    Args:
        config: all of it. Processes have found each other (`start_processes`).

    Attributes:
        assembly: its parts.
        begun: updates that were made before.

    Raises:
        ValueError: the batch does not divide over the devices, data or names of parameters do not fit, or the run in
            `config.folder` is another one, of another model or other data.
        FileNotFoundError: there are no data, or no checkpoint to start from.
        ImportError: a package that is asked for is not installed.
        OSError: `config.folder` cannot be written to.

    Example:
        >>> import tempfile
        >>> from mhc_jax.training.config import DataConfig, TrainingConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Run(TrainingConfig(folder=Path(folder), data=DataConfig(batch=jax.device_count())))
        >>> run.assembly.parameters, run.begun
        (10818756, 0)
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config, self.mesh = config, data_mesh(config.tensor, config.sequence)
        self.assembly = assemble(config, self.mesh)
        self.rows, self.training = open_data(config.data, config.model.sizes.vocabulary)
        self._process = {"process": jax.process_index(), "processes": jax.process_count()}
        count = config.evaluation.batches
        held_out = evaluation_batches(self.rows, self.training, config.data.batch, count, **self._process)
        sizes = config.model.sizes
        self.evaluation = Evaluation(config.evaluation, held_out, self.mesh, config.seed, sizes.vocabulary)
        self._open_folder()

    def _open_folder(self) -> None:
        config = self.config
        folder = config.folder.absolute()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints.keep)
        found = numbered(self.checkpoints.folder)
        self.latest = found[-1] if found else None
        metadata = {} if self.latest is None else read_metadata(self.latest)
        if self.latest is not None:
            _check_same(self.latest, metadata, self._identity())
        elif config.checkpoints.start_from is not None:
            read_metadata(config.checkpoints.start_from)
        self.begun = metadata.get("position", 0)
        if config.tensorboard and find_spec("tensorboard") is None:
            raise ImportError("tensorboard=True needs TensorBoard: pip install 'mhc-jax[tensorboard]'")
        self.metrics_bytes = metadata.get("metrics_bytes", 0)

    def _trackers(self) -> Iterator[Tracker]:
        """Those of process 0."""
        folder = self.config.folder.absolute()
        self.metrics = MetricsFile(folder / "metrics.jsonl", self.metrics_bytes)
        yield self.metrics
        if self.config.tensorboard:
            yield TensorBoard(folder / "tensorboard", self.begun)
        if self.config.tracker is not None:
            yield self.config.tracker(folder)

    def begin(self) -> TrainState:
        """The state of the run's latest checkpoint; where there is none, a new one, or `checkpoints.start_from`'s.

        Raises:
            ValueError: a checkpoint does not fit the model or the optimizer.
        """
        if self.latest is not None:
            self._say(f"going on after update {self.begun}")
            return restore(self.latest, {"state": self.assembly.shapes})["state"]
        state = self.assembly.new_state()
        source = self.config.checkpoints.start_from
        if source is None:
            return state
        part = restore_part(source, {"state": {"params": state.params}})
        new = [name.removeprefix("state/params/") for name in part.new]
        self._say(f"parameters are those of {source}; new are: {', '.join(new) or 'none'}")
        return replace(state, params=part.tree["state"]["params"])

    def train(self, state: TrainState) -> TrainState:
        """All updates that are left, to the last checkpoint.

        Raises:
            OSError: a checkpoint could not be written; those before it are whole.
        """
        config = self.config
        one = peak(jax.devices()[0].device_kind)
        self._throughput = Throughput(
            config.data.batch * config.data.length,
            flops_per_token(config.model.sizes, config.data.length),
            None if one is None else one * jax.device_count(),
        )
        self._rate = learning_rate(config.optimizer, config.steps)
        first = jax.process_index() == 0
        self.tracker = Several(list(self._trackers()) if first else [])
        # None: where nobody looks at a screen, there is no bar.
        self._bar = tqdm(total=config.steps, initial=self.begun, unit="update", disable=None if first else True)
        try:
            state = train(
                state,
                self.assembly.make_step(),
                self._batches(),
                tracker=self,
                log_interval=config.log_every,
                hyperparams=None if self.begun else as_json(config),
                after=self._after,
            )
            self.checkpoints.wait()
        finally:
            self._bar.close()
            self.tracker.close()
        return state

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """To all trackers; that of an update with its throughput and learning rate, and as a line of its own."""
        if "train/loss" in metrics:
            speed = {f"train/{name}": value for name, value in self._throughput.read(step + 1).items()}
            metrics = {**metrics, **speed, "train/learning_rate": float(self._rate(step))}
            self._say(_line(step, {name.removeprefix("train/"): value for name, value in metrics.items()}))
        self.tracker.log_metrics(metrics, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """To all trackers."""
        self.tracker.log_hyperparams(params)

    def log_mixing_weights(self, key: str, weights: Mapping[str, Any], step: int) -> None:
        """To those that draw."""
        self.tracker.log_mixing_weights(key, weights, step)

    def _after(self, state: TrainState, step: int) -> None:
        config, last = self.config, step == self.config.steps
        self._bar.update()
        evaluates = last or step % config.evaluation.every == 0
        saves = last or step % config.checkpoints.every == 0
        if not (evaluates or saves):
            return
        jax.block_until_ready(state.step)  # or updates that are under way would count as a pause
        with self._throughput.paused():
            report = self._evaluate(state, step) if evaluates else {}
            if saves:
                loss = report.get("evaluation/loss")
                self.checkpoints.save(step, {"state": state}, self._metadata(step), loss=loss)

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        report = self.evaluation.report(state, step)
        if report:
            self._say(_line(step, report))
            self.tracker.log_metrics(report, step)
        if self.config.evaluation.sample_length:
            text = self.evaluation.sample(state, step)
            self._say(text)
            self.tracker.log_text("sample", text, step)
        return report

    def _metadata(self, step: int) -> dict[str, Any]:
        """What a run needs beside its state: the position in the data, in batches, and how long its metrics are."""
        size = self.metrics.size if jax.process_index() == 0 else 0
        return {"position": step, "metrics_bytes": size, "identity": self._identity(), "config": as_json(self.config)}

    def _identity(self) -> dict[str, Any]:
        """What may not change within a run."""
        config = self.config
        model = {name: as_json(getattr(config.model, name)) for name in ("sizes", "connection", "history", "streams")}
        data = {name: getattr(config.data, name) for name in ("length", "batch", "held_out")}
        data |= {"documents": len(self.rows.documents), "tokens": self.rows.tokens}
        return {"model": model, "data": data, "seed": config.seed}

    def _batches(self) -> Iterator[Any]:
        own = training_batches(
            self.rows, self.training, self.config.data.batch, self.config.seed, start=self.begun, **self._process
        )
        return (shard_batch(batch, self.mesh) for batch in itertools.islice(own, self.config.steps - self.begun))

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(text)


def start_processes(config: TrainingConfig) -> None:
    """Finds the other processes, if there are; before anything else that is done with JAX.

    Raises:
        ValueError, RuntimeError: they are not found.
    """
    processes = config.processes
    if processes.several:
        jax.distributed.initialize(processes.coordinator, processes.count, processes.index)


def _check_same(path: Path, metadata: dict[str, Any], identity: dict[str, Any]) -> None:
    saved, asked = _flat(metadata.get("identity", {})), _flat(identity)
    missing = "nothing"
    names = sorted(name for name in saved | asked if saved.get(name, missing) != asked.get(name, missing))
    if names:
        changes = "; ".join(
            f"{name} was {saved.get(name, missing)!r}, is {asked.get(name, missing)!r}" for name in names
        )
        raise ValueError(f"the run in {path.parents[1]} is another one, take a new folder: {changes}")


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {
        key: value for part, child in tree.items() for key, value in _flat(child, f"{name}.{part}".lstrip(".")).items()
    }


def _line(step: int, numbers: Mapping[str, float]) -> str:
    return f"update {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
