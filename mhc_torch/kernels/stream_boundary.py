"""The boundary between two branches of streams, and its halves, the read and the write, as an operator of torch.

At most two launches forward, of which the second has the few numbers of the maps, and three backward. The kernels are
in `triton_boundary` and `triton_maps`, which the first call imports.

Streams are those whose squares sum up to what float32 holds: below about 1e19.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhc_torch.following import full_precision
from mhc_torch.kernels.choice import Implementation, by_kernels
from mhc_torch.streams.config import StreamConfig

WIDTHS = 32, 16384
STREAMS = 1, 16

Read = tuple[Tensor, Tensor, Tensor]
"""The input of a branch (*tokens, C), its H_post (*tokens, n) and H_res (*tokens, n, n)."""


def reads(
    implementation: Implementation,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor,
    streams: Tensor,
    config: StreamConfig,
    output: Tensor | None = None,
    post: Tensor | None = None,
    res: Tensor | None = None,
) -> bool:
    """Whether kernels read the streams, after they have written an output if there is one.

    Raises:
        ValueError: as `by_kernels`.
    """
    unserved = _unserved(streams)
    if phi is None:
        unserved = "maps that are not dynamic"
    elif config.constraint != "sinkhorn":
        unserved = f"constraint={config.constraint!r}, only for 'sinkhorn'"
    elif config.norm != "rms":
        unserved = f"norm={config.norm!r}, only for 'rms'"
    states = [streams] if output is None else [streams, output]
    return by_kernels(implementation, states, [phi, alpha, bias, post, res], unserved=unserved)


def writes(implementation: Implementation, streams: Tensor, output: Tensor, post: Tensor, res: Tensor | None) -> bool:
    """Whether kernels write the output.

    Raises:
        ValueError: as `by_kernels`.
    """
    return by_kernels(implementation, [streams, output], [post, res], unserved=_unserved(streams))


def _unserved(streams: Tensor) -> str | None:
    n, width = streams.shape[-2:]
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        return f"a width of {width}, only for {WIDTHS[0]} to {WIDTHS[1]}"
    return None if STREAMS[0] <= n <= STREAMS[1] else f"{n} streams, only for {STREAMS[0]} to {STREAMS[1]}"


def boundary(
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    streams: Tensor,
    output: Tensor,
    post: Tensor,
    res: Tensor | None,
    config: StreamConfig,
) -> tuple[Tensor, *Read]:
    """X' = res X + post y, and of X' the input x' = pre X' of the next branch and its H_post and H_res.

    Source: arXiv 2512.24880, equations 3 and 7 to 9. `mhc_torch.streams.boundary` is the form of torch.
    """
    n, width = streams.shape[-2:]
    old = streams.reshape(-1, n, width), output.reshape(-1, width), post.reshape(-1, n)
    mixing = None if res is None else res.reshape(-1, n, n)
    new, *found, _, _ = _forward(*old, mixing, phi, alpha, bias, _settings(config))
    return new.reshape(streams.shape), *_shaped(streams, *found)


def read(phi: Tensor, alpha: Tensor, bias: Tensor, streams: Tensor, config: StreamConfig) -> Read:
    """The input x = pre X of a branch, and its H_post and H_res."""
    flat = streams.reshape(-1, *streams.shape[-2:])
    _, *found, _, _ = _forward(flat, None, None, None, phi, alpha, bias, _settings(config))
    return _shaped(streams, *found)


def write(streams: Tensor, output: Tensor, post: Tensor, res: Tensor | None) -> Tensor:
    """X' = res X + post y."""
    n, width = streams.shape[-2:]
    old = streams.reshape(-1, n, width), output.reshape(-1, width), post.reshape(-1, n)
    mixing = None if res is None else res.reshape(-1, n, n)
    new: Tensor = _forward(*old, mixing, None, None, None, [])[0]
    return new.reshape(streams.shape)


def _shaped(streams: Tensor, x: Tensor, post: Tensor, res: Tensor) -> Read:
    *lead, n, width = streams.shape
    return x.reshape(*lead, width), post.reshape(*lead, n), res.reshape(*lead, n, n)


def _settings(config: StreamConfig) -> list[float]:
    """What an operator is told of a configuration."""
    return [
        config.norm_epsilon,
        config.read_epsilon,
        config.post_scale,
        config.post_epsilon,
        config.epsilon,
        config.iterations,
        config.order == "rows",
    ]


