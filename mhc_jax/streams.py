"""Manifold-constrained hyper-connections (mHC): n parallel residual streams X around every branch F.

    X_{l+1} = H_res X_l + H_post^T F(H_pre X_l)                                       arXiv 2512.24880, equation 3

The three maps are computed from the streams of the same token, by one projection of all their entries:

    logits = alpha * (RMSNorm(vec X) phi) + bias,    H_pre = sigmoid,  H_post = 2 sigmoid,  H_res = Sinkhorn(exp)

Which side an index is on: `res[i, j]` is the weight of the OLD stream j in the NEW stream i, so rows belong to new
streams and it is applied as `res @ X`. Streams are stacked on the axis before the features: X has shape (..., n, C).
Maps are float32 whatever the dtype of the streams (float64 for float64 streams).

Expand once before the first layer and reduce once after the last: doing both around every branch gives n equal
streams to every layer, and the method is off.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mhc_jax import norm
from mhc_jax.kernels import sinkhorn as sinkhorn_kernels
from mhc_jax.kernels import stream_read as read_kernels
from mhc_jax.kernels import streams as write_kernels
from mhc_jax.kernels.choice import Implementation, implemented
from mhc_jax.sinkhorn import sinkhorn
from mhc_jax.traced import Traced, trace

MAX_STREAMS = 16
_MAX_PERMUTED = 6  # 6! = 720 logits a token; 7! = 5040 would outgrow the streams themselves


@dataclass(frozen=True)
class StreamConfig:
    """What the maps are, as a hashable value (static under jit).

    Args:
        streams: number n of residual streams, 1 to 16.
        constraint: the set that the residual map lies in.
            "sinkhorn": doubly stochastic by Sinkhorn-Knopp (mHC, arXiv 2512.24880), n*n logits;
            "permutations": convex mixture of all n! permutation matrices (mHC-lite, arXiv 2601.05732), n at most 6;
            "kronecker": Kronecker product of such mixtures, one per prime factor of n (KromHC, arXiv 2601.21579);
            "none": hyper-connections (HC, arXiv 2409.19606): all three maps are `alpha * tanh(.) + bias`. Projection
            and norm stay those of mHC, so that a comparison shows what the constraint does and nothing else.
        iterations: Sinkhorn iterations, of use to "sinkhorn" alone.
        dynamic: whether the maps depend on the streams. Static maps are the bias alone.
        epsilon: DeepSeek-V4's `hc_eps`, added to H_pre and inside Sinkhorn (see `mhc_jax.sinkhorn`); the paper has 0.
        norm_epsilon: added to the mean square of the norm.

    Raises:
        ValueError: if a value is outside its range.
    """

    streams: int = 4
    constraint: Literal["sinkhorn", "permutations", "kronecker", "none"] = "sinkhorn"
    iterations: int = 20
    dynamic: bool = True
    epsilon: float = 0.0
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MAX_STREAMS:
            raise ValueError(f"streams must be between 1 and {MAX_STREAMS}, got {self.streams}")
        if self.constraint not in ("sinkhorn", "permutations", "kronecker", "none"):
            raise ValueError(
                f"constraint must be 'sinkhorn', 'permutations', 'kronecker' or 'none', got {self.constraint!r}"
            )
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.epsilon < 0 or self.norm_epsilon < 0:
            raise ValueError(f"epsilon and norm_epsilon must not be negative, got {self.epsilon}, {self.norm_epsilon}")
        if (largest := max(self.factors, default=1)) > _MAX_PERMUTED:
            raise ValueError(
                f"constraint={self.constraint!r} with streams={self.streams} needs {largest}! permutations; "
                f"{_MAX_PERMUTED}! is the most: use 'kronecker' with a streams that has small factors, or 'sinkhorn'"
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Sizes of the permutation mixtures that the residual map is the Kronecker product of; empty if it is none."""
        if self.constraint == "permutations":
            return (self.streams,)
        if self.constraint == "kronecker":
            return _prime_factors(self.streams)
        return ()

    @property
    def residual_logits(self) -> int:
        if self.constraint in ("permutations", "kronecker"):
            return sum(math.factorial(f) for f in self.factors)
        return self.streams**2

    @property
    def logits(self) -> int:
        """Logits a token: n for H_pre, n for H_post, then those of H_res, in this order."""
        return 2 * self.streams + self.residual_logits


