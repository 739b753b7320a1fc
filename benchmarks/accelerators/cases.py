"""What the lab compiles. A case is an entry of `CASES`: programs that do the same work in several ways."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.accelerators import maxtext
from benchmarks.accelerators.peers import Peer, peers
from mhc_jax import streams
from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.nn import MHCStack

DEPTH = 16
STREAM_TOKENS, STREAM_DEPTH = 4096, 4
WAYS: tuple[streams.Implementation, ...] = ("xla", "pallas")
MAXTEXT = "maxtext"
# The implementations that are kernels: their schedules are read, which takes the compiler long.
KERNELS = ("pallas", MAXTEXT)


@dataclass(frozen=True)
class Program:
    """A function and the shapes of its arguments; what is donated may be written over."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """The same work, done in several ways.

    Attributes:
        implementations: makes the program of each, for the share of the tokens that the target has room for.
        over: what the bytes are set against: another of the implementations, or None for the least possible.
        least: the least bytes that the work can move, of the program; None for all arguments and results once.
        quick: whether `--quick` has it.
        only: of an implementation that is for one platform, which.
        peers: kernels of others in Triton that do the same.
    """

    implementations: Mapping[str, Callable[[float], Program]]
    over: str | None = None
    least: int | None = None
    quick: bool = False
    only: Mapping[str, str] = field(default_factory=dict)
    peers: Mapping[str, Peer] = field(default_factory=dict)


class MLP(nnx.Module):
    """A GELU network of four times the width after a norm, in bfloat16 with parameters in float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(self.norm(x))))


class Attention(nnx.Module):
    """Causal attention of heads of 128 after a norm, over sequences of 512."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(width, dtype=jnp.bfloat16, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = self.qkv(self.norm(x)).reshape(-1, 512, 3, x.shape[-1] // 128, 128)
        q, k, v = (heads[:, :, i] for i in range(3))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


def history(
    branch: type[MLP | Attention], width: int, scale: float, *, backward: bool = True, **options: Any
) -> Program:
    """A stack of 16 layers, forward or the gradient of its parameters."""
    stack = nnx.eval_shape(lambda: MHCStack(partial(_branch, branch, width), DEPTH, rngs=nnx.Rngs(0), **options))
    graphdef, params = nnx.split(stack)
    if width > 2048:
        # In float32 the parameters of so wide a stack alone fill a chip.
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    tokens = int(min(8192, 8192 * 2048 // width // 512 * 512) * scale)
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return forward(params, x).astype(jnp.float32).mean()

    return Program(jax.grad(loss) if backward else forward, (params, x))


def _branch(branch: type[MLP | Attention], width: int, rngs: nnx.Rngs) -> MLP | Attention:
    return branch(width, rngs=rngs)


def read(n: int, width: int, implementation: streams.Implementation, scale: float, *, backward: bool) -> Program:
    """The branch's input and the maps, or the derivatives of all arguments; the latter projects the streams again."""
    config = streams.StreamConfig(n)
    params = jax.eval_shape(lambda: streams.init_params(config, width))
    call = partial(streams.read, config=config, implementation=implementation)
    return _forward_or_backward(call, (params, _tokens(n, width)), backward)


def write(n: int, width: int, implementation: streams.Implementation, scale: float, *, backward: bool) -> Program:
    """The merge of the branch's output into the streams, or the derivatives of all arguments."""
    call = partial(streams.write, implementation=implementation)
    maps = _tokens(n, dtype=jnp.float32), _tokens(n, n, dtype=jnp.float32)
    return _forward_or_backward(call, (_tokens(n, width), _tokens(width), *maps), backward)


def boundary(n: int, width: int, implementation: streams.Implementation, scale: float, *, backward: bool) -> Program:
    """The write of one branch and the read of the next, or the derivatives of all arguments."""
    config = streams.StreamConfig(n)
    params = jax.eval_shape(lambda: streams.init_params(config, width))
    call = partial(streams.boundary, config=config, implementation=implementation)
    maps = _tokens(n, dtype=jnp.float32), _tokens(n, n, dtype=jnp.float32)
    return _forward_or_backward(call, (params, _tokens(n, width), _tokens(width), *maps), backward)


