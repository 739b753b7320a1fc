"""The JAX side: the network in Flax NNX, trained by one jitted, donated step."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int
from tqdm import tqdm

from demo.data import CLASSES, PIXELS, Split, epoch_batches
from demo.record import Run
from demo.settings import DEPTH, EPOCHS, LEARNING_RATE, MIXING, WIDTH, decay
from mhc_jax.monitoring import diagnostics
from mhc_jax.nn import MHCStack
from mhc_jax.training import TrainState, make_train_step


class Block(nnx.Module):
    """One branch: normalize, mix the features, bend."""

    def __init__(self, width: int, dtype: Any, *, rngs: nnx.Rngs) -> None:
        # Flax's own epsilon is 1e-6: the two frameworks' defaults differ, so the network names it.
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, param_dtype=dtype, rngs=rngs)
        self.linear = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        return nnx.gelu(self.linear(self.norm(x)), approximate=False)


class PlainStack(nnx.Module):
    """The same blocks with no way around them: what deep networks were before residual connections."""

    def __init__(self, make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.vmap(make_layer, axis_size=depth)(rngs.fork(split=depth))

    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        graphdef, params = nnx.split(self.layers)
        return jax.lax.scan(lambda x, layer: (nnx.merge(graphdef, layer)(x), None), x, params)[0]


class Classifier(nnx.Module):
    """Digits from pixels: embedding, `DEPTH` blocks, head.

    Args:
        connection: "mhc", "residual" or "plain": the way around each block.
        dtype: of the parameters.
    """

    def __init__(self, connection: str = "mhc", dtype: Any = jnp.float32, *, rngs: nnx.Rngs) -> None:
        make_layer = partial(_make_block, dtype)
        self.embed = nnx.Linear(PIXELS, WIDTH, param_dtype=dtype, rngs=rngs)
        self.body: nnx.Module
        if connection == "plain":
            self.body = PlainStack(make_layer, DEPTH, rngs=rngs)
        else:
            self.body = MHCStack(make_layer, DEPTH, mode=connection, **MIXING, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, param_dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[ArrayLike, "batch 64"]) -> Float[Array, "batch 10"]:
        return self.head(self.norm(self.body(self.embed(jnp.asarray(images)))))


def _make_block(dtype: Any, rngs: nnx.Rngs) -> Block:
    return Block(WIDTH, dtype, rngs=rngs)


def loss_fn(model: Classifier, batch: Split) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy, and the accuracy on the batch."""
    logits = model(batch.images)
    return cross_entropy(logits, batch.digits), {"accuracy": jnp.mean(logits.argmax(-1) == batch.digits)}


def cross_entropy(logits: Float[Array, "batch 10"], digits: Int[ArrayLike, "batch"]) -> Float[Array, ""]:
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(digits)).mean()


def make_optimizer() -> optax.GradientTransformation:
    return optax.adam(lambda step: LEARNING_RATE * decay(step.astype(float)))


def take_steps(model: Classifier, batches: Iterable[Split]) -> Classifier:
    """The model after one optimizer step on each batch."""
    optimizer = make_optimizer()
    state, step = TrainState.create(model, optimizer), make_train_step(loss_fn, optimizer)
    for batch in batches:
        state, _ = step(state, batch)
    return state.model


def watch(model: Classifier, grads: nnx.State) -> dict[str, Array]:
    """What the report shows of each step: the gradient norm of every layer and, where there is mixing, its weights."""
    if isinstance(model.body, MHCStack):
        return diagnostics.diagnose(model, grads)["body"]
    return {"grad_norm": jax.vmap(optax.tree.norm)(grads["body"]["layers"])}


@nnx.jit
def predict(model: Classifier, images: Float[ArrayLike, "items 64"]) -> Int[Array, "items"]:
    return model(images).argmax(-1)


def train(name: str, model: Classifier, train_split: Split, test_split: Split) -> tuple[Run, Classifier]:
    """Trains for `EPOCHS` epochs with a progress bar, and returns what happened and the trained model."""
    optimizer = make_optimizer()
    state = TrainState.create(model, optimizer)
    step = make_train_step(loss_fn, optimizer, diagnose=watch)
    metrics, accuracies = [], []
    started = time.perf_counter()
    with tqdm(range(EPOCHS), desc=f"{name:>14}", unit="epoch", ncols=100) as progress:
        for epoch in progress:
            for batch in epoch_batches(train_split, epoch):
                state, report = step(state, batch)
                metrics.append(report)
            right = predict(state.model, test_split.images) == test_split.digits
            accuracies.append(float(right.mean()))
            progress.set_postfix(loss=f"{float(report['loss']):.4f}", accuracy=f"{accuracies[-1]:.1%}")
    seconds = time.perf_counter() - started
    series = jax.device_get(metrics)
    mixes = isinstance(state.model.body, MHCStack) and state.model.body.config.mode != "residual"
    entropy = np.array([m["diagnostics"]["entropy"] for m in series]) if mixes else None
    run = Run(
        name=name,
        losses=np.array([m["loss"] for m in series]),
        accuracies=np.array(accuracies),
        seconds=seconds,
        gradient_norms=series[0]["diagnostics"]["grad_norm"],
        weights=series[-1]["diagnostics"]["weights"] if mixes else None,
        entropy_steps=np.arange(len(series)) if mixes else None,
        entropy=entropy,
    )
    return run, state.model
