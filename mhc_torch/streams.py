"""Manifold-constrained hyper-connections (mHC): n parallel residual streams X around every branch F.

    X_{l+1} = H_res X_l + H_post^T F(H_pre X_l)                                       arXiv 2512.24880, equation 3

The three maps are computed from the streams of the same token, by one projection of all their entries:

    logits = alpha * (RMSNorm(vec X) phi) + bias,    H_pre = sigmoid,  H_post = 2 sigmoid,  H_res = Sinkhorn(exp)

Which side an index is on: `res[i, j]` is the weight of the OLD stream j in the NEW stream i, so rows belong to new
streams and it is applied as `res @ X`. Streams are stacked on the axis before the features: X has shape (..., n, C).
Maps are float32 whatever the dtype of the streams (float64 for float64 streams), also under autocast.

Expand once before the first layer and reduce once after the last: doing both around every branch gives n equal
streams to every layer, and the method is off.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mhc_torch.layers.mixing import autocasts, check_arithmetic, transformed

MAX_STREAMS = 16
_MAX_PERMUTED = 6  # 6! = 720 logits a token; 7! = 5040 would outgrow the streams themselves


@dataclass(frozen=True)
class StreamConfig:
    """What the maps are, as one value.

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
        epsilon: DeepSeek-V4's `hc_eps`, added to H_pre and inside Sinkhorn (see `sinkhorn`); the paper has 0.
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


class Maps(NamedTuple):
    pre: Float[Tensor, "*tokens n"]
    post: Float[Tensor, "*tokens n"]
    res: Float[Tensor, "*tokens n n"]


def initial_bias(config: StreamConfig, layer_index: int = 0) -> Float[Tensor, " m"]:
    """The bias with which, for phi = 0, a network of streams computes what the plain residual network does.

    H_pre reads half of its input from stream `layer_index` mod n and the other half evenly from all: the weights sum
    to 1, so equal streams are read as one, and as they differ the streams get different gradients and part. H_post
    is 1, and the rows of H_res sum to 1: it is the identity to 1e-3 ("none": exactly). The logits -8 off the identity
    are those of mHC-lite and KromHC.
    """
    n = config.streams
    pre = torch.full((n,), 1 / (2 * n))
    pre[layer_index % n] += 1 / 2
    if config.constraint == "none":
        return torch.cat([pre, torch.ones(n), torch.eye(n).flatten()])
    # One stream is read with weight sigmoid(16) = 1 - 1e-7: the logit of exactly 1 does not exist.
    pre = torch.logit(pre).clamp(max=16)
    return torch.cat([pre, torch.zeros(n), *_identity_logits(config)])


def _identity_logits(config: StreamConfig) -> list[Tensor]:
    if config.constraint == "sinkhorn":
        return [8 * torch.eye(config.streams).flatten() - 8]
    # The identity is the first permutation of every factor.
    return [torch.tensor([0.0] + [-8.0] * (math.factorial(factor) - 1)) for factor in config.factors]


def maps(
    phi: Float[Tensor, "nC m"] | None,
    alpha: Float[Tensor, "3"] | None,
    bias: Float[Tensor, " m"],
    streams: Float[Tensor, "*tokens n C"],
    config: StreamConfig,
) -> Maps:
    """H_pre, H_post and H_res of every token, in float32 (float64 for float64 streams).

    Raises:
        ValueError: if `streams` has not n streams, or its width is not that of phi.
        TypeError: if `streams` is not of a floating dtype.
    """
    check_streams(phi, streams, config, config.logits)
    if bias.shape != (config.logits,):
        raise ValueError(f"bias must have shape {(config.logits,)}, got {tuple(bias.shape)}")
    with full_precision(streams):
        dtype = torch.promote_types(streams.dtype, torch.float32)
        if phi is None or alpha is None:
            pre, post, res = _maps_from_logits(bias.to(dtype), config)
            lead = streams.shape[:-2]
            return Maps(pre.expand(*lead, -1), post.expand(*lead, -1), res.expand(*lead, -1, -1))
        dynamic = project(streams, phi, config.norm_epsilon)
        if config.constraint == "none":
            dynamic = torch.tanh(dynamic)
        n = config.streams
        gates = torch.cat([alpha[:1].expand(n), alpha[1:2].expand(n), alpha[2:].expand(config.residual_logits)])
        return _maps_from_logits(gates.to(dtype) * dynamic + bias.to(dtype), config)


