"""What a config makes: optimizer, training state and step, by shapes alone. Nothing is computed or compiled."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mhc_jax.models import Decoder
from mhc_jax.monitoring.diagnostics import diagnose
from mhc_jax.placement import BATCH
from mhc_jax.training.config import TrainingConfig
from mhc_jax.training.optimizer import make_optimizer
from mhc_jax.training.sharding import fully_sharded, replicated
from mhc_jax.training.step import Metrics, TrainState, make_train_step

PLACEMENTS = {"replicated": replicated, "fully_sharded": fully_sharded}


class Assembly(NamedTuple):
    """The parts of a run.

    Attributes:
        optimizer: for the parameters that train.
        shapes: a `TrainState` of `jax.ShapeDtypeStruct`, each with its sharding.
        shardings: the same of shardings alone.
        config: what they were made from.
    """

    optimizer: optax.GradientTransformation
    shapes: TrainState
    shardings: TrainState
    config: TrainingConfig

    @property
    def parameters(self) -> int:
        """How many the model has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes.params))

    def new_state(self) -> TrainState:
        """The state before the first update, where it belongs."""
        return jax.jit(lambda: _new_state(self.config, self.optimizer), out_shardings=self.shardings)()

    def make_step(self) -> Any:
        """The training step, under `jax.jit`."""
        return make_train_step(
            language_loss,
            self.optimizer,
            diagnose=diagnose if self.config.dashboard else None,
            shardings=self.shardings,
            accumulate=self.config.optimizer.accumulate,
        )


def assemble(config: TrainingConfig, mesh: Mesh) -> Assembly:
    """The parts of a run on this mesh, whose devices may be absent.

    Args:
        mesh: `data_mesh(config.tensor, config.sequence)`.

    Raises:
        ValueError: the batch does not divide over the devices, or the optimizer names parameters that are not there.

    Example:
        >>> from mhc_jax.training.config import DataConfig, TrainingConfig
        >>> from mhc_jax.training.sharding import data_mesh
        >>> assemble(TrainingConfig(data=DataConfig(batch=jax.device_count())), data_mesh()).parameters
        10818756
    """
    devices, parts = mesh.shape[BATCH], config.optimizer.accumulate
    if config.data.batch % (devices * parts):
        each = f"{devices} devices" + (f" times optimizer.accumulate={parts}" if parts > 1 else "")
        raise ValueError(f"data.batch must be a multiple of {each}, got {config.data.batch}")
    model = nnx.eval_shape(lambda: config.model.make(nnx.Rngs(config.seed)))
    optimizer = make_optimizer(config.optimizer, config.steps, nnx.state(model, nnx.Param))
    shapes = jax.eval_shape(lambda: _new_state(config, optimizer))
    shardings = PLACEMENTS[config.placement](shapes, mesh)
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )
    return Assembly(optimizer, placed, shardings, config)


def language_loss(model: Decoder, batch: Mapping[str, Array]) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch of `mhc_jax.training.data`: no token sees another document, or is predicted from one."""
    return model.loss(batch["tokens"], segments=batch["segments"]), {}


def _new_state(config: TrainingConfig, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState.create(config.model.make(nnx.Rngs(config.seed)), optimizer)
