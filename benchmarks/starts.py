"""From which start maps of streams learn: `python -m benchmarks.starts [--quick] [--output FILE]`.

Trains decoders of 8 branches on the text of the Python language reference, once with a residual connection and with
streams from every start, and records the loss, and how far the maps of the tokens have moved: the mean over tokens,
branches and entries of |map - map at the start|. Seeds differ in initial weights and in batches.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.record import RESULTS, output_file
from benchmarks.timing import environment, write_json
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.nn import ConnectionParam
from mhc_jax.streams import Maps, expand, maps

WIDTH, BRANCHES, STREAMS, BATCH, LENGTH, STEPS, SEEDS, RATE = 64, 8, 4, 8, 64, 240, 3, 3e-3
RESULT = RESULTS / "starts.json"
TEXT = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
TRAINED = TEXT[: len(TEXT) * 9 // 10]  # the rest is held out

# By name: the start, what alpha is set to, and what the rate of the maps is multiplied by; None is residual.
STARTS: dict[str, tuple[str, float | None, float] | None] = {
    "residual": None,
    '"identity"': ("identity", None, 1.0),
    '"identity", alpha = 1': ("identity", 1.0, 1.0),
    '"identity", maps at 10 times the rate': ("identity", None, 10.0),
    '"mixed"': ("mixed", None, 1.0),
}


def batches(text: np.ndarray, seed: int, steps: int) -> jax.Array:
    begins = np.random.default_rng(seed).integers(0, len(text) - LENGTH, (steps, BATCH, 1))
    return jnp.asarray(text[begins + np.arange(LENGTH + 1)], jnp.int32)


def network(name: str, seed: int) -> Any:
    config = DecoderConfig(256, WIDTH, mlp_features=8 * WIDTH // 3, depth=BRANCHES // 2, num_heads=4, tied=True)
    kind = STARTS[name]
    if kind is None:
        return Decoder(config, rngs=nnx.Rngs(seed))
    start, alpha, _ = kind
    model = Decoder(config, "streams", streams=STREAMS, start=start, rngs=nnx.Rngs(seed))
    if alpha is not None:
        for connection in (model.stack.layers.attn_hc, model.stack.layers.ffn_hc):
            connection.alpha[...] = jnp.full_like(connection.alpha[...], alpha)
    return model


def token_maps(model: Any, tokens: jax.Array) -> Maps:
    """The maps of every branch in order and of every token."""
    graphdef, params = nnx.split(model.stack.layers)

    def step(wide: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        layer = nnx.merge(graphdef, params)
        found = []
        for connection, branch in ((layer.attn_hc, layer.attend), (layer.ffn_hc, layer.transform)):
            found.append(maps(connection.params(), wide, connection.config))
            wide = connection.around(branch, wide)
        return wide, jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    found: Maps = jax.lax.scan(step, expand(model.embed_tokens(tokens), STREAMS), params)[1]
    return found


def train(name: str, seeds: int, steps: int) -> list[dict[str, float]]:
    """Bits per byte of held-out text, and how far each map has moved, of every seed."""
    graphdef, params, *others = nnx.split(network(name, 0), nnx.Param, ...)
    rest: Any = others[0]
    kind = STARTS[name]
    factor = 1.0 if kind is None else kind[2]

    def rates(variable: Any) -> Any:
        return jax.tree.map(lambda _: factor if isinstance(variable, ConnectionParam) else 1.0, variable)

    faster = jax.tree.map(rates, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    optimizer = optax.adam(RATE)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest).loss(tokens) / jnp.log(2)

    def step(carry: Any, tokens: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, tokens), state)
        updates = jax.tree.map(lambda leaf, rate: rate * leaf, updates, faster)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any, tokens: jax.Array, held_out: jax.Array) -> tuple[jax.Array, Any]:
        (learned, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), tokens)
        value = loss(learned, held_out)
        if kind is None:
            return value, {}
        before, after = (token_maps(nnx.merge(graphdef, one, rest), held_out[:16, :-1]) for one in (params, learned))
        return value, jax.tree.map(lambda one, other: abs(one - other).mean(), before, after)._asdict()

    runs = []
    held_out = batches(TEXT[len(TRAINED) :], 0, 16).reshape(-1, LENGTH + 1)
    for seed in range(seeds):
        value, moved = run(nnx.state(network(name, seed), nnx.Param), batches(TRAINED, seed, steps), held_out)
        runs.append({"bits per byte": float(value)} | {f"H_{part}": float(far) for part, far in moved.items()})
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10 steps, one seed")
    parser.add_argument("--output", type=Path, help="default: the recorded result, of a full run")
    arguments = parser.parse_args()
    output = output_file(arguments.output, RESULT.name, full=not arguments.quick)
    seeds, steps = (1, 10) if arguments.quick else (SEEDS, STEPS)
    runs = {}
    for name in STARTS:
        runs[name] = train(name, seeds, steps)
        means = {key: round(float(np.mean([run[key] for run in runs[name]])), 4) for key in runs[name][0]}
        print(f"{name}: {means}", flush=True)
    write_json(output, {"environment": environment("flax", "optax"), "steps": steps, "runs": runs})


if __name__ == "__main__":
    main()