def from_deepseek_v4(
    fn: Float[Tensor, "m nC"], base: Float[Tensor, " m"], scale: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "nC m"], Float[Tensor, "3"], Float[Tensor, " m"]]:
    """phi, alpha and bias from the parameters of a `DeepseekV4HyperConnection` of transformers.

    Its `comb` is applied as comb^T X: it is our H_res transposed, and so are its logits. Use them with
    StreamConfig(hc_mult, iterations=hc_sinkhorn_iters, epsilon=hc_eps, norm_epsilon=rms_norm_eps).

    Raises:
        ValueError: if `fn` and `base` have not m = n * (n + 2) rows for any n.
    """
    n = math.isqrt(len(base) + 1) - 1
    if n * (n + 2) != len(base) or len(fn) != len(base):
        raise ValueError(f"fn and base must have n * (n + 2) rows, got {len(fn)} and {len(base)}")
    order = torch.arange(len(base))
    order[2 * n :] = order[2 * n :].reshape(n, n).T.flatten()
    return fn[order].T.contiguous(), scale.clone(), base[order]


def _maps_from_logits(logits: Tensor, config: StreamConfig) -> Maps:
    n = config.streams
    pre, post, res = logits.split([n, n, config.residual_logits], dim=-1)
    if config.constraint == "none":
        return Maps(pre, post, res.unflatten(-1, (n, n)))
    return Maps(torch.sigmoid(pre) + config.epsilon, 2 * torch.sigmoid(post), _residual_map(res, config))


def _residual_map(logits: Tensor, config: StreamConfig) -> Tensor:
    n = config.streams
    if config.constraint == "sinkhorn":
        return sinkhorn(logits.unflatten(-1, (n, n)), config.iterations, config.epsilon)
    res = logits.new_ones((*logits.shape[:-1], 1, 1))
    mixtures = logits.split([math.factorial(factor) for factor in config.factors], dim=-1)
    for factor, weights in zip(config.factors, mixtures, strict=True):
        matrices = _permutation_matrices(factor).to(weights)
        mixture = torch.tensordot(torch.softmax(weights, -1), matrices, 1)
        res = (res[..., :, None, :, None] * mixture[..., None, :, None, :]).flatten(-4, -3).flatten(-2, -1)
    return res


def _permutation_matrices(n: int) -> Tensor:
    """All n! of them, (n!, n, n), the identity first: [k, i, j] is 1 where permutation k sends i to j."""
    return torch.eye(n)[torch.tensor(list(permutations(range(n))))]


