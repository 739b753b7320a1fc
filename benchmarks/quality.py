"""What a connection does for learning, on real data: `python -m benchmarks.quality [--quick] [--output FILE]`.

The same branches at several depths, connected in every way the library knows, trained from several seeds by the same
Adam on the same batches: blocks of norm, linear layer and GELU on handwritten digits (those of `make demo`), and a
byte-level decoder on the text of the Python language reference. Seeds are trained side by side, as one program.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from benchmarks.record import RESULTS, output_file
from benchmarks.timing import environment, write_json
from demo.data import CLASSES, PIXELS, load_splits
from demo.jax_side import Block, PlainStack
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.models.decoder import DecoderLayer
from mhc_jax.nn import HyperConnections, MHCStack, StreamStack

RESULT = RESULTS / "quality-cpu.json"
FIGURE = Path("docs/images/quality.png")

# "hc" of history mixing is the simplex at temperature 1, so it needs no row of its own; what the papers call HC is
# streams without a constraint.
HISTORY: dict[str, dict[str, Any]] = {
    "history, simplex": {"constraint": "simplex"},
    "history, simplex, uniform": {"constraint": "simplex", "init": "uniform"},
    "history, identity, uniform": {"constraint": "identity", "init": "uniform"},
    "history, sparse, uniform": {"constraint": "sparse", "init": "uniform"},
}
STREAMS: dict[str, dict[str, Any]] = {
    "streams, HC": {"constraint": "none"},
    "streams, mHC": {"constraint": "sinkhorn"},
    "streams, mHC-lite": {"constraint": "permutations"},
    "streams, KromHC": {"constraint": "kronecker"},
}
CONNECTIONS = ("plain", "residual", *HISTORY, *STREAMS)
Batch = tuple[Array, Array]


class Digits(nnx.Module):
    """A classifier of pixels: embedding, `depth` blocks connected in one way, head."""

    def __init__(self, connection: str, depth: int, width: int, *, rngs: nnx.Rngs) -> None:
        def block(rngs: nnx.Rngs) -> Block:
            return Block(width, jnp.float32, rngs=rngs)

        def stream_block(rngs: nnx.Rngs, index: Array) -> HyperConnections:
            return HyperConnections(block(rngs), width, layer_index=index, **STREAMS[connection])

        self.embed = nnx.Linear(PIXELS, width, rngs=rngs)
        self.stack: nnx.Module
        if connection == "plain":
            self.stack = PlainStack(block, depth, rngs=rngs)
        elif connection in STREAMS:
            self.stack = StreamStack(stream_block, depth, rngs=rngs)
        else:
            self.stack = MHCStack(block, depth, rngs=rngs, **HISTORY.get(connection, {"mode": "residual"}))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: Float[Array, "B 64"]) -> Float[Array, "B 10"]:
        return self.head(self.norm(self.stack(self.embed(images))))


class PlainLayer(DecoderLayer):
    """Attention and MLP, one after the other, with no way around either."""

    def __call__(self, x: Float[Array, "B T C"], *context: Any) -> Float[Array, "B T C"]:
        return self.transform(self.attend(x, *context))


def text_model(connection: str, depth: int, width: int, *, rngs: nnx.Rngs) -> Decoder:
    """The library's decoder over bytes, with two heads."""
    if connection in STREAMS:
        kind, options = "streams", STREAMS[connection]
    elif connection in HISTORY:
        kind, options = "history", HISTORY[connection]
    else:
        kind, options = "residual", {}
    config = DecoderConfig(256, width, mlp_features=8 * width // 3, depth=depth, num_heads=2, tied=True)
    model = Decoder(config, kind, rngs=rngs, **options)  # type: ignore[arg-type]
    if connection == "plain":

        def layer(rngs: nnx.Rngs) -> PlainLayer:
            return PlainLayer(config, attention=None, dtype=None, param_dtype=jnp.float32, rngs=rngs)

        model.stack = PlainStack(layer, depth, rngs=rngs)  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class Task:
    """One data set with the network and the training that it gets.

    Attributes:
        model: (connection, depth, rngs) to a network of inputs to logits.
        batches: (seed, steps) to the batches of a run, a leading axis of steps.
        held_out: inputs and labels that no training sees.
        unit: nats in one unit of the reported loss.
        target: the loss to which steps are counted, in that unit.
    """

    model: Callable[..., nnx.Module]
    batches: Callable[[int, int], Batch]
    held_out: Batch
    depths: tuple[int, ...]
    connections: tuple[str, ...]
    steps: int
    learning_rate: float
    unit: float
    target: float


def digits() -> Task:
    train, test = load_splits()

    def batches(seed: int, steps: int) -> Batch:
        chosen = np.random.default_rng(seed).integers(0, len(train.digits), (steps, 64))
        return jnp.asarray(train.images[chosen]), jnp.asarray(train.digits[chosen])

    return Task(
        model=partial(Digits, width=32),
        batches=batches,
        held_out=(jnp.asarray(test.images), jnp.asarray(test.digits)),
        depths=(10, 50, 200),
        connections=CONNECTIONS,
        steps=240,
        learning_rate=1e-3,
        unit=1.0,
        target=0.5,
    )


def text() -> Task:
    length = 32
    whole = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8).astype(np.int32)
    train, test = np.split(whole, [int(0.9 * len(whole))])

    def windows(source: Int[np.ndarray, " bytes"], rng: np.random.Generator, *shape: int) -> Batch:
        starts = rng.integers(0, len(source) - length, shape)
        found = jnp.asarray(source[starts[..., None] + np.arange(length + 1)])
        return found[..., :-1], found[..., 1:]

    return Task(
        model=partial(text_model, width=32),
        batches=lambda seed, steps: windows(train, np.random.default_rng(seed), steps, 8),
        held_out=windows(test, np.random.default_rng(0), 64),
        depths=(10, 50),
        connections=("plain", "residual", "history, simplex, uniform", "streams, HC", "streams, mHC"),
        steps=120,
        learning_rate=3e-3,
        unit=float(np.log(2)),
        target=4.5,
    )


