"""How much the residual maps of n streams amplify: `python -m benchmarks.stream_gain [--quick] [--output FILE]`.

Trains decoders with unconstrained (HC) and doubly stochastic (mHC) residual maps on the text of the Python
language reference, and measures the composite gain of arXiv 2512.24880, section 3.1: of the product of the residual
maps of all layers, the largest absolute row sum (forward) or column sum (backward), whichever is larger.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from benchmarks.record import RESULTS, output_file
from benchmarks.timing import environment, write_json
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.monitoring.figures import composite_gain
from mhc_jax.streams import expand, maps

WIDTH, STREAMS, BATCH, LENGTH, EVERY = 32, 4, 4, 32, 10
RESULT = RESULTS / "stream-gain.json"
FIGURE = Path("docs/images/stream_gain.png")
TEXT = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)


def batch(seed: int) -> jax.Array:
    starts = np.random.default_rng(seed).integers(0, len(TEXT) - LENGTH, BATCH)
    return jnp.asarray(TEXT[starts[:, None] + np.arange(LENGTH + 1)], jnp.int32)


def residual_maps(model: Any, tokens: jax.Array) -> jax.Array:
    """H_res of every branch in order and of every token: (2 * depth, tokens, n, n)."""
    graphdef, params = nnx.split(model.stack.layers)

    def step(wide: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        layer = nnx.merge(graphdef, params)
        found = []
        for connection, branch in ((layer.attn_hc, layer.attend), (layer.ffn_hc, layer.transform)):
            found.append(maps(connection.params(), wide, connection.config).res)
            wide = connection.around(branch, wide)
        return wide, jnp.stack(found)

    _, found = jax.lax.scan(step, expand(model.embed_tokens(tokens), STREAMS), params)
    return found.reshape(-1, tokens.size, STREAMS, STREAMS)


def train(constraint: Any, branches: int, steps: int) -> dict[str, list[float]]:
    """Bits per byte, and the gain's mean and maximum over tokens, every `EVERY` steps."""
    config = DecoderConfig(256, WIDTH, mlp_features=8 * WIDTH // 3, depth=branches // 2, num_heads=2, tied=True)
    model = Decoder(config, "streams", constraint=constraint, streams=STREAMS, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, tokens: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return model.loss(tokens) / jnp.log(2)

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    @nnx.jit
    def gain(model: Any, tokens: jax.Array) -> jax.Array:
        forward, backward = jax.vmap(composite_gain, in_axes=1)(residual_maps(model, tokens))
        return jnp.maximum(forward, backward)

    record: dict[str, list[float]] = {"step": [], "bits per byte": [], "mean gain": [], "largest gain": []}
    for i in range(steps + 1):
        bits = step(model, optimizer, batch(i))
        if i % EVERY == 0:
            gains = gain(model, batch(0)[:, :-1])
            values: tuple[Any, ...] = (i, bits, gains.mean(), gains.max())
            for name, value in zip(record, values, strict=True):
                record[name].append(float(value))
    return record


def draw(record: Mapping[str, Any], path: Path) -> None:
    """The largest gains and the losses of a recorded run, beside each other."""
    figure, (gains, losses) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for name, run in record["runs"].items():
        gains.semilogy(run["step"], run["largest gain"], label=name)
        losses.plot(run["step"], run["bits per byte"], label=name)
    gains.set(xlabel="step", ylabel="composite gain, largest of all tokens")
    losses.set(xlabel="step", ylabel="bits per byte")
    gains.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 steps of the smaller network")
    parser.add_argument("--output", type=Path, help="default: the recorded result, of a full run")
    arguments = parser.parse_args()
    output = output_file(arguments.output, RESULT.name, full=not arguments.quick)
    names = {"none": "HC", "sinkhorn": "mHC"}
    runs = {}
    for branches in (30,) if arguments.quick else (30, 100):
        for constraint in names:
            name = f"{names[constraint]}, {branches} layers"
            runs[name] = train(constraint, branches, 10 if arguments.quick else 150)
            largest, bits = max(runs[name]["largest gain"]), runs[name]["bits per byte"][-1]
            print(f"{name}: largest gain {largest:.3g}, {bits:.3f} bits per byte", flush=True)
    write_json(output, {"environment": environment("flax"), "runs": runs})


if __name__ == "__main__":
    main()
