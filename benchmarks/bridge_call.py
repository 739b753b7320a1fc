"""What a call from torch into JAX costs, against a hand-written autograd function for one fixed signature."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

import bridge
from benchmarks.timing import Spread, environment, interleaved, ratio, write_json


def function(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


_forward = jax.jit(function)
_backward = jax.jit(lambda x, w, cotangent: jax.vjp(function, x, w)[1](cotangent))


class Floor(torch.autograd.Function):
    """Nothing but the two conversions and the two compiled functions: no checks, no pytrees, no `torch.compile`."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        result = _forward(*(jax.dlpack.from_dlpack(t.detach()) for t in tensors))
        return torch.from_dlpack(jax.block_until_ready(result))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = [t.detach() for t in (*ctx.saved_tensors, *cotangents)]
        results = _backward(*(jax.dlpack.from_dlpack(t) for t in tensors))
        return tuple(torch.from_dlpack(r) for r in jax.block_until_ready(results))


def main(output: Path, quick: bool) -> None:
    """Measures 8x8 inputs, where only the fixed cost counts, and prints and records microseconds and ratios."""
    x, w = torch.randn(8, 8), torch.randn(8, 8)
    x_grad, w_grad = x.clone().requires_grad_(), w.clone().requires_grad_()
    cotangent = torch.ones(8, 8)

    def forward(call: Any) -> Any:
        return call(x, w)

    def there_and_back(call: Any) -> Any:
        return torch.autograd.grad(call(x_grad, w_grad), [x_grad, w_grad], cotangent)

    calls = {"floor": Floor.apply, "JaxFunction": bridge.JaxFunction(function)}
    record: dict[str, Any] = {}
    for kind, run in {"forward": forward, "forward and backward": there_and_back}.items():
        samples = interleaved(
            {name: partial(run, call) for name, call in calls.items()}, seconds=1 if quick else 5, warmup=50
        )
        times = {name: Spread.of(seconds * 1e6) for name, seconds in samples.items()}
        record[kind] = {"microseconds": times, "times the floor": ratio(samples, "JaxFunction", "floor")}
        print(f"{kind}: floor {times['floor']} µs, JaxFunction {times['JaxFunction']} µs,", end=" ")
        print(f"{record[kind]['times the floor']} times the floor", flush=True)
    write_json(output, {**record, **environment("torch", "flax")})