class StreamParams(NamedTuple):
    """Parameters of one layer's maps; `phi` and `alpha` are None for static maps. m = `config.logits`."""

    phi: Float[Array, "nC m"] | None
    alpha: Float[Array, "3"] | None
    bias: Float[Array, " m"]


class HeadParams(NamedTuple):
    """Parameters of `head`."""

    phi: Float[Array, "nC n"]
    alpha: Float[Array, "1"]
    bias: Float[Array, " n"]


class Maps(NamedTuple):
    pre: Float[Array, "*tokens n"]
    post: Float[Array, "*tokens n"]
    res: Float[Array, "*tokens n n"]


def init_params(
    config: StreamConfig, width: int, layer_index: int | Array = 0, dtype: Any = jnp.float32
) -> StreamParams:
    """Parameters with which a network of streams computes what the plain residual network does.

    phi is 0. H_pre reads half of its input from stream `layer_index` mod n and the other half evenly from all: the
    weights sum to 1, so equal streams are read as one, and as they differ the streams get different gradients and part.
    H_post is 1, and the rows of H_res sum to 1: it is the identity to 1e-3 ("none": exactly). The logits -8 off the
    identity and the gates alpha = 0.01 are those of mHC-lite and KromHC, and the paper's table 5.

    Args:
        width: features C of one stream.
        layer_index: which wrapped branch of the network this is, counted from 0; may be traced.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    n = config.streams
    pre = 1 / (2 * n) + jnp.where(jnp.arange(n) == layer_index % n, 1 / 2, 0)
    if config.constraint == "none":
        bias = jnp.concatenate([pre, jnp.ones(n), jnp.eye(n).ravel()])
    else:
        # One stream is read with weight sigmoid(16) = 1 - 1e-7: the logit of exactly 1 does not exist.
        pre = jnp.minimum(jax.scipy.special.logit(pre), 16)
        bias = jnp.concatenate([pre, jnp.zeros(n), _identity_logits(config)])
    bias = bias.astype(dtype)
    if not config.dynamic:
        return StreamParams(None, None, bias)
    return StreamParams(jnp.zeros((n * width, config.logits), dtype), jnp.full(3, 0.01, dtype), bias)


def _identity_logits(config: StreamConfig) -> np.ndarray:
    if config.constraint == "sinkhorn":
        return np.where(np.eye(config.streams), 0.0, -8.0).ravel()
    # The identity is the first permutation of every factor.
    return np.concatenate([np.zeros(0), *(np.where(np.arange(math.factorial(f)), -8.0, 0.0) for f in config.factors)])


def from_deepseek_v4(fn: Float[Array, "m nC"], base: Float[Array, " m"], scale: Float[Array, "3"]) -> StreamParams:
    """Parameters from those of a `DeepseekV4HyperConnection` of transformers.

    Its `comb` is applied as comb^T X: it is our H_res transposed, and so are its logits. Use them with
    StreamConfig(hc_mult, iterations=hc_sinkhorn_iters, epsilon=hc_eps, norm_epsilon=rms_norm_eps). The parameters of
    its head need no change but `HeadParams(hc_fn.T, hc_scale, hc_base)`.

    Raises:
        ValueError: if `fn` and `base` have not m = n * (n + 2) rows for any n.
    """
    fn, base, scale = jnp.asarray(fn), jnp.asarray(base), jnp.asarray(scale)
    n = math.isqrt(len(base) + 1) - 1
    if n * (n + 2) != len(base) or len(fn) != len(base):
        raise ValueError(f"fn and base must have n * (n + 2) rows, got {len(fn)} and {len(base)}")
    order = np.arange(len(base))
    order[2 * n :] = order[2 * n :].reshape(n, n).T.ravel()
    return StreamParams(fn[order].T, scale, base[order])


def maps(params: StreamParams, streams: Float[Array, "*tokens n C"], config: StreamConfig) -> Maps:
    """H_pre, H_post and H_res of every token, in float32 (float64 for float64 streams)."""
    _check(params, streams, config)
    lead = streams.shape[:-2]
    dtype = jnp.promote_types(streams.dtype, jnp.float32)
    if params.phi is None or params.alpha is None:
        static = _maps_from_logits(params.bias.astype(dtype), config)
        return Maps(*(jnp.broadcast_to(m, lead + m.shape) for m in static))
    raw, inverse_rms = _project(params.phi, streams, config)
    return _maps_from_normalized(raw * inverse_rms, params.alpha, params.bias, config)


def _project(
    phi: Array, streams: Array, config: StreamConfig, implementation: Implementation = None
) -> tuple[Array, Array]:
    """vec(X) phi, and 1 / rms(vec X): normalizing after the projection spares a normalized copy of the streams."""
    phi = phi.astype(jnp.promote_types(streams.dtype, jnp.float32))
    project = implemented(implementation, read_kernels.project, _project_by_xla)
    return project(streams, phi, epsilon=config.norm_epsilon)


def _flat(streams: Array, dtype: Any) -> Array:
    *tokens, n, width = streams.shape
    return streams.reshape(*tokens, n * width).astype(dtype)


def _project_by_xla(streams: Array, phi: Array, *, epsilon: float) -> tuple[Array, Array]:
    flat = _flat(streams, phi.dtype)
    return jnp.matmul(flat, phi), norm.inverse_rms(flat, epsilon)


def _maps_from_normalized(
    normalized: Array,
    alpha: Array,
    bias: Array,
    config: StreamConfig,
    implementation: Implementation = None,
) -> Maps:
    sizes = np.array([config.streams, config.streams, config.residual_logits])
    gates = jnp.repeat(alpha.astype(normalized.dtype), sizes, total_repeat_length=config.logits)
    if config.constraint == "none":
        return _maps_from_logits(gates * jnp.tanh(normalized) + bias.astype(normalized.dtype), config)
    return _maps_from_logits(gates * normalized + bias.astype(normalized.dtype), config, implementation)


def _maps_from_logits(logits: Array, config: StreamConfig, implementation: Implementation = None) -> Maps:
    n = config.streams
    pre, post, res = jnp.split(logits, [n, 2 * n], axis=-1)
    if config.constraint == "none":
        return Maps(pre, post, res.reshape(*res.shape[:-1], n, n))
    residual = _residual_map(res, config, implementation)
    return Maps(jax.nn.sigmoid(pre) + config.epsilon, 2 * jax.nn.sigmoid(post), residual)


def _residual_map(logits: Array, config: StreamConfig, implementation: Implementation) -> Array:
    n = config.streams
    if config.constraint == "sinkhorn":
        matrices = logits.reshape(*logits.shape[:-1], n, n)
        if implementation == "pallas":
            return sinkhorn_kernels.sinkhorn(matrices, config.iterations, config.epsilon)
        return sinkhorn(matrices, config.iterations, config.epsilon)
    res = jnp.ones((*logits.shape[:-1], 1, 1), logits.dtype)
    for factor in config.factors:
        weights, logits = jnp.split(logits, [math.factorial(factor)], axis=-1)
        mixture = jnp.tensordot(jax.nn.softmax(weights), jnp.asarray(_permutation_matrices(factor), weights.dtype), 1)
        size = res.shape[-1] * factor
        res = jnp.einsum("...ij,...kl->...ikjl", res, mixture).reshape(*res.shape[:-2], size, size)
    return res


def _permutation_matrices(n: int) -> np.ndarray:
    """All n! of them, (n!, n, n), the identity first: [k, i, j] is 1 where permutation k sends i to j."""
    return np.eye(n)[np.array(list(permutations(range(n))))]


def _prime_factors(n: int) -> tuple[int, ...]:
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return () if smallest is None else (smallest, *_prime_factors(n // smallest))


def read(
    params: StreamParams,
    streams: Float[Array, "*tokens n C"],
    config: StreamConfig,
    *,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*tokens C"], Float[Array, "*tokens n"], Float[Array, "*tokens n n"]]:
    """The branch's input H_pre X, and the maps H_post and H_res for `write`.

    Kept for backward: the streams themselves and `config.logits` + 1 numbers a token; the maps are computed again.

    Args:
        implementation: "pallas" for the kernels of `mhc_jax.kernels.stream_read` and `mhc_jax.kernels.sinkhorn`, "xla"
            or None for what XLA fuses. Static maps are small and always XLA's.

    Raises:
        ValueError: if `streams` has not n streams, or its width is not that of `params`.
        TypeError: if `streams` is not of a floating dtype.
    """
    _check(params, streams, config)
    _check_implementation(implementation)
    if params.phi is None or params.alpha is None:
        pre, post, res = maps(params, streams, config)
        return _collapse(pre, streams), post, res
    return _read(*params, streams, config, implementation)


def _collapse(pre: Array, streams: Array, implementation: Implementation = None) -> Array:
    return implemented(implementation, read_kernels.collapse, _collapse_by_xla)(pre, streams)


def _collapse_by_xla(pre: Array, streams: Array) -> Array:
    return jnp.einsum("...n,...nc->...c", pre, streams.astype(pre.dtype)).astype(streams.dtype)


def _collapse_weights_by_xla(d_input: Array, streams: Array, *, dtype: Any) -> Array:
    return jnp.einsum("...c,...nc->...n", d_input.astype(dtype), streams.astype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _read(
    phi: Array, alpha: Array, bias: Array, streams: Array, config: StreamConfig, implementation: Implementation
) -> tuple[Array, Array, Array]:
    raw, inverse_rms = _project(phi, streams, config, implementation)
    pre, post, res = _maps_from_normalized(raw * inverse_rms, alpha, bias, config, implementation)
    return _collapse(pre, streams, implementation), post, res


def _read_fwd(
    phi: Array, alpha: Array, bias: Array, streams: Array, config: StreamConfig, implementation: Implementation
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    raw, inverse_rms = _project(phi, streams, config, implementation)
    # By `jax.vjp`, which puts the forward pass of `sinkhorn` in its place: a Hessian needs derivatives of both modes.
    maps_of = partial(_maps_from_normalized, config=config, implementation=implementation)
    (pre, post, res), _ = jax.vjp(maps_of, raw * inverse_rms, alpha, bias)
    return (_collapse(pre, streams, implementation), post, res), (phi, alpha, bias, streams, raw, inverse_rms)


def _read_bwd(
    config: StreamConfig,
    implementation: Implementation,
    saved: tuple[Array, ...],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array, Array]:
    phi, alpha, bias, streams, raw, inverse_rms = saved
    d_input, d_post, d_res = cotangents
    dtype = raw.dtype
    normalized = raw * inverse_rms
    maps_again = partial(_maps_from_normalized, config=config, implementation=implementation)
    (pre, _, _), pullback = jax.vjp(maps_again, normalized, alpha, bias)
    weights = implemented(implementation, read_kernels.collapse_weights, _collapse_weights_by_xla)
    d_pre = weights(d_input, streams, dtype=dtype)
    d_normalized, d_alpha, d_bias = pullback(Maps(d_pre, d_post, d_res))
    # Through 1 / rms, vec(X) gets radial * (vec(X) / rms). No factor here is the square of a stream, or of 1 / rms.
    d_raw = d_normalized * inverse_rms
    radial = -jnp.sum(d_normalized * normalized, axis=-1, keepdims=True) * inverse_rms / phi.shape[0]
    backward = implemented(implementation, read_kernels.backward, _backward_by_xla)
    d_streams, d_phi = backward(streams, phi.astype(dtype), pre, d_input, d_raw, radial, inverse_rms)
    return d_phi.astype(phi.dtype), d_alpha, d_bias, d_streams


def _backward_by_xla(
    streams: Array, phi: Array, pre: Array, d_input: Array, d_raw: Array, radial: Array, inverse_rms: Array
) -> tuple[Array, Array]:
    dtype = phi.dtype
    flat = _flat(streams, dtype)
    tokens = tuple(range(d_raw.ndim - 1))
    # Transposed on the way: the tall result (nC, m) directly is the slow side of a CPU's matrix product.
    d_phi = jnp.tensordot(d_raw, flat, (tokens, tokens)).T
    d_flat = jnp.matmul(d_raw, phi.T) + radial * (flat * inverse_rms)
    d_streams = d_flat.reshape(streams.shape) + pre[..., None] * d_input.astype(dtype)[..., None, :]
    return d_streams.astype(streams.dtype), d_phi


_read.defvjp(_read_fwd, _read_bwd)


def write(
    streams: Float[Array, "*tokens n C"],
    output: Float[Array, "*tokens C"],
    post: Float[Array, "*tokens n"],
    res: Float[Array, "*tokens n n"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "*tokens n C"]:
    """H_res X + H_post^T y: the streams after a branch whose output is y.

    Args:
        implementation: "pallas" for the kernels of `mhc_jax.kernels.streams`, "xla" or None for what XLA fuses.

    Raises:
        ValueError: if the output has not the shape of one stream.
        TypeError: if the streams cannot hold the dtype of the output, as bfloat16 cannot float32.
    """
    expected = (*streams.shape[:-2], streams.shape[-1])
    if jnp.shape(output) != expected:
        raise ValueError(f"the branch must keep the shape of its input {expected}, its output has {jnp.shape(output)}")
    if jnp.promote_types(output.dtype, streams.dtype) != streams.dtype:
        raise TypeError(f"the output of the branch must fit into the streams, {streams.dtype}, and has {output.dtype}")
    output = output.astype(streams.dtype)
    _check_implementation(implementation)
    return _write(streams, output, post, res, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _write(streams: Array, output: Array, post: Array, res: Array, implementation: Implementation) -> Array:
    return implemented(implementation, write_kernels.write, _write_by_xla)(streams, output, post, res)


def _merged(streams: Array, output: Array, post: Array, res: Array) -> Array:
    old, new = streams.astype(res.dtype), output.astype(res.dtype)
    # A sum over streams rather than a product of tiny matrices: it fuses into one pass over the streams.
    mixed = post[..., None] * new[..., None, :]
    for j in range(res.shape[-1]):
        mixed += res[..., j, None] * old[..., None, j, :]
    return mixed.astype(streams.dtype)


# One piece to the policy of `apply_layers`, which would keep the products inside, whose factors are not streams.
_write_by_xla = jax.custom_jvp(_merged)
_write_by_xla.defjvp(lambda primals, tangents: jax.jvp(_merged, primals, tangents))


def _write_fwd(
    streams: Array, output: Array, post: Array, res: Array, implementation: Implementation
) -> tuple[Array, tuple[Array, ...]]:
    merged = implemented(implementation, write_kernels.write, _write_by_xla)(streams, output, post, res)
    return merged, (streams, output, post, res)


def _write_bwd(implementation: Implementation, saved: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    return implemented(implementation, write_kernels.write_backward, _write_backward_by_xla)(cotangent, *saved)


def _write_backward_by_xla(
    cotangent: Array, streams: Array, output: Array, post: Array, res: Array
) -> tuple[Array, ...]:
    d = cotangent.astype(res.dtype)
    d_streams = jnp.zeros_like(d)
    for i in range(res.shape[-1]):
        d_streams += res[..., i, :, None] * d[..., i, None, :]
    d_output = jnp.einsum("...n,...nc->...c", post, d)
    d_post = jnp.einsum("...nc,...c->...n", d, output.astype(res.dtype))
    d_res = jnp.einsum("...ic,...jc->...ij", d, streams.astype(res.dtype))
    return d_streams.astype(streams.dtype), d_output.astype(output.dtype), d_post, d_res


_write.defvjp(_write_fwd, _write_bwd)


def wrap(
    branch: Callable[..., Array], config: StreamConfig, *, implementation: Implementation = None
) -> Callable[..., Array]:
    """`branch(x, *args, **kwargs)` on one stream becomes `connected(params, streams, *args, **kwargs)` on n of them.

    Args:
        implementation: as of `read` and `write`.
    """

    def connected(params: StreamParams, streams: Array, *args: Any, **kwargs: Any) -> Array:
        x, post, res = read(params, streams, config, implementation=implementation)
        return write(streams, branch(x, *args, **kwargs), post, res, implementation=implementation)

    return connected


def apply_layers(
    layer: Callable[[Any, Array], Array],
    params: Any,
    streams: Float[Array, "*tokens n C"],
    *,
    block_length: int = 1,
    policy: Callable[..., bool] | None = None,
    carries: bool = False,
) -> Any:
    """`streams = layer(params_l, streams)` for every l, as a scan: compile time does not grow with depth.

    Args:
        layer: maps streams to streams of the same shape and dtype.
        params: a pytree whose leaves have a leading axis of length L, the depth.
        block_length: of how many layers the streams are kept once for the backward pass. With 1 they are kept for
            every layer. With more, those inside a block are computed again from the outputs of its branches, which
            are kept: the branches themselves never run twice. `optimal_block_length` needs the least memory.
        policy: what of a layer to keep beside its streams (`jax.checkpoint_policies`); the rest is computed again, too.
        carries: whether a layer gives (streams, beside), for caches, statistics and losses of single layers.

    Returns:
        The streams after the last layer; with `carries` (streams, what the layers gave beside, with a leading axis L).

    Raises:
        ValueError: if block_length does not divide L.

    Source: arXiv 2512.24880, section 4.3.2.
    """
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
    if len(lengths) != 1 or () in lengths:
        shapes = jax.tree.map(jnp.shape, params)
        raise ValueError(f"params must hold arrays with one leading axis, the depth, got shapes {shapes}")
    ((depth,),) = lengths
    if block_length < 1 or depth % block_length:
        raise ValueError(f"block_length must divide the depth {depth}, got {block_length}")
    if depth == 0:
        return (streams, None) if carries else streams
    first = jax.eval_shape(lambda params: jax.tree.map(lambda leaf: leaf[0], params), params)
    function, shared = trace(layer, first, streams)
    streams, beside = _scan(function, block_length, policy, carries, shared, params, streams)
    return (streams, beside) if carries else streams


# Compiled, so that a call outside jit finds what an earlier one compiled; not inline, so that its derivative does too.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _scan(
    function: Traced,
    block_length: int,
    policy: Callable[..., bool] | None,
    carries: bool,
    shared: list[Array],
    params: Any,
    streams: Array,
) -> tuple[Array, Any]:
    def step(streams: Array, params: Any) -> tuple[Array, Any]:
        result = function(shared, params, streams)
        return result if carries else (result, None)

    if block_length == 1:
        if policy is not None:
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        return jax.lax.scan(step, streams, params)

    def block(streams: Array, params: Any) -> tuple[Array, Any]:
        return jax.lax.scan(step, streams, params)

    def keep(operation: Any, *inputs: Any, **options: Any) -> bool:
        # Nothing that has the shape of the streams, which only `read` and `write` handle.
        shapes = [value.shape for value in inputs] + [options.get("shape")]
        return streams.shape not in shapes and (policy is None or policy(operation, *inputs, **options))

    recomputed = jax.checkpoint(block, policy=keep, prevent_cse=False)
    blocks = jax.tree.map(lambda p: p.reshape(-1, block_length, *p.shape[1:]), params)
    streams, beside = jax.lax.scan(recomputed, streams, blocks)
    return streams, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), beside)


def optimal_block_length(streams: int, depth: int) -> int:
    """The divisor of `depth` nearest to sqrt(n L / (n + 2)), where keeping the streams of L layers costs least.

    Source: arXiv 2512.24880, equation 20.
    """
    best = math.sqrt(streams * depth / (streams + 2))
    return min((d for d in range(1, depth + 1) if depth % d == 0), key=lambda d: abs(d - best))


def expand(x: Float[Array, "*tokens C"], streams: int) -> Float[Array, "*tokens n C"]:
    """n copies of x. Once, before the first layer. A ValueError if `streams`, n, is below 1."""
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    return jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], streams, x.shape[-1]))


def reduce(streams: Float[Array, "*tokens n C"], how: Literal["mean", "sum"] = "mean") -> Float[Array, "*tokens C"]:
    """The mean or the sum of the streams. Once, after the last layer. `head` is the learned way."""
    if how not in ("mean", "sum"):
        raise ValueError(f"how must be 'mean' or 'sum', got {how!r}")
    total = jnp.sum(streams, axis=-2, dtype=jnp.promote_types(streams.dtype, jnp.float32))
    return (total / streams.shape[-2] if how == "mean" else total).astype(streams.dtype)


def init_head_params(config: StreamConfig, width: int, dtype: Any = jnp.float32) -> HeadParams:
    """Parameters of `head` with which it starts as the mean of the streams."""
    n = config.streams
    bias = jnp.full(n, 16 if n == 1 else -math.log(n - 1), dtype)
    return HeadParams(jnp.zeros((n * width, n), dtype), jnp.full(1, 0.01, dtype), bias)


def head(params: HeadParams, streams: Float[Array, "*tokens n C"], config: StreamConfig) -> Float[Array, "*tokens C"]:
    """Learned reduction of the streams by a map like H_pre, as DeepSeek-V4 ends (`DeepseekV4HyperHead`).

    Raises:
        ValueError, TypeError: as `read`.
    """
    _check_streams(params.phi, streams, config, config.streams)
    raw, inverse_rms = _project(params.phi, streams, config)
    pre = jax.nn.sigmoid(params.alpha * raw * inverse_rms + params.bias) + config.epsilon
    return _collapse(pre, streams)


def _check_implementation(implementation: Implementation) -> None:
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be 'xla', 'pallas' or None, got {implementation!r}")


def _check(params: StreamParams, streams: Array, config: StreamConfig) -> None:
    _check_streams(params.phi, streams, config, config.logits)
    if params.bias.shape != (config.logits,):
        raise ValueError(f"bias must have shape {(config.logits,)}, got {params.bias.shape}")


def _check_streams(phi: Array | None, streams: Array, config: StreamConfig, columns: int) -> None:
    if not jnp.issubdtype(streams.dtype, jnp.floating) or streams.dtype.itemsize < 2:
        raise TypeError(f"streams must have a floating dtype, got {streams.dtype}: 16 bits at least")
    if streams.ndim < 2 or streams.shape[-2] != config.streams:
        raise ValueError(
            f"streams must have shape (..., {config.streams}, width), got {streams.shape}; "
            "expand the network's input once, before the first layer"
        )
    features = config.streams * streams.shape[-1]
    if phi is not None and phi.shape != (features, columns):
        raise ValueError(
            f"phi must have shape {(features, columns)} for streams of width {streams.shape[-1]}, got {phi.shape}: "
            f"it was made for width {phi.shape[0] // config.streams}"
        )
