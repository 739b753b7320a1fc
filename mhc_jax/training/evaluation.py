"""What is asked of a model between updates: the loss of rows that it does not learn, a hook of one's own, a sample."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mhc_jax.training.assembly import language_loss
from mhc_jax.training.config import EvaluationConfig
from mhc_jax.training.data import BYTES
from mhc_jax.training.sharding import shard_batch
from mhc_jax.training.step import TrainState


class Evaluation:
    """Evaluates the states of a run. On several processes each call is one of all of them.

    Args:
        config: what is asked.
        batches: rows that are held out, those of this process.
        mesh: where states are.
        seed: of the samples.

    Raises:
        ValueError: the prompt is not in the vocabulary.
    """

    def __init__(
        self, config: EvaluationConfig, batches: list[dict[str, np.ndarray]], mesh: Mesh, seed: int, vocabulary: int
    ) -> None:
        self.config, self.batches, self.mesh, self.seed = config, batches, mesh, seed
        self._prompt = np.frombuffer(config.prompt.encode(), np.uint8).astype(np.int32)[None]
        if config.sample_length and self._prompt.max() >= vocabulary:
            raise ValueError(
                f"evaluation.prompt {config.prompt!r} has bytes that are not in the vocabulary of {vocabulary} tokens; "
                "set evaluation.sample_length to 0"
            )
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._loss = jax.jit(lambda state, batch: language_loss(state.model, batch)[0], out_shardings=self._everywhere)
        self._generate = jax.jit(self._continue, out_shardings=self._everywhere)

    def report(self, state: TrainState, step: int) -> dict[str, float]:
        """`evaluation/loss`, in nats a token, and what the hook says, after `step` updates."""
        report = {}
        if self.batches:
            losses = [self._loss(state, shard_batch(batch, self.mesh)) for batch in self.batches]
            report["evaluation/loss"] = float(np.mean(jax.device_get(losses)))
        if self.config.hook is not None:
            report |= {
                f"evaluation/{name}": float(value) for name, value in self.config.hook(state.model, step).items()
            }
        return report

    def sample(self, state: TrainState, step: int) -> str:
        """The prompt, and what the model goes on with: as text, or as numbers where a token is no byte."""
        tokens = np.asarray(self._generate(state, self._prompt, np.uint32(step)))[0]
        if tokens.max() < BYTES:
            return bytes(tokens.tolist()).decode(errors="replace")
        return " ".join(map(str, tokens))

    def _loss_of(self, state: TrainState, batch: Mapping[str, Array]) -> Array:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return language_loss(state.model, batch)[0]

    def _continue(self, state: TrainState, prompt: Array, step: Array) -> Any:
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        config = self.config
        return state.model.generate(prompt, config.sample_length, temperature=config.temperature, key=key)
