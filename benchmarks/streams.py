"""What n residual streams cost: `python -m benchmarks.streams [--device cpu|cuda] [--quick] [--output FILE]`.

Whole Adam steps of a decoder with streams over the residual one of the same framework, all in one
run in turns: ours in JAX and PyTorch, beside the `hyper-connections` package (its mHC). And Sinkhorn alone, and the
boundary of PyTorch by itself (`benchmarks.stream_kernels`). On a GPU (`--device cuda`) those of PyTorch alone.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from hyper_connections.manifold_constrained_hyper_connections import get_init_and_expand_reduce_stream_functions
from torch import nn

import mhc_jax.models as jax_models
import mhc_torch.models as torch_models
from benchmarks import stream_kernels
from benchmarks.record import output_file
from benchmarks.timing import Spread, environment, interleaved, ratio, write_json
from mhc_jax.sinkhorn import sinkhorn

VOCABULARY, STREAMS = 256, 4
Connection = Literal["residual", "history", "streams"]
Shape = dict[str, int]
SECONDS = 20.0  # of a full run, for each part
SHAPE: Shape = {"features": 512, "mlp_features": 1360, "num_heads": 8, "depth": 4, "length": 512}
QUICK_SHAPE: Shape = {"features": 64, "mlp_features": 168, "num_heads": 2, "depth": 2, "length": 64}


def sizes(shape: Shape) -> dict[str, Any]:
    """What `DecoderConfig` of either framework takes."""
    return {"vocabulary": VOCABULARY, "tied": True} | {name: shape[name] for name in shape if name != "length"}


def random_tokens(shape: Shape) -> np.ndarray:
    """One sequence and the token after it: (1, length + 1)."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (1, shape["length"] + 1))


def jax_step(model: nnx.Module, inputs: np.ndarray) -> tuple[Callable[[], Any], int]:
    """A jitted, donating Adam step, and the bytes of its temporary memory."""
    graphdef, params = nnx.split(model)
    optimizer = optax.adam(1e-3)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        merged: Any = nnx.merge(graphdef, params)
        return merged.loss(tokens)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    tokens = jnp.asarray(inputs)
    carry = [params, optimizer.init(params)]
    compiled = step.lower(*carry, tokens).compile()
    memory = compiled.memory_analysis()
    assert memory is not None

    def call() -> jax.Array:
        *carry[:], value = compiled(*carry, tokens)
        return value

    return call, memory.temp_size_in_bytes


def torch_step(model: nn.Module, inputs: np.ndarray, compile: bool, device: str) -> Callable[[], Any]:
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    tokens = torch.from_numpy(inputs).to(device)

    run: Any = torch.compile(model) if compile else model

    def call() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        stream_kernels.synchronize(device)

    return call


class NaiveLayer(nnx.Module):
    """The equations written down plainly, differentiated by JAX: what users write first."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, streams: jax.Array) -> jax.Array:
        layer = self.layer
        for connection, branch in ((layer.attn_hc, layer.attend), (layer.ffn_hc, layer.transform)):
            phi, alpha, bias = connection.phi[...], connection.alpha[...], connection.bias[...]
            n = streams.shape[-2]
            flat = streams.reshape(*streams.shape[:-2], -1)
            normalized = flat / jnp.sqrt(jnp.mean(flat**2, -1, keepdims=True) + 1e-6)
            logits = normalized @ phi * jnp.repeat(alpha, np.array([n, n, n * n])) + bias
            pre, post = jax.nn.sigmoid(logits[..., :n]), 2 * jax.nn.sigmoid(logits[..., n : 2 * n])
            res = plain_sinkhorn(logits[..., 2 * n :].reshape(*logits.shape[:-1], n, n))
            output = branch(jnp.einsum("...n,...nc->...c", pre, streams))
            streams = jnp.einsum("...ij,...jc->...ic", res, streams) + post[..., None] * output[..., None, :]
        return streams


def plain_sinkhorn(logits: jax.Array) -> jax.Array:
    matrix = jnp.exp(logits - logits.max((-2, -1), keepdims=True))
    for _ in range(20):
        matrix = matrix / matrix.sum(-2, keepdims=True)
        matrix = matrix / matrix.sum(-1, keepdims=True)
    return matrix


class PackageDecoder(nn.Module):
    """Our decoder with the mHC of the `hyper-connections` package around its branches."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        model = torch_decoder(shape, "residual").model
        self.embed, self.norm = model.embed_tokens, model.norm
        wrap, self.expand, self.reduce = get_init_and_expand_reduce_stream_functions(STREAMS, dim=shape["features"])
        layers: Any = model.layers
        pairs = [pair for layer in layers for pair in _branches(layer)]
        branches = [nn.Sequential(norm, branch) for norm, branch in pairs]
        self.layers = nn.ModuleList(wrap(branch=branch, layer_index=i) for i, branch in enumerate(branches))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.expand(self.embed(tokens))
        for layer in self.layers:
            x = layer(x)
        return nn.functional.linear(self.norm(self.reduce(x)), self.embed.weight)


def _branches(layer: Any) -> tuple[tuple[nn.Module, nn.Module], ...]:
    return (layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)


def torch_decoder(shape: Shape, connection: Connection) -> torch_models.Decoder:
    return torch_models.Decoder(torch_models.DecoderConfig(**sizes(shape)), connection)