def _prime_factors(n: int) -> tuple[int, ...]:
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return () if smallest is None else (smallest, *_prime_factors(n // smallest))


def sinkhorn(
    logits: Float[Tensor, "*batch n n"], iterations: int = 20, epsilon: float = 0.0
) -> Float[Tensor, "*batch n n"]:
    """exp(logits), then `iterations` times: columns divided by their sums, rows divided by their sums. Rows come last.

    Sinkhorn and Knopp (1967), in the order of equation 9 of arXiv 2512.24880. The first iteration is taken in the
    log domain; after it every row sums to 1, so that every later row and column sum lies in [1/n, n] and the
    following iterations are safe in plain arithmetic, for any finite logits. The derivative is that of the iterations
    themselves; backward runs them again instead of keeping them.

    Args:
        epsilon: DeepSeek-V4's `hc_eps`: added to the matrix after the first column normalization, and to every sum
            after it. With 0 the result is the paper's.
    """
    if _followed(logits):
        return _plain_sinkhorn(logits, iterations, epsilon, columns=-2, rows=-1)
    # The batch goes last, where it fills the vector unit.
    matrices = logits.flatten(0, -3).permute(1, 2, 0) if logits.ndim > 2 else logits[..., None]
    result: Tensor = _sinkhorn(matrices.contiguous(), iterations, epsilon)
    return result.permute(2, 0, 1).contiguous().reshape(logits.shape)


# Operators of their own, on matrices of shape (n, n, batch): a compiler that sees into the loop unrolls it, which takes
# minutes to compile and comes out slower.
@torch.library.custom_op("mhc_torch::sinkhorn", mutates_args=())
def _sinkhorn(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
    return _sinkhorn_loop(logits, iterations, epsilon)[0]


@torch.library.custom_op("mhc_torch::sinkhorn_backward", mutates_args=())
def _sinkhorn_backward(logits: Tensor, cotangent: Tensor, iterations: int, epsilon: float) -> Tensor:
    columns, first = _sinkhorn_start(logits, epsilon)
    matrix, sums = _sinkhorn_loop(logits, iterations, epsilon)
    # Cotangents are of the logarithm of the matrix: there a normalization subtracts a weighted sum. Since
    # matrix = next * sums, each iterate is rebuilt from its successor.
    log_cotangent = matrix * cotangent
    for column_sums, row_sums in reversed(sums):
        log_cotangent.addcmul_(matrix, log_cotangent.sum(1, keepdim=True), value=-1)
        matrix *= row_sums
        log_cotangent.addcmul_(matrix, log_cotangent.sum(0, keepdim=True), value=-1)
        matrix *= column_sums
    log_cotangent.addcmul_(first, log_cotangent.sum(1, keepdim=True), value=-1)
    if epsilon:
        log_cotangent *= columns / (columns + epsilon)
    return log_cotangent.addcmul_(columns, log_cotangent.sum(0, keepdim=True), value=-1)


@_sinkhorn.register_fake
def _(logits: Tensor, iterations: int, epsilon: float) -> Tensor:
    return torch.empty_like(logits)


@_sinkhorn_backward.register_fake
def _(logits: Tensor, cotangent: Tensor, iterations: int, epsilon: float) -> Tensor:
    return torch.empty_like(logits)


def _sinkhorn_save(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
    logits, ctx.iterations, ctx.epsilon = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_grad(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return _sinkhorn_backward(logits, cotangent.contiguous(), ctx.iterations, ctx.epsilon), None, None


_sinkhorn.register_autograd(_sinkhorn_grad, setup_context=_sinkhorn_save)


def _sinkhorn_backward_save(ctx: Any, inputs: tuple[Tensor, Tensor, int, float], output: Tensor) -> None:
    logits, cotangent, ctx.iterations, ctx.epsilon = inputs
    ctx.save_for_backward(logits, cotangent)


def _sinkhorn_backward_grad(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is rarely asked for, and is that of the plain iterations."""
    with torch.enable_grad():
        logits, first = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        matrix = _plain_sinkhorn(logits, ctx.iterations, ctx.epsilon, columns=0, rows=1)
        (gradient,) = torch.autograd.grad(matrix, logits, first, create_graph=True)
    return *torch.autograd.grad(gradient, (logits, first), cotangent), None, None


_sinkhorn_backward.register_autograd(_sinkhorn_backward_grad, setup_context=_sinkhorn_backward_save)


def _plain_sinkhorn(logits: Tensor, iterations: int, epsilon: float, columns: int, rows: int) -> Tensor:
    """The iterations as operations of torch, along the axes over which columns and rows are summed."""
    _, matrix = _sinkhorn_start(logits, epsilon, columns, rows)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(columns, keepdim=True) + epsilon)
        matrix = matrix / (matrix.sum(rows, keepdim=True) + epsilon)
    return matrix


def _sinkhorn_start(logits: Tensor, epsilon: float, columns: int = 0, rows: int = 1) -> tuple[Tensor, Tensor]:
    """The column softmax, and what the first row normalization makes of it."""
    log_softmax = torch.log_softmax(logits, columns)
    softmax = log_softmax.exp()
    if not epsilon:
        return softmax, torch.softmax(log_softmax, rows)
    shifted = softmax + epsilon
    return softmax, shifted / (shifted.sum(rows, keepdim=True) + epsilon)


def _sinkhorn_loop(logits: Tensor, iterations: int, epsilon: float) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The result, and the column and row sums of every iteration but the first."""
    _, matrix = _sinkhorn_start(logits, epsilon)
    sums = []
    for _ in range(iterations - 1):
        columns = matrix.sum(0, keepdim=True)
        if epsilon:
            columns += epsilon
        matrix /= columns
        rows = matrix.sum(1, keepdim=True)
        if epsilon:
            rows += epsilon
        matrix /= rows
        sums.append((columns, rows))
    return matrix, sums


def project(
    streams: Float[Tensor, "*tokens n C"], phi: Float[Tensor, "nC m"], norm_epsilon: float
) -> Float[Tensor, "*tokens m"]:
    """RMSNorm(vec X) phi, in float32 (float64 for float64 streams)."""
    x = streams.flatten(-2)
    if _followed(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = _scale(torch.linalg.vector_norm(wide.detach(), dim=-1, keepdim=True))
        wide, epsilon = _scaled(wide, norm_epsilon, scale)
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return wide @ phi.to(wide.dtype) * inverse_rms
    result: Tensor = _Project.apply(x.reshape(-1, x.shape[-1]), phi, norm_epsilon)
    return result.reshape(*x.shape[:-1], phi.shape[-1])


def _followed(x: Tensor) -> bool:
    """Whether a transform of torch.func, dual numbers or a class of tensors of its own (DTensor) follow each operation.

    They cannot look into the nodes and operators here, which keep less and are faster.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_traceable_wrapper_subclass(x)
    )


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast is off; for devices that do not know it ("meta") it always is."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _Project(torch.autograd.Function):
    """RMSNorm(x) phi for x (T, nC); keeps x in its own dtype, and neither a wide nor a normalized copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phi: Tensor, epsilon: float) -> Tensor:
        wide, inverse_rms, _ = _normalizer(x, torch.promote_types(x.dtype, torch.float32), epsilon)
        result = wide @ phi.to(wide.dtype) * inverse_rms
        ctx.save_for_backward(x, phi, result)
        ctx.epsilon = epsilon
        return result

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None]:
        x, phi, result = ctx.saved_tensors
        wide, inverse_rms, scale = _normalizer(x, cotangent.dtype, ctx.epsilon)
        d_raw = cotangent * inverse_rms
        radial = (cotangent * result).sum(-1, keepdim=True) * inverse_rms.square() / phi.shape[0]
        # Transposed on the way: the tall result (nC, m) directly is the slow side of a CPU's matrix product.
        d_phi = (d_raw.T @ wide).T
        d_x = (wide * radial).addmm_(d_raw, phi.to(d_raw.dtype).T, beta=-1)
        return (d_x if scale is None else d_x * scale).to(x.dtype), d_phi.to(phi.dtype), None


def _normalizer(x: Tensor, dtype: torch.dtype, epsilon: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """x in `dtype`, 1 / RMS of each token, and the scale that both contain, if there is one."""
    wide = x.to(dtype)
    # A norm, squared again, is one pass; a mean of squares would write the squares.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # On the host a look at the norms is cheap, and nearly always they fit. On a GPU, reading them would wait.
    if type(x) is Tensor and x.device.type == "cpu" and not transformed() and _fits(norm).all():
        return wide, torch.rsqrt(norm.square() / x.shape[-1] + epsilon), None
    scale = _scale(norm)
    wide, scaled_epsilon = _scaled(wide, epsilon, scale)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide, torch.rsqrt(norm.square() / x.shape[-1] + scaled_epsilon), scale


def _fits(norm: Tensor) -> Tensor:
    """Whether the third power of `norm`, which derivatives divide by, is well inside of its dtype."""
    return norm < 2.0 ** (_exponent(norm.dtype) // 3 - 2)


def _scale(norm: Tensor) -> Tensor:
    """A power of two for each token, 1 where `norm` fits, with which the others do. RMSNorm sees no scale."""
    largest = _exponent(norm.dtype)
    # Beyond half of the exponents squares overflow, and nothing is known of the norm but that.
    scale = torch.full_like(norm, 2.0 ** (-3 * largest // 4))
    scale = torch.where(norm < 2.0 ** (largest // 2), 2.0 ** (-13 * largest // 32), scale)
    return torch.where(_fits(norm), 1.0, scale)


def _exponent(dtype: torch.dtype) -> int:
    return round(math.log2(torch.finfo(dtype).max))


def _scaled(x: Tensor, epsilon: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x` times scale, and the epsilon that gives its RMSNorm the value that x has."""
    return x * scale, epsilon * scale.square()


class _Collapse(torch.autograd.Function):
    """pre (T, n), streams (T, n, C) -> (T, C), in the streams' dtype."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, streams: Tensor) -> Tensor:
        ctx.save_for_backward(pre, streams)
        return torch.bmm(pre[:, None], streams.to(pre.dtype))[:, 0].to(streams.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        pre, streams = ctx.saved_tensors
        d = cotangent.to(pre.dtype)[:, None]
        return torch.bmm(d, streams.to(pre.dtype).mT)[:, 0], (pre[..., None] * d).to(streams.dtype)


class _Write(torch.autograd.Function):
    """streams (T, n, C), output (T, C), post (T, n), res (T, n, n) -> streams (T, n, C)."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, output: Tensor, post: Tensor, res: Tensor) -> Tensor:
        ctx.save_for_backward(streams, output, post, res)
        mixed = post[..., None] * output.to(res.dtype)[:, None]
        return _add_product(mixed, res, streams.to(res.dtype)).to(streams.dtype)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        streams, output, post, res = ctx.saved_tensors
        d = cotangent.to(res.dtype).contiguous()
        d_streams = _add_product(torch.zeros_like(d), res.mT, d).to(streams.dtype)
        d_output = torch.bmm(post[:, None], d)[:, 0].to(output.dtype)
        d_post = torch.bmm(output.to(res.dtype)[:, None], d.mT)[:, 0]
        return d_streams, d_output, d_post, torch.bmm(d, streams.to(res.dtype).mT)


def _add_product(total: Tensor, matrices: Tensor, streams: Tensor) -> Tensor:
    """total + matrices (T, n, n) @ streams (T, n, C), in place of `total`.

    A sum over streams takes as long as a product of tiny matrices, and a compiler fuses it with what is around.
    """
    for j in range(streams.shape[1]):
        total.addcmul_(matrices[:, :, j, None], streams[:, j, None])
    return total


def collapse(pre: Float[Tensor, "*tokens n"], streams: Float[Tensor, "*tokens n C"]) -> Float[Tensor, "*tokens C"]:
    """The branch's input H_pre X, in the dtype of the streams."""
    with full_precision(streams):
        if _followed(streams):
            return (pre[..., None] * streams.to(pre.dtype)).sum(-2).to(streams.dtype)
        result: Tensor = _Collapse.apply(pre.reshape(-1, pre.shape[-1]), streams.reshape(-1, *streams.shape[-2:]))
    return result.reshape(*streams.shape[:-2], streams.shape[-1])


def write(
    streams: Float[Tensor, "*tokens n C"],
    output: Float[Tensor, "*tokens C"],
    post: Float[Tensor, "*tokens n"],
    res: Float[Tensor, "*tokens n n"],
) -> Float[Tensor, "*tokens n C"]:
    """H_res X + H_post^T y: the streams after a branch whose output is y.

    Raises:
        ValueError: if the output has not the shape of one stream.
        TypeError: if the streams cannot hold the dtype of the output, as bfloat16 cannot float32; autocast casts it.
    """
    expected = (*streams.shape[:-2], streams.shape[-1])
    if output.shape != expected:
        raise ValueError(
            f"the branch must keep the shape of its input {expected}, its output has {tuple(output.shape)}"
        )
    if output.dtype != streams.dtype:
        if torch.promote_types(output.dtype, streams.dtype) != streams.dtype and not autocasts(streams.device.type):
            raise TypeError(
                f"the output of the branch must fit into the streams, {streams.dtype}, and has {output.dtype}"
            )
        output = output.to(streams.dtype)
    n, width = streams.shape[-2:]
    with full_precision(streams):
        if _followed(streams):
            mixed = res @ streams.to(res.dtype) + post[..., None] * output.to(res.dtype)[..., None, :]
            return mixed.to(streams.dtype)
        result: Tensor = _Write.apply(
            streams.reshape(-1, n, width), output.reshape(-1, width), post.reshape(-1, n), res.reshape(-1, n, n)
        )
    return result.reshape(streams.shape)


def expand(x: Float[Tensor, "*tokens C"], streams: int) -> Float[Tensor, "*tokens n C"]:
    """n copies of x. Once, before the first layer. A ValueError if `streams`, n, is below 1."""
    if streams < 1:
        raise ValueError(f"streams must be at least 1, got {streams}")
    # Copies and not views of one: products of batches run one by one for matrices whose rows share their memory.
    return x[..., None, :].expand(*x.shape[:-1], streams, x.shape[-1]).contiguous()


def reduce(streams: Float[Tensor, "*tokens n C"], how: Literal["mean", "sum"] = "mean") -> Float[Tensor, "*tokens C"]:
    """The mean or the sum of the streams. Once, after the last layer. `StreamHead` is the learned way."""
    if how not in ("mean", "sum"):
        raise ValueError(f"how must be 'mean' or 'sum', got {how!r}")
    return streams.mean(-2) if how == "mean" else streams.sum(-2)


def check_streams(phi: Tensor | None, streams: Tensor, config: StreamConfig, columns: int) -> None:
    """That `streams` are n floating-point ones, and `phi` a projection of them to so many columns.

    Raises:
        ValueError: if `streams` has not n streams, or its width is not that of phi.
        TypeError: if `streams` is no tensor, or not of a floating dtype of 16 bits or more.
    """
    if not isinstance(streams, Tensor):
        raise TypeError(f"streams must be a tensor, got {type(streams).__name__}")
    if not streams.is_floating_point():
        raise TypeError(f"streams must have a floating dtype, got {streams.dtype}")
    check_arithmetic(streams, "streams")
    if streams.ndim < 2 or streams.shape[-2] != config.streams:
        raise ValueError(
            f"streams must have shape (..., {config.streams}, width), got {tuple(streams.shape)}; "
            "expand the network's input once, before the first layer"
        )
    features = config.streams * streams.shape[-1]
    if phi is not None and phi.shape != (features, columns):
        raise ValueError(
            f"phi must have shape {(features, columns)} for streams of width {streams.shape[-1]}, "
            f"got {tuple(phi.shape)}: it was made for width {phi.shape[0] // config.streams}"
        )
