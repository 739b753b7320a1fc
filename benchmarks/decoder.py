"""What a connection costs a decoder: `python -m benchmarks.decoder [--quick] [--output FILE]`.

Whole Adam steps of decoders that differ in nothing but the connection, in turns, on this machine's CPU: width 512, 8
layers, 512 tokens, float32. The goal is 1.05 of the residual decoder's time with history and 1.15 with streams.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.markdown import NOT_RECORDED, markdown
from benchmarks.record import output_file
from benchmarks.streams import QUICK_SHAPE, SHAPE, jax_step, random_tokens, sizes
from benchmarks.timing import environment, interleaved, ratio, write_json
from mhc_jax.models import Decoder, DecoderConfig

SECONDS = 60.0  # of a full run
GOALS = {"history": 1.05, "streams": 1.15}
RESULT = "decoder-cpu.json"


def measure(shape: dict[str, int], seconds: float) -> dict[str, Any]:
    """Time and temporary memory of each connection over the residual decoder's, round by round, and the goals."""
    inputs = random_tokens(shape)

    def step(connection: Any) -> Any:
        return jax_step(Decoder(DecoderConfig(**sizes(shape)), connection, rngs=nnx.Rngs(0)), inputs)

    steps = {connection: step(connection) for connection in ("residual", *GOALS)}
    times = interleaved({name: call for name, (call, _) in steps.items()}, seconds=seconds)
    memory = {name: size for name, (_, size) in steps.items()}
    found: dict[str, Any] = {"residual (ms)": 1e3 * float(np.median(times["residual"]))}
    for name, goal in GOALS.items():
        over = {"time": ratio(times, name, "residual"), "temporary memory": memory[name] / memory["residual"]}
        found[name] = over | {"goal of time": goal}
    return found


def table(records: Mapping[str, Any]) -> str:
    """What was recorded, beside the goals."""
    if RESULT not in records:
        return NOT_RECORDED
    record = records[RESULT]
    rows = []
    for name in GOALS:
        found = record[name]
        time = "{median:.2f} ({p10:.2f} to {p90:.2f})".format(**found["time"])
        rows.append([name, time, f"{found['goal of time']:.2f}", f"{found['temporary memory']:.2f}"])
    place = record["environment"]
    text = markdown(["over the residual decoder", "time", "goal", "temporary memory"], rows)
    return f"{text}\n{place['processor']}, {place['cores']} cores; {place['date']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seconds, a small network")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measurement")
    parser.add_argument("--output", type=Path, help="default: the recorded result, of a full run")
    given = parser.parse_args()
    shape, seconds = (QUICK_SHAPE, 2.0) if given.quick else (SHAPE | {"depth": 8}, given.seconds)
    output = output_file(given.output, RESULT, full=seconds >= SECONDS)
    record = {"environment": environment("flax"), "shape": shape, **measure(shape, seconds)}
    for name, goal in GOALS.items():
        print(f"{name}, over residual: time {record[name]['time']}, the goal is {goal}", flush=True)
    write_json(output, record)


if __name__ == "__main__":
    main()
