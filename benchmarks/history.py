"""What history mixing costs over a plain residual network, and over the published PyTorch package.

    python -m benchmarks.history [--quick] [--parts overhead compile published linearity] [--output FILE]

Every network is a stack of L square linear layers, ``x W + b``, and every timing a whole training step: loss,
gradients, Adam. A ratio compares candidates that took turns in one run, round by round: median [10th, 90th percentile].
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.record import output_file
from benchmarks.timing import Spread, environment, interleaved, ratio, write_json
from mhc_jax import MHCConfig, apply_layers

LEARNING_RATE = 1e-4


def branch(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def residual_scan(params: Any, x: jax.Array) -> jax.Array:
    """The yardstick: a residual network as anyone would write it."""
    return jax.lax.scan(lambda x, layer: (x + branch(layer, x), None), x, params["layers"])[0]


def history(params: Any, x: jax.Array) -> jax.Array:
    config = MHCConfig(max_history=params["logits"].shape[1])
    return apply_layers(branch, params["layers"], x, params["logits"], config)


def window_scan(params: Any, x: jax.Array) -> jax.Array:
    """History mixing with the window as the carry and plain autodiff: what the tape replaces."""
    depth, size = params["logits"].shape
    live = jnp.arange(size) >= size - jnp.minimum(jnp.arange(depth) + 1, size)[:, None]
    weights = jax.nn.softmax(jnp.where(live, params["logits"], -jnp.inf))

    def body(window: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        x = branch(layer[0], window[-1]) + jnp.tensordot(layer[1], window, axes=1)
        return jnp.concatenate([window[1:], x[None]]), None

    window = jnp.zeros((size, *x.shape)).at[-1].set(x)
    return jax.lax.scan(body, window, (params["layers"], weights))[0][-1]


def problem(depth: int, width: int, batch: int, max_history: int) -> tuple[Any, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    # Small enough that hundreds of linear layers neither explode nor die out.
    w = rng.normal(size=(depth, width, width)) * 0.3 / (width * depth) ** 0.5
    layers = {"w": jnp.asarray(w, jnp.float32), "b": jnp.zeros((depth, width))}
    x, y = (jnp.asarray(rng.normal(size=(batch, width)), jnp.float32) for _ in range(2))
    return {"layers": layers, "logits": jnp.zeros((depth, max_history))}, x, y


def lowered_step(network: Callable[..., jax.Array], sizes: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """The training step, lowered for donated arguments, and its first arguments."""
    params, x, y = problem(*sizes)
    optimizer = optax.adam(LEARNING_RATE)

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(lambda params: jnp.mean((network(params, x) - y) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    arguments = (params, optimizer.init(params), x, y)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments), arguments


def train_step(network: Callable[..., jax.Array], sizes: tuple[int, int, int, int]) -> tuple[Callable[[], Any], int]:
    """A call that trains for one step and returns the loss, and the bytes of its temporaries."""
    lowered, (params, state, x, y) = lowered_step(network, sizes)
    compiled = lowered.compile()

    def call() -> jax.Array:
        nonlocal params, state
        params, state, loss = compiled(params, state, x, y)
        return loss

    return call, compiled.memory_analysis().temp_size_in_bytes


def overhead(quick: bool) -> list[dict[str, Any]]:
    rows = []
    sizes = [(50, 64, 32), (50, 256, 128), (200, 256, 128), (50, 1024, 512)]
    for size in sizes[: 2 if quick else None]:
        networks = {"residual": residual_scan, "history": history, "window": window_scan}
        made = {name: train_step(network, (*size, 4)) for name, network in networks.items()}
        samples = interleaved({name: call for name, (call, _) in made.items()}, seconds=2 if quick else 8)
        residual_memory = made["residual"][1]
        row: dict[str, Any] = dict(zip("LCB", size, strict=True))
        row["residual_ms"] = Spread.of(1e3 * samples["residual"])
        row["history_time"] = ratio(samples, "history", "residual")
        row["window_time"] = ratio(samples, "window", "residual")
        row["history_memory"] = made["history"][1] / residual_memory
        row["history_memory_H16"] = train_step(history, (*size, 16))[1] / residual_memory
        row["window_memory"] = made["window"][1] / residual_memory
        rows.append(row)
        show(row)
    return rows


def compile_time(quick: bool) -> list[dict[str, Any]]:
    def seconds(depth: int) -> float:
        lowered, _ = lowered_step(history, (depth, 32, 16, 4))
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    jax.config.update("jax_enable_compilation_cache", False)
    samples = [(seconds(10), seconds(1000)) for _ in range(2 if quick else 5)]
    short, long = np.array(samples).T
    row = {"L10_s": Spread.of(short), "L1000_s": Spread.of(long), "ratio": Spread.of(long / short)}
    show(row)
    return [row]


def published(quick: bool) -> list[dict[str, Any]]:
    rows = []
    sizes = [(50, 64, 32), (50, 256, 128), (50, 1024, 512)]
    for depth, width, batch in sizes[: 1 if quick else None]:
        size = (depth, width, batch, 4)
        ours, _ = train_step(history, size)
        residual, _ = train_step(residual_scan, size)
        calls: dict[str, Callable[[], Any]] = {"ours": ours, "our residual": residual, "eager": torch_step(size)}
        if width == 64:
            # Compiling takes a minute for fifty unrolled layers; one size tells what it gains.
            calls["torch.compile"] = torch_step(size, compiled=True)
        samples = interleaved(calls, seconds=2 if quick else 12)
        row: dict[str, Any] = {"L": depth, "C": width, "B": batch, "H": 4, "ours_ms": Spread.of(1e3 * samples["ours"])}
        for name in calls:
            if name != "ours":
                row[f"{name} / ours"] = ratio(samples, name, "ours")
        rows.append(row)
        show(row)
    return rows


def torch_step(sizes: tuple[int, int, int, int], compiled: bool = False) -> Callable[[], Any]:
    """The same step with the published package, gradients through history, on the same numbers."""
    import mhc
    import torch

    depth, width, _, max_history = sizes
    params, x, y = problem(*sizes)
    linears = [torch.nn.Linear(width, width) for _ in range(depth)]
    for linear, w in zip(linears, np.asarray(params["layers"]["w"]), strict=True):
        linear.weight.data = torch.tensor(w.T.copy())
        linear.bias.data.zero_()
    model = mhc.MHCSequential(linears, max_history=max_history, mode="mhc", constraint="simplex", detach_history=False)
    for skip in model.skip_layers:
        skip.mixing_logits.data.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    inputs, targets = torch.tensor(np.array(x)), torch.tensor(np.array(y))
    forward = torch.compile(model) if compiled else model

    def call() -> float:
        optimizer.zero_grad()
        loss = torch.mean((forward(inputs) - targets) ** 2)
        loss.backward()
        optimizer.step()
        return loss.item()

    # Both sides must compute the same before their times mean anything.
    ours = float(jnp.mean((history(params, x) - y) ** 2))
    theirs = torch.mean((model(inputs) - targets) ** 2).item()
    if not np.isclose(ours, theirs, rtol=1e-5):
        raise RuntimeError(f"the two networks disagree: loss {ours} here, {theirs} in the published package")
    return call


def linearity(quick: bool) -> list[dict[str, Any]]:
    """Step times over H at L=50, and over L at H=4, per layer."""
    points = [(50, h) for h in (1, 2, 4, 8, 16)] + [(depth, 4) for depth in (10, 100, 1000)]
    calls = {point: train_step(history, (point[0], 64, 32, point[1]))[0] for point in points[: 3 if quick else None]}
    samples = interleaved({str(point): call for point, call in calls.items()}, seconds=2 if quick else 15)
    rows = []
    for depth, max_history in calls:
        per_layer = Spread.of(1e6 * samples[str((depth, max_history))] / depth)
        rows.append({"L": depth, "H": max_history, "us_per_layer": per_layer})
        show(rows[-1])
    return rows


PARTS = {"overhead": overhead, "compile": compile_time, "published": published, "linearity": linearity}


def show(row: dict[str, Any]) -> None:
    cells = (f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
    print("  " + "   ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds for each part, small networks only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="default: the recorded result, of a full run")
    options = parser.parse_args()
    output = output_file(options.output, "history-cpu.json", full=not options.quick)
    record = json.loads(output.read_text()) if output.exists() else {}
    for name in options.parts:
        print(name)
        rows = PARTS[name](options.quick)
        # Parts not asked for stay as they are, so each says where it was measured.
        record[name] = {"environment": environment("jaxlib", "optax", "torch", "mhc"), "rows": rows}
        write_json(output, record)


if __name__ == "__main__":
    main()