# Below, streams are (T, n, C), an output (T, C), maps float32 of shapes (T, n) and (T, n, n), raw logits (T, m). What
# is not there is None in the arguments of an operator, and has no numbers in its results: without an output nothing is
# written, without phi nothing is read.


@torch.library.custom_op("mhc_torch::stream_boundary", mutates_args=())
def _forward(
    streams: Tensor,
    output: Tensor | None,
    post: Tensor | None,
    res: Tensor | None,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    settings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X', x', H_post, H_res, vec(X') phi and 1 / rms(vec X')."""
    from mhc_torch.kernels import triton_boundary, triton_maps

    results = _described(streams, output, post, res, phi, alpha, bias, settings)
    new, x, next_post, next_res, raw, inverse_rms = results
    (tokens, n, width), m = streams.shape, raw.shape[1]
    norm_epsilon, read_epsilon, *others = settings or (0.0, 0.0)
    packed = [_packed(tensor) for tensor in (streams, output, post, res, phi, alpha, bias)]
    with torch.cuda.device_of(streams):
        _launch(
            triton_boundary.boundary_forward,
            triton_boundary.programs(tokens),
            (*packed, new, x, raw, inverse_rms),
            (tokens, width, norm_epsilon, read_epsilon),
            triton_boundary.constants(n, width, streams.element_size(), res is not None, output is not None, m),
            triton_boundary.options(n),
        )
        if phi is not None:
            post_scale, post_epsilon, epsilon, iterations, rows_first = others
            _launch(
                triton_maps.maps_forward,
                triton_maps.programs(tokens, n),
                (raw, inverse_rms, *packed[5:], next_post, next_res),
                (tokens, int(iterations), epsilon, post_scale, post_epsilon),
                triton_maps.constants(n, epsilon != 0, bool(rows_first)),
                triton_maps.OPTIONS,
            )
    return results


@_forward.register_fake
def _described(
    streams: Tensor,
    output: Tensor | None,
    post: Tensor | None,
    res: Tensor | None,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    settings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, n, width = streams.shape
    float32 = streams.new_empty(0, dtype=torch.float32)
    new = streams.new_empty((0,) if output is None else streams.shape)
    if phi is None:
        return new, streams.new_empty(0, 0), float32, float32.clone(), float32.new_empty(0, 0), float32.clone()
    maps = float32.new_empty(tokens, n), float32.new_empty(tokens, n, n)
    return (
        new,
        streams.new_empty(tokens, width),
        *maps,
        float32.new_empty(tokens, phi.shape[1]),
        float32.new_empty(tokens),
    )


@torch.library.custom_op("mhc_torch::stream_boundary_backward", mutates_args=())
def _backward(
    d_new: Tensor,
    d_x: Tensor,
    d_next_post: Tensor,
    d_next_res: Tensor,
    streams: Tensor,
    output: Tensor | None,
    post: Tensor | None,
    res: Tensor | None,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    new: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    settings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What arrives at streams, output, post, res, phi, alpha and bias."""
    from mhc_torch.kernels import triton_boundary, triton_maps

    inputs = streams, output, post, res, phi, alpha, bias
    results = _gradients(d_new, d_x, d_next_post, d_next_res, *inputs, new, raw, inverse_rms, settings)
    d_streams, d_output, d_post, d_res, d_phi, d_alpha, d_bias = results
    (tokens, n, width), m = streams.shape, raw.shape[1]
    _, read_epsilon, *others = settings or (0.0, 0.0)
    packed = [_packed(tensor) for tensor in inputs]
    arrived = [_packed(tensor) for tensor in (d_new, d_x, d_next_post, d_next_res)]
    d_logits = torch.empty_like(raw)
    with torch.cuda.device_of(streams):
        if phi is not None:
            post_scale, _, epsilon, iterations, rows_first = others
            constants = triton_maps.constants(n, epsilon != 0, bool(rows_first))
            sums = raw.new_empty(tokens, int(iterations), 2, constants["N"])
            _launch(
                triton_maps.maps_backward,
                triton_maps.programs(tokens, n),
                (raw, inverse_rms, *packed[5:], *arrived[2:], sums, d_logits),
                (tokens, int(iterations), epsilon, post_scale),
                constants,
                triton_maps.OPTIONS,
            )
        _launch(
            triton_boundary.boundary_backward,
            triton_boundary.programs(tokens),
            (*packed, raw, inverse_rms, *arrived[:2], d_logits, d_streams, d_output, d_post, d_res),
            (tokens, width, read_epsilon),
            triton_boundary.constants(n, width, streams.element_size(), res is not None, output is not None, m),
            triton_boundary.options(n),
        )
        if phi is not None:
            _launch(
                triton_boundary.parameters_backward,
                triton_boundary.parameter_programs(n * width),
                (packed[0] if output is None else new, raw, inverse_rms, packed[5], d_logits, d_phi, d_alpha, d_bias),
                (tokens, n * width),
                triton_boundary.parameter_constants(n, m),
                triton_boundary.parameter_options(n),
            )
    return results


@_backward.register_fake
def _gradients(
    d_new: Tensor,
    d_x: Tensor,
    d_next_post: Tensor,
    d_next_res: Tensor,
    streams: Tensor,
    output: Tensor | None,
    post: Tensor | None,
    res: Tensor | None,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
    new: Tensor,
    raw: Tensor,
    inverse_rms: Tensor,
    settings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    maps = (None if table is None else raw.new_empty(table.shape) for table in (post, res))
    found: Any = (
        raw.new_empty(0) if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like in (streams, output, *maps, phi, alpha, bias)
    )
    return tuple(found)


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[Any],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """One kernel; of no tokens there is nothing to launch."""
    if programs:
        kernel[(programs,)](*tensors, *numbers, **constants, **options)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.settings = inputs
    new, _, _, _, raw, inverse_rms = output
    # X' is looked at again for phi alone.
    phi = tensors[4]
    ctx.save_for_backward(*tensors, raw if phi is None else new, raw, inverse_rms)


def _forward_grad(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    # What arrives at raw logits and norms is nothing: they are for the backward pass.
    gradients = _backward(*cotangents[:4], *inputs, ctx.settings)
    return *(_like(gradient, tensor) for gradient, tensor in zip(gradients, inputs, strict=False)), None


def _like(gradient: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else gradient.to(tensor.dtype)


_forward.register_autograd(_forward_grad, setup_context=_save)


def _save_again(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, _, ctx.settings = inputs
    ctx.save_for_backward(*tensors)


def _backward_grad(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is rarely asked for, and is that of the operations of torch."""
    with torch.enable_grad(), full_precision(cotangents[0]):
        saved: list[Any] = [
            None if tensor is None else tensor.detach().requires_grad_() for tensor in ctx.saved_tensors
        ]
        inputs = saved[4:]
        pairs = [pair for pair in zip(_by_torch(ctx.settings, *inputs), saved, strict=False) if pair[0] is not None]
        results, arrived = zip(*pairs, strict=True)
        present = [tensor for tensor in inputs if tensor is not None]
        first = torch.autograd.grad(results, present, arrived, create_graph=True)
        known = [one for one, tensor in zip(cotangents, inputs, strict=True) if tensor is not None]
        asked = [tensor for tensor in saved if tensor is not None]
        found = iter(torch.autograd.grad(first, asked, known, allow_unused=True))
    return *(None if tensor is None else next(found) for tensor in saved), None, None, None, None


def _by_torch(
    settings: Sequence[float],
    streams: Tensor,
    output: Tensor | None,
    post: Tensor | None,
    res: Tensor | None,
    phi: Tensor | None,
    alpha: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """X', x', H_post and H_res by operations of torch."""
    from mhc_torch.streams.connect import collapse, write
    from mhc_torch.streams.maps import maps

    new = None
    if output is not None and post is not None:
        streams = new = write(streams, output, post, res, implementation="torch")
    if phi is None or bias is None:
        return new, None, None, None
    norm_epsilon, read_epsilon, post_scale, post_epsilon, epsilon, iterations, rows_first = settings
    config = StreamConfig(
        streams.shape[1],
        iterations=int(iterations),
        epsilon=epsilon,
        norm_epsilon=norm_epsilon,
        pre_epsilon=read_epsilon,
        post_scale=post_scale,
        post_epsilon=post_epsilon,
        order="rows" if rows_first else "columns",
    )
    pre, next_post, next_res = maps(phi, alpha, bias, streams, config)
    return new, collapse(pre, streams), next_post, next_res


_backward.register_autograd(_backward_grad, setup_context=_save_again)
