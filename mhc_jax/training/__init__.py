"""One jitted, donated training step for any NNX model and any optax optimizer.

state = TrainState.create(model, optimizer)
train_step = make_train_step(loss_fn, optimizer)
for batch in batches:
    state, metrics = train_step(state, batch)
model = state.model

`train` is that loop with an experiment tracker.
"""

from mhc_jax.training.loop import train
from mhc_jax.training.step import TrainState, make_train_step

__all__ = ["TrainState", "make_train_step", "train"]