TASKS = {"digits": digits, "text": text}


def loss_and_accuracy(model: Any, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    inputs, labels = batch
    logits = model(inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(logits.argmax(-1) == labels)


def layer_0_norm(grads: nnx.State) -> Float[Array, ""]:
    """Norm of the gradient of the first layer's matrices: what every connection has, its own parameters left out."""
    layers = nnx.to_flat_state(grads["stack"]["layers"])
    return optax.tree.norm([leaf[...][0] for path, leaf in layers if path[-1] == "kernel"])


def train(task: Task, connection: str, depth: int, seeds: int, every: int) -> dict[str, Any]:
    """Trains one network from every seed; what happened, as lists over evaluations and seeds, or over seeds.

    `loss` is that of the held-out data, in the task's unit; `gradient norm` that of layer 0, at the first step.
    """
    optimizer = optax.adam(optax.linear_schedule(task.learning_rate, 0.0, task.steps))
    models = [nnx.split(task.model(connection, depth, rngs=nnx.Rngs(seed))) for seed in range(seeds)]
    graphdef = models[0][0]

    def run(params: nnx.State, batches: Batch) -> tuple[Array, Array, Array]:
        def step(carry: Any, batch: Batch) -> tuple[Any, Array]:
            params, state = carry
            grads = jax.grad(lambda params: loss_and_accuracy(nnx.merge(graphdef, params), batch)[0])(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), layer_0_norm(grads)

        def stretch(carry: Any, batches: Batch) -> tuple[Any, tuple[Array, Array, Array]]:
            carry, norms = jax.lax.scan(step, carry, batches)
            return carry, (*loss_and_accuracy(nnx.merge(graphdef, carry[0]), task.held_out), norms[0])

        stretches = jax.tree.map(lambda leaf: leaf.reshape(-1, every, *leaf.shape[1:]), batches)
        _, (losses, accuracies, norms) = jax.lax.scan(stretch, (params, optimizer.init(params)), stretches)
        return losses / task.unit, accuracies[-1], norms[0]

    def stacked(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    params = stacked([params for _, params in models])
    batches = stacked([task.batches(seed, task.steps) for seed in range(seeds)])
    losses, accuracies, norms = jax.jit(jax.vmap(run))(params, batches)
    evaluated = np.arange(every, task.steps + 1, every)
    reached = np.asarray(losses) <= task.target
    return {
        "step": evaluated.tolist(),
        "loss": np.asarray(losses, float).T.tolist(),
        "accuracy": np.asarray(accuracies, float).tolist(),
        "gradient norm": np.asarray(norms, float).tolist(),
        "steps to target": [int(evaluated[row.argmax()]) if row.any() else None for row in reached],
    }


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Losses on the way at each task's greatest depth, and the gradient that reaches layer 0 of the digits' nets."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    colors = dict(zip(CONNECTIONS, plt.get_cmap("tab10").colors, strict=True))  # type: ignore[attr-defined]
    for axis, (name, task) in zip(axes[::2], record["tasks"].items(), strict=True):
        depth = max(task["depths"])
        for run in task["runs"]:
            if run["depth"] == depth:
                losses, color = np.array(run["loss"]), colors[run["connection"]]
                axis.plot(run["step"], losses.mean(1), color=color)
                axis.fill_between(run["step"], losses.min(1), losses.max(1), color=color, alpha=0.15)
        axis.set(title=f"{name}, {depth} layers", xlabel="step", ylabel=f"held-out loss ({task['unit']})")
    for connection, color in colors.items():
        runs = [run for run in record["tasks"]["digits"]["runs"] if run["connection"] == connection]
        norms = [np.mean(run["gradient norm"]) for run in runs]
        axes[1].loglog([run["depth"] for run in runs], norms, "o-", color=color, label=connection)
    axes[1].set(title="digits, before training", xlabel="layers", ylabel="gradient norm at layer 0")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, 10 layers: shows that it runs")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="the others stay as they are")
    parser.add_argument("--output", type=Path, help="default: the recorded result, of a full run")
    options = parser.parse_args()
    seeds, every = (1, 10) if options.quick else (3, 10)
    output = output_file(options.output, RESULT.name, full=not options.quick)
    record: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"tasks": {}}
    for name in options.tasks:
        task = TASKS[name]()
        if options.quick:
            task = replace(task, steps=20, depths=task.depths[:1])
        runs = []
        for depth in task.depths:
            for connection in task.connections:
                run = train(task, connection, depth, seeds, every)
                runs.append({"depth": depth, "connection": connection, **run})
                loss, accuracy = np.mean(run["loss"][-1]), np.mean(run["accuracy"])
                print(f"{name}, {depth} layers, {connection}: loss {loss:.3f}, accuracy {accuracy:.1%}", flush=True)
        record["tasks"][name] = {
            "environment": environment("flax", "optax", "scikit-learn"),
            "seeds": seeds,
            "depths": task.depths,
            "steps": task.steps,
            "learning rate": task.learning_rate,
            "unit": "nats" if task.unit == 1 else "bits per byte",
            "target": task.target,
            "runs": runs,
        }
        write_json(output, record)


if __name__ == "__main__":
    main()