def _tokens(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((STREAM_TOKENS, *shape), dtype)


def _forward_or_backward(function: Callable[..., Any], arguments: tuple[Any, ...], backward: bool) -> Program:
    if not backward:
        return Program(function, arguments)

    def derivatives(arguments: tuple[Any, ...], cotangent: Any) -> Any:
        return jax.vjp(function, *arguments)[1](cotangent)

    return Program(derivatives, (arguments, jax.eval_shape(function, *arguments)))


def layers(n: int, width: int, implementation: streams.Implementation, scale: float) -> Program:
    """Forward and backward of 4 layers of streams whose branch does nothing, but is none the less not fused."""
    config = streams.StreamConfig(n)
    one = jax.eval_shape(lambda: streams.init_params(config, width))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((STREAM_DEPTH, *leaf.shape), leaf.dtype), one)
    layer = streams.wrap(jax.lax.optimization_barrier, config, implementation=implementation)

    def derivatives(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(partial(streams.scan_layers, layer), params, x)[1](cotangent)

    return Program(derivatives, (params, _tokens(n, width), _tokens(n, width)))


def boundaries(n: int, width: int, implementation: streams.Implementation, scale: float) -> Program:
    """The same by boundaries, from one stream to one."""
    config = streams.StreamConfig(n)
    one = jax.eval_shape(lambda: streams.init_params(config, width))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((STREAM_DEPTH, *leaf.shape), leaf.dtype), one)

    def layer(params: Any) -> list[streams.Connected]:
        return [streams.Connected(jax.lax.optimization_barrier, params, config, implementation)]

    def derivatives(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(lambda params, x: streams.apply_branches(layer, params, x, n), params, x)[1](cotangent)

    return Program(derivatives, (params, _tokens(width), _tokens(width)))


def maxtext_read(n: int, width: int, scale: float, *, backward: bool) -> Program:
    """MaxText's read; the streams that it hands through are no result."""
    return _forward_or_backward(maxtext.read, (maxtext.parameters(n, width), _tokens(n, width)), backward)


def maxtext_write(n: int, width: int, scale: float, *, backward: bool) -> Program:
    """MaxText's write."""
    maps = _tokens(n, dtype=jnp.float32), _tokens(n, n, dtype=jnp.float32)
    return _forward_or_backward(maxtext.write, (_tokens(n, width), _tokens(width), *maps), backward)


def maxtext_layers(n: int, width: int, scale: float) -> Program:
    """What `layers` is of ours."""
    one = maxtext.parameters(n, width)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((STREAM_DEPTH, *leaf.shape), leaf.dtype), one)

    def derivatives(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(maxtext.stack, params, x)[1](cotangent)

    return Program(derivatives, (params, _tokens(n, width), _tokens(n, width)))


def least_of_layers(n: int, width: int) -> int:
    """With one pass between two branches: (2n + 2)C numbers a token forward and (3n + 3)C backward, in bfloat16."""
    return STREAM_DEPTH * STREAM_TOKENS * 2 * (5 * n + 5) * width


def step(connection: Any, scale: float, **options: Any) -> Program:
    """One Adam step of a decoder of 8 layers of width 1024 with plain attention, 16 sequences of 512 tokens."""
    config = DecoderConfig(32768, features=1024, mlp_features=2752, depth=8, num_heads=8, tied=True)
    model = nnx.eval_shape(
        lambda: Decoder(config, connection, attention="plain", dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options)
    )
    graphdef, params = nnx.split(model)
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(optimizer.init, params)
    tokens = jax.ShapeDtypeStruct((int(16 * scale), 513), jnp.int32)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).loss(tokens)

    def train(params: Any, state: Any, tokens: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    return Program(train, (params, state, tokens), donate=(0, 1))


def _beside(ours: Mapping[str, Any], maxtexts: Any, n: int, rest: Mapping[str, Any]) -> Case:
    """Ours and MaxText's, whose H_res has n! weights a token: 40320 of 8 streams."""
    return Case({**ours, MAXTEXT: maxtexts}, only={MAXTEXT: "tpu"}, **rest) if n <= 4 else Case(ours, **rest)


def _cases() -> Iterator[tuple[str, Case]]:
    for branch, widths in ((MLP, (1024, 2048, 4096, 7168)), (Attention, (2048, 4096))):
        for width in widths:
            for backward in (True, False):
                if not backward and (branch, width) != (MLP, 2048):
                    continue
                stack = partial(history, branch, width, backward=backward)
                ways: dict[str, Any] = {"residual": partial(stack, max_history=1, mode="residual")}
                ways |= {f"H={size}": partial(stack, max_history=size) for size in (4, 8, 16)}
                name = f"history, {branch.__name__} layers{'' if backward else ', forward'}, C={width}"
                yield name, Case(ways, over="residual", quick=branch is MLP and width == 2048 and backward)
    for n, width in ((4, 2048), (4, 4096), (4, 1024), (4, 7168), (2, 2048), (8, 2048)):
        # Elsewhere what is long to compile is left out: a stack has all of it.
        whole, quick = n == 4 and width in (2048, 4096), (n, width) == (4, 2048)
        for function, other in ((read, maxtext_read), (write, maxtext_write)):
            for backward in (False, True) if whole else (False,):
                work = f"{function.__name__}{', backward' if backward else ''}"
                ways = {str(way): partial(function, n, width, way, backward=backward) for way in WAYS}
                rest: dict[str, Any] = {"quick": quick, "peers": peers(work, STREAM_TOKENS, n, width)}
                name = f"streams, {work}, n={n}, C={width}"
                yield name, _beside(ways, partial(other, n, width, backward=backward), n, rest)
        for backward in (False, True) if whole else (False,):
            work = f"boundary{', backward' if backward else ''}"
            ways = {str(way): partial(boundary, n, width, way, backward=backward) for way in WAYS}
            least = STREAM_TOKENS * 2 * width * ((3 * n + 3) if backward else (2 * n + 2))
            rest = {"least": least, "quick": quick, "peers": peers(work, STREAM_TOKENS, n, width)}
            yield f"streams, {work}, n={n}, C={width}", Case(ways, **rest)
        rest = {"least": least_of_layers(n, width), "quick": quick}
        if whole:
            ways = {str(way): partial(layers, n, width, way) for way in WAYS}
            name = f"streams, {STREAM_DEPTH} layers, forward and backward, n={n}, C={width}"
            yield name, _beside(ways, partial(maxtext_layers, n, width), n, rest)
        ways = {str(way): partial(boundaries, n, width, way) for way in WAYS}
        name = f"streams, a stack of {STREAM_DEPTH} layers, forward and backward, n={n}, C={width}"
        yield name, Case(ways, **rest)
    steps = {
        "residual": partial(step, "residual"),
        "history, H=4": partial(step, "history"),
        "4 streams": partial(step, "streams", implementation="xla"),
    }
    yield "train step, decoder, C=1024", Case(steps, over="residual")


CASES: dict[str, Case] = dict(_cases())