def measure_jax(shape: Shape, seconds: float, _: str) -> dict[str, Any]:
    inputs = random_tokens(shape)

    def model(connection: Connection) -> Any:
        return jax_models.Decoder(jax_models.DecoderConfig(**sizes(shape)), connection, rngs=nnx.Rngs(0))

    naive = model("streams")
    naive.stack.layers = NaiveLayer(naive.stack.layers)
    steps = {
        name: jax_step(network, inputs)
        for name, network in {"residual": model("residual"), "mhc_jax": model("streams"), "naive": naive}.items()
    }
    times = interleaved({name: call for name, (call, _) in steps.items()}, seconds=seconds)
    memory = {name: used for name, (_, used) in steps.items()}
    return {
        "residual step (ms)": Spread.of(1e3 * times["residual"]),
        **{f"{name}: time": ratio(times, name, "residual") for name in ("mhc_jax", "naive")},
        **{f"{name}: temporary memory": memory[name] / memory["residual"] for name in ("mhc_jax", "naive")},
    }


def measure_torch(shape: Shape, seconds: float, device: str, compile: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = random_tokens(shape)
    models = {
        "residual": torch_decoder(shape, "residual"),
        "mhc_torch": torch_decoder(shape, "streams"),
        "hyper-connections": PackageDecoder(shape),
    }
    steps = {name: torch_step(model, inputs, compile, device) for name, model in models.items()}
    times = interleaved(steps, seconds=seconds)
    added = {name: times[name] - times["residual"] for name in ("mhc_torch", "hyper-connections")}
    return {
        "residual step (ms)": Spread.of(1e3 * times["residual"]),
        **{f"{name}: time": ratio(times, name, "residual") for name in added},
        "what mhc_torch adds / what hyper-connections adds": ratio(added, "mhc_torch", "hyper-connections"),
    }


def measure_sinkhorn(shape: Shape, seconds: float, _: str) -> dict[str, Any]:
    """Of 128 matrices for every token of a sequence."""
    tokens = 128 * shape["length"]
    logits, cotangent = jax.random.normal(jax.random.key(0), (2, tokens, 4, 4))

    def compiled(function: Callable[[jax.Array], jax.Array]) -> Any:
        def forward_and_backward(logits: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
            matrix, pullback = jax.vjp(function, logits)
            return matrix, pullback(cotangent)[0]

        return jax.jit(forward_and_backward).lower(logits, cotangent).compile()

    programs = {"fused": compiled(sinkhorn), "plain": compiled(plain_sinkhorn)}
    times = interleaved(
        {name: partial(program, logits, cotangent) for name, program in programs.items()}, seconds=seconds
    )
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    return {
        "fused (ms)": Spread.of(1e3 * times["fused"]),
        "plain / fused: time": ratio(times, "plain", "fused"),
        "fused / plain: temporary memory": memory["fused"] / memory["plain"],
    }


def roofline(shape: Shape, seconds: float, _: str) -> dict[str, Any]:
    """What the streams must move at least in a step, at the rate at which this machine copies that much memory.

    Bytes per token and branch, after fusion (arXiv 2512.24880, section 4.3.1): forward reads X twice (maps and input;
    merge) and y, writes x and X; backward reads X, dX, y, dx and writes dX, dy.
    """
    width, length = shape["features"], shape["length"]
    state = STREAMS * width
    floats = (2 * state + width) + (width + state) + (2 * state + 2 * width) + (state + width)
    moved = 4 * floats * length * 2 * shape["depth"]
    source = jnp.ones(length * state)
    copy = jax.jit(lambda x: x + 1).lower(source).compile()
    times = interleaved({"copy": partial(copy, source)}, seconds=seconds)
    rate = 2 * source.nbytes / np.median(times["copy"])
    return {
        "bytes moved a step": moved,
        "copy (GB/s)": rate / 1e9,
        "least time of the streams (ms)": 1e3 * moved / rate,
    }


def measure_boundary(shape: Shape, seconds: float, device: str) -> dict[str, Any]:
    """Sizes of its own: those of a GPU."""
    return stream_kernels.measure(device, shape is QUICK_SHAPE or device == "cpu", seconds)


PARTS: dict[str, Callable[[Shape, float, str], dict[str, Any]]] = {
    "jax": measure_jax,
    "roofline": roofline,
    "sinkhorn": measure_sinkhorn,
    "torch": partial(measure_torch, compile=False),
    "torch-compiled": partial(measure_torch, compile=True),
    "torch-boundary": measure_boundary,
}
ON_GPU = [part for part in PARTS if part.startswith("torch")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=f"default: all; on a GPU {', '.join(ON_GPU)}")
    parser.add_argument("--quick", action="store_true", help="a second for each part, small networks only")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measurement for each part")
    parser.add_argument("--output", type=Path, help="default: the recorded result, of a full run")
    arguments = parser.parse_args()
    shape, seconds = (QUICK_SHAPE, 1.0) if arguments.quick else (SHAPE, arguments.seconds)
    stream_kernels.check_device(device := arguments.device)
    parts = arguments.parts or (ON_GPU if device == "cuda" else list(PARTS))
    if device == "cuda" and (unserved := [part for part in parts if part not in ON_GPU]):
        parser.error(f"--parts {' '.join(unserved)}: with --device cuda it must be of {', '.join(ON_GPU)}")
    output = output_file(arguments.output, f"streams-{device}.json", full=seconds >= SECONDS)
    record = json.loads(output.read_text()) if output.exists() else {}
    packages = "flax", "torch", "triton", "hyper-connections", "liger_kernel", "transformer_engine"
    record["environment"] = environment(*packages)
    if device == "cuda":
        record["environment"]["devices"] = [torch.cuda.get_device_name()]
    record["shape"] = shape | {"branches": 2 * shape["depth"], "batch": 1, "streams": STREAMS}
    for part in parts:
        record[part] = PARTS[part](shape, seconds, device)
        print(part, *(f"  {key}: {value}" for key, value in record[part].items()), sep="\n", flush=True)
        write_json(output, record)


if __name__ == "__main__":
    main()
