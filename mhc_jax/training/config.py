"""What a training is, as one value: `python -m mhc_jax.training` reads it from a file and its command line."""

import dataclasses
import math
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from mhc_jax.history import MHCConfig
from mhc_jax.history.config import DEFAULTS as HISTORY
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.models.decoder import REMAT_NAMES
from mhc_jax.options import check_choice, check_types
from mhc_jax.streams import StreamConfig
from mhc_jax.streams.config import DEFAULTS as STREAMS

DTYPES = ("float32", "bfloat16")
# 10 million parameters, for bytes.
_SIZES = DecoderConfig(256, features=384, mlp_features=960, depth=6, num_heads=6)


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and at least {least}, got {getattr(config, name)}")


@dataclass(frozen=True)
class ModelConfig:
    """A `mhc_jax.models.Decoder`.

    Args:
        sizes: of the decoder; the default has 10 million parameters and reads bytes.
        connection: how its layers are connected.
        history: options of `connection="history"`.
        streams: options of `connection="streams"`.
        dtype: of the computation; parameters are float32. "bfloat16" is for TPUs and GPUs, few CPUs have it.
        remat: what a layer keeps for the backward pass beside its input, out of `REMAT_NAMES`; None keeps all.
        block_length: of how many layers streams are kept once.
        implementation: "pallas" for the kernels of streams; None is what the platform does best.
        attention: "plain", "splash" or "cudnn"; None is that of the platform.

    Raises:
        ValueError: an option is out of range, or of use to another connection.
        TypeError: one has the wrong type.
    """

    sizes: DecoderConfig = _SIZES
    connection: Literal["residual", "history", "streams"] = "streams"
    history: MHCConfig = HISTORY
    streams: StreamConfig = STREAMS
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: tuple[str, ...] | None = None
    block_length: int = 1
    implementation: Literal["xla", "pallas"] | None = None
    attention: Literal["plain", "splash", "cudnn"] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("connection", self.connection, ("residual", "history", "streams"))
        check_choice("dtype", self.dtype, DTYPES)
        of_use: dict[str, tuple[str, Any]] = {"history": ("history", HISTORY), "streams": ("streams", STREAMS)}
        of_use |= {"block_length": ("streams", 1), "implementation": ("streams", None)}
        for name, (connection, default) in of_use.items():
            if self.connection != connection and getattr(self, name) != default:
                raise ValueError(f"{name} is of use to connection={connection!r} alone, got {getattr(self, name)!r}")
        if unknown := sorted(set(self.remat or ()) - set(REMAT_NAMES)):
            raise ValueError(f"remat must name some of {REMAT_NAMES}, got {unknown}")
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")

    def make(self, rngs: nnx.Rngs) -> Decoder:
        """The model, new."""
        connected = {"residual": "residual", "history": self.history, "streams": self.streams}[self.connection]
        return Decoder(
            self.sizes,
            connected,  # type: ignore[arg-type]  # mypy joins the values to object
            block_length=self.block_length,
            implementation=self.implementation,
            attention=self.attention,
            remat=self.remat,
            dtype=jnp.dtype(self.dtype),
            rngs=rngs,
        )


@dataclass(frozen=True)
class DataConfig:
    """What is learned.

    Args:
        path: a text file, a token array (.npy, one axis of integers), or a folder of either; None is the source of
            Python's standard library. Texts are read as bytes.
        pattern: which files of the folder, as of `Path.glob`; hidden ones are passed over.
        length: tokens that a row of a batch reads, T.
        batch: rows of an update, those of all processes together.
        held_out: share of the rows that is for evaluation alone.

    Raises:
        ValueError: a number is out of its range.
        TypeError: one has the wrong type.
    """

    path: Path | None = None
    pattern: str = "**/*"
    length: int = 128
    batch: int = 8
    held_out: float = 0.02

    def __post_init__(self) -> None:
        check_types(self)
        _at_least(self, 1, "length", "batch")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with a warmup and a cosine.

    Args:
        learning_rate: the highest one, after `warmup` updates, which rise to it evenly.
        warmup: updates.
        final: part of `learning_rate` that the cosine ends with.
        beta1, beta2, epsilon: of Adam.
        weight_decay: of the parameters that decay.
        clip: largest norm of all gradients together; `inf` does not clip.
        accumulate: parts of a batch whose gradients are taken one after the other.
        train: which parameters train, by patterns of their names as of `fnmatch`, `stack/layers/mlp/*`; others keep
            their values.
        decay: which of them decay. By default matrices and embeddings do; norms, maps of streams, and logits do not.

    Raises:
        ValueError: a number is out of its range.
        TypeError: one has the wrong type.
    """

    learning_rate: float = 2e-3
    warmup: int = 20
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    accumulate: int = 1
    train: tuple[str, ...] = ("*",)
    decay: tuple[str, ...] = ("*/kernel", "*/embedding")

    def __post_init__(self) -> None:
        check_types(self)
        _at_least(self, 0, "learning_rate", "warmup", "weight_decay")
        _at_least(self, 1, "accumulate")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1], got {self.final}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be finite and above 0, got {self.epsilon}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Args:
        every: updates from one evaluation to the next; the last update has one, too.
        batches: of the rows held out, fewer if there are fewer; 0 is no evaluation.
        hook: what else to report then: `(model, step) -> {name: number}`, called on every process.
        sample_length: tokens that the model writes then; 0 is none.
        prompt: what it goes on from, as bytes.
        temperature: of the sample.

    Raises:
        ValueError: a number is out of its range, or there is no prompt.
        TypeError: one has the wrong type.
    """

    every: int = 50
    batches: int = 8
    hook: Callable[[Decoder, int], Mapping[str, float]] | None = None
    sample_length: int = 100
    prompt: str = "def "
    temperature: float = 0.8

    def __post_init__(self) -> None:
        check_types(self)
        _at_least(self, 1, "every")
        _at_least(self, 0, "batches", "sample_length", "temperature")
        if not self.prompt:
            raise ValueError("prompt must have a character at least, got ''")


@dataclass(frozen=True)
class CheckpointConfig:
    """Args:
        every: updates from one checkpoint to the next; the last update has one, too.
        keep: how many of the latest stay; that with the least loss of evaluation stays as well.
        start_from: a checkpoint of another run, whose parameters a new run begins with where names agree, such as one
            of a residual decoder for a decoder of streams. What is new is listed.

    Raises:
        ValueError: a number is below 1.
        TypeError: one has the wrong type.
    """

    every: int = 50
    keep: int = 2
    start_from: Path | None = None

    def __post_init__(self) -> None:
        check_types(self)
        _at_least(self, 1, "every", "keep")


@dataclass(frozen=True)
class ProcessConfig:
    """Several processes, each with devices of its own: `jax.distributed.initialize`.

    Args:
        several: whether there are. On Cloud TPUs, under Slurm, Open MPI and in Kubernetes they find each other.
        coordinator: elsewhere, host and port of the first process.
        count: elsewhere, of processes.
        index: elsewhere, the number of this process, from 0.

    Raises:
        ValueError: some of `coordinator`, `count` and `index` are given and others are not, or they do not fit.
        TypeError: one has the wrong type.
    """

    several: bool = False
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        given = [value is not None for value in (self.coordinator, self.count, self.index)]
        if any(given) and not (all(given) and self.several):
            raise ValueError("coordinator, count and index go together, with several=True")
        if self.count is not None and self.index is not None and not 0 <= self.index < self.count:
            raise ValueError(f"index must be in 0..count-1, got {self.index} of {self.count}")


@dataclass(frozen=True)
class TrainingConfig:
    """A training run.

    Args:
        folder: where checkpoints and metrics are. A run that is started again goes on from its latest checkpoint.
        steps: updates in all.
        seed: of the parameters, of the order of the rows and of samples.
        model, data, optimizer, evaluation, checkpoints, processes: see there.
        placement: "fully_sharded" splits parameters and optimizer over all devices, "replicated" has all of them on
            each. Batches are split either way.
        tensor: how many devices share the heads, the MLP features and the vocabulary of the same rows.
        sequence: how many devices share the tokens of a row, for long texts. Of a row they have all keys and values.
        log_every: updates from one report to the next.
        dashboard: whether reports have figures of every connection.
        tensorboard: whether reports go to TensorBoard, too, in the same folder.
        tracker: makes another tracker from the folder, see `mhc_jax.monitoring.dashboard.Tracker`.

    Raises:
        ValueError: a number is out of its range.
        TypeError: one has the wrong type.

    Example:
        >>> from mhc_jax.training.config import OptimizerConfig, TrainingConfig
        >>> TrainingConfig(steps=300, optimizer=OptimizerConfig(warmup=30)).optimizer.warmup
        30
    """

    folder: Path = Path("runs/training")
    steps: int = 200
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    processes: ProcessConfig = ProcessConfig()
    placement: Literal["replicated", "fully_sharded"] = "fully_sharded"
    tensor: int = 1
    sequence: int = 1
    log_every: int = 10
    dashboard: bool = True
    tensorboard: bool = False
    tracker: Callable[[Path], Any] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("placement", self.placement, ("replicated", "fully_sharded"))
        _at_least(self, 1, "steps", "log_every", "tensor", "sequence")
        sizes = self.model.sizes
        split = {"num_heads": sizes.num_heads, "num_kv_heads": sizes.kv_heads}
        split |= {"mlp_features": sizes.mlp_features, "vocabulary": sizes.vocabulary}
        for name, length in split.items():
            if length % self.tensor:
                raise ValueError(f"model.sizes.{name} must be a multiple of tensor={self.tensor}, got {length}")
        if self.data.length % (self.tensor * self.sequence):
            shared = f"tensor={self.tensor} times sequence={self.sequence}"
            raise ValueError(f"data.length must be a multiple of {shared}, got {self.data.length}")
        if self.optimizer.warmup > self.steps:
            raise ValueError(f"optimizer.warmup must be at most steps={self.steps}, got {self.optimizer.warmup}")
        if self.data.batch % self.optimizer.accumulate:
            parts = self.optimizer.accumulate
            raise ValueError(f"data.batch must be a multiple of optimizer.accumulate={parts}, got {self.data.batch}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2**32-1, got {self.seed}")
        if self.evaluation.batches and self.data.held_out == 0:
            raise ValueError("data.held_out must be above 0, or evaluation.batches 0")


def load_config(path: Path) -> TrainingConfig:
    """The value `config` of a Python file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not say `config = TrainingConfig(...)`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"CONFIG: no file {path}")
    config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, TrainingConfig):
        raise ValueError(f"CONFIG: {path} must say config = TrainingConfig(...), got {config!r}")
    return config


def as_json(value: Any) -> Any:
    """A config as what JSON can hold; functions by their names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", str(value))
