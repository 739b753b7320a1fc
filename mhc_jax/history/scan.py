"""Depth as a scan over equal layers, whose states are kept once, with a derivative of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from mhc_jax.history.config import DEFAULTS, MHCConfig
from mhc_jax.history.mixing import floating, mixing_weights, weighted_sum
from mhc_jax.history.window import History, State, empty_slots
from mhc_jax.kernels.choice import Implementation, check_implementation
from mhc_jax.meshes import explicit_axes, placed_like, same_type, summed_like, vary, varying
from mhc_jax.monitoring.nonfinite import expect_finite
from mhc_jax.traced import Shared, Traced, trace

Params = Any
"""A pytree of arrays."""

Keys = Any
"""A pytree of keys and of what goes with them, such as the random streams of an `nnx` module."""


def apply_layers_reference(
    branch: Callable[..., State],
    params: Params,
    x: State,
    logits: Float[Array, "L H"] | None,
    config: MHCConfig = DEFAULTS,
    *,
    gate_logits: Float[Array, "L"] | None = None,
    keys: Keys = None,
    mixing_key: Key[Array, ""] | None = None,
    policy: Callable[..., bool] | None = None,
) -> State:
    """What ``apply_layers`` computes, as a Python loop that leaves every derivative to JAX.

    For forward-mode derivatives, and to test against: it traces every layer anew, and stores what autodiff asks for.
    """
    x = floating(x)
    weights = _stack_weights(params, x, logits, config, gate_logits, mixing_key)
    if not len(weights):
        return x
    layers = (params, keys, jnp.arange(len(weights)))
    function, shared = _close(branch, layers, x, policy)
    states = [x]
    for layer, row in enumerate(weights):
        window = states[-len(row) :]
        row = row[-len(window) :]
        y = function(shared, jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers), states[-1])
        states.append(weighted_sum(y, lax.stop_gradient(window) if config.detach_history else window, row))
    return states[-1]


def apply_layers(
    branch: Callable[..., State],
    params: Params,
    x: State,
    logits: Float[Array, "L H"] | None,
    config: MHCConfig = DEFAULTS,
    *,
    gate_logits: Float[Array, "L"] | None = None,
    keys: Keys = None,
    mixing_key: Key[Array, ""] | None = None,
    policy: Callable[..., bool] | None = None,
    implementation: Implementation = None,
) -> State:
    """L equal layers with history mixing, ``x_{l+1} = branch(params[l], x_l) + sum_k weights[l, k] * x_k``.

    Depth is one ``lax.scan``: compile time does not grow with it. In a backward pass every state has been stored
    once, however wide the window (a plain scan would store the whole window for every layer).

    Args:
        branch: ``branch(params_l, x)``, or ``branch(params_l, x, key_l)`` with ``keys``, gives a state shaped like
            ``x``; another dtype is cast to that of ``x``. Arrays it closes over are shared by all layers, and
            differentiated.
        params: Pytree whose leaves have a leading axis of length L.
        x: ``x_0``, an array or a pytree of floating-point arrays of any shapes.
        logits: Mixing logits of every layer; None in mode ``"residual"``, which has none.
        config: How to mix; see ``MHCConfig``.
        gate_logits: Required if and only if ``config.use_gating``.
        keys: One key for each layer, (L,), for a branch with dropout; or a pytree with such leaves.
        mixing_key: Draws the noise of ``config.stochastic``; leave it out for evaluation.
        policy: What of a branch to keep for the backward pass (``jax.checkpoint_policies``); the default keeps
            everything that its derivative needs. ``nothing_saveable`` keeps states alone, and runs branches twice.
        implementation: ``"xla"`` or None; there is no kernel of a stack.

    Returns:
        ``x_L``, shaped like ``x``.

    Raises:
        ValueError: If an argument's shape does not fit; the message names the argument, and the leaf of ``params``.
            For ``implementation="pallas"``.
        FloatingPointError: Under ``mhc_jax.monitoring.nonfinite.report_nonfinite``, if x, logits or a branch's output
            are not finite.
        TypeError: If ``x`` holds anything but floating-point arrays, and for forward-mode derivatives (``jvp``,
            ``jacfwd``), for which there is ``apply_layers_reference``. Second derivatives work: reverse over reverse,
            and forward over reverse (``jax.hessian`` is ``jacfwd(jacrev(...))``).
    """
    check_layers_implementation(implementation)
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        # Layer by layer, as one who debugs wants it; a scan would have to stack derivatives that JAX holds to differ.
        options: Any = {"gate_logits": gate_logits, "keys": keys, "mixing_key": mixing_key, "policy": policy}
        return apply_layers_reference(branch, params, x, logits, config, **options)
    x = floating(x)
    weights = _stack_weights(params, x, logits, config, gate_logits, mixing_key)
    if not len(weights):
        return x
    layers = (params, keys, jnp.arange(len(weights)))
    function, shared, x = _placed(branch, layers, x, weights, policy)
    try:
        return _layers(_Stack(function, config.detach_history), shared, layers, x, weights)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "apply_layers has its own reverse-mode derivative and no forward-mode one; "
            "use apply_layers_reference, which computes the same, for jvp, jacfwd and linearize"
        ) from error


def check_layers_implementation(implementation: Implementation) -> None:
    """Raises a ValueError for what is no implementation of ``apply_layers``."""
    check_implementation(implementation)
    if implementation == "pallas":
        raise ValueError(
            "implementation='pallas': apply_layers has no kernel, since XLA makes one pass of a branch's end and the "
            "sum over its window; use None or 'xla'"
        )


def apply_layers_carrying(
    branch: Callable[..., tuple[State, Any]],
    params: Params,
    x: State,
    logits: Float[Array, "L H"] | None,
    config: MHCConfig = DEFAULTS,
    *,
    gate_logits: Float[Array, "L"] | None = None,
    mixing_key: Key[Array, ""] | None = None,
    policy: Callable[..., bool] | None = None,
) -> tuple[State, Any]:
    """``apply_layers`` of branches with a second result: ``branch(params_l, x)`` gives ``(state, beside)``.

    For caches, statistics and losses of single layers. Derivatives are those of JAX, through both results: a backward
    pass keeps the window of every layer, where ``apply_layers`` keeps each state once.

    Returns:
        ``x_L``, and what the layers gave beside it, with a leading axis of length L.

    Raises:
        ValueError, TypeError: As ``apply_layers``.
    """
    x = floating(x)
    weights = _stack_weights(params, x, logits, config, gate_logits, mixing_key)
    layers = (params, None, jnp.arange(len(weights)))
    function, shared, x = _placed(branch, layers, x, weights, policy, carries=True)
    return _carrying(function, config.detach_history, shared, layers, x, weights)


@partial(jax.jit, static_argnums=(0, 1))
def _carrying(
    function: Traced, detach_history: bool, shared: Shared, layers: Any, x: State, weights: Array
) -> tuple[State, Any]:
    width = weights.shape[1]

    def step(carry: tuple[History, State], scanned: Any) -> tuple[tuple[History, State], Any]:
        history, x = carry
        layer, row = scanned
        y, beside = function(shared, layer, x)
        window = lax.stop_gradient(history.window) if detach_history else history.window
        x = weighted_sum(y, _read(window, 0, width), row)
        return (history.push(x), x), beside

    (_, x), beside = lax.scan(step, (History.create(x, width), x), (layers, weights))
    return x, beside


def _stack_weights(
    params: Params,
    x: State,
    logits: Array | None,
    config: MHCConfig,
    gate_logits: Array | None,
    mixing_key: Array | None,
) -> Float[Array, "L W"]:
    """The weights of all layers, over the ``W = min(L, H)`` positions that are ever live."""
    if logits is None:
        if config.mode != "residual":
            raise ValueError(f"logits can be left out in mode 'residual' only, not in mode {config.mode!r}")
        leaves = jax.tree.leaves(params)
        if not leaves:
            raise ValueError("params must hold at least one array when there are no logits to tell the depth")
        depth = leaves[0].shape[0]
        logits = jnp.zeros((depth, 1))
    elif jnp.ndim(logits) != 2 or logits.shape[-1] != config.max_history:
        raise ValueError(f"logits must have shape (L, max_history={config.max_history}), got {logits.shape}")
    depth, size = logits.shape
    expect_finite(x, "x")
    if depth:
        expect_finite(logits, "logits of layer {layer}", layer=jnp.argmin(jnp.isfinite(logits).all(axis=-1)))
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.shape(leaf)[:1] != (depth,):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must have a leading axis of {depth}, one for each row of logits, "
                f"got shape {jnp.shape(leaf)}"
            )
    width = max(min(depth, size), 1)
    live = jnp.minimum(jnp.arange(depth) + 1, width)
    return mixing_weights(logits[:, size - width :], config, live=live, gate_logit=gate_logits, key=mixing_key)


def _placed(
    branch: Callable[..., Any], layers: Any, x: State, weights: Array, policy: Any, carries: bool = False
) -> tuple[Traced, Shared, State]:
    """As `_close`, and x as every later state will be on a mesh: layers may split what came whole, or make it vary."""
    x = vary(varying(weights), x)
    function, shared = _close(branch, layers, x, policy, carries)
    if not same_type(x, types := function.out[0] if carries else function.out):
        x = placed_like(x, types)
        function, shared = _close(branch, layers, x, policy, carries)
    return function, shared, x


def _close(
    branch: Callable[..., Any],
    layers: Any,
    x: State,
    policy: Callable[..., bool] | None,
    carries: bool = False,
) -> tuple[Traced, Shared]:
    """The branch as ``function(shared, (params_l, key_l, l), x)``, with all that it closed over made explicit.

    A custom derivative sees its arguments only; and of what it sees as an argument, nothing is stored for every layer.
    With ``carries`` its result is (state, whatever the branch gives beside it).
    """

    def call(layer: tuple[Params, Keys, Array], x: State) -> Any:
        layer_params, key, index = layer
        y = branch(layer_params, x) if key is None else branch(layer_params, x, key)
        y, beside = y if carries else (y, None)
        if jax.tree.map(jnp.shape, y) != jax.tree.map(jnp.shape, x):
            raise ValueError(
                f"branch must return a state shaped like its input, {jax.tree.map(jnp.shape, x)}, "
                f"got {jax.tree.map(jnp.shape, y)}"
            )
        expect_finite(y, "branch of layer {layer}", layer=index)
        y = jax.tree.map(lambda out, leaf: out.astype(leaf.dtype), y, x)
        return (y, beside) if carries else y

    if policy is not None:
        call = jax.checkpoint(call, policy=policy, prevent_cse=False)
    first = jax.eval_shape(lambda layers: jax.tree.map(lambda leaf: leaf[0], layers), layers)
    return trace(call, first, x, source=(branch, policy))


# The tape. Slot l holds x_l. On the way back, with G_l = dL/dx_l,
#
#     G_l = (df_l/dx)^T G_{l+1} + sum_{j=l}^{min(L-1, l+W-1)} weights[j, l] * G_{j+1}
#
# is the same recurrence run from the other end. And <G_{j+1}, x_l>, the gradient of weights[j, l], needs the same W
# cotangents and the one state that the branch's derivative needs anyway, so no window of states is read again.
#
# A few cotangents go round in a ring of their own, all of which is in every window. Many would take memory: they are
# put in the tape, each in the slot of a state that is used up.

_WIDEST_RING = 8


@dataclass(frozen=True)
class _Stack:
    """The static part of a stack of layers."""

    function: Traced
    detach_history: bool


# Compiled, so that a call outside jit finds what an earlier one compiled; inside, the operations stand as they are.
_compiled = partial(jax.jit, static_argnums=0, inline=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
@_compiled
def _layers(stack: _Stack, shared: Shared, layers: Any, x: State, weights: Array) -> State:
    # With no backward pass to come, the states go round in a ring as wide as the window.
    depth, width = weights.shape
    layer = np.arange(depth)[:, None]
    held = layer - (layer - np.arange(width)) % width

    def body(carry: tuple[State, State], scanned: Any) -> tuple[tuple[State, State], None]:
        ring, x = carry
        index, params, row = scanned
        ring = _write(ring, index % width, x)
        y = stack.function(shared, params, x)
        return (ring, weighted_sum(y, _read(ring, 0, width), row)), None

    (_, x), _ = lax.scan(body, (empty_slots(x, width), x), (jnp.arange(depth), layers, _band(weights, layer, held)))
    return x


@_compiled
def _layers_fwd(stack: _Stack, shared: Shared, layers: Any, x: State, weights: Array) -> tuple[State, Any]:
    depth, width = weights.shape
    layer = np.arange(depth)[:, None]
    held = np.maximum(layer - width + 1, 0) + np.arange(width)

    def body(carry: tuple[State, State], scanned: Any) -> tuple[tuple[State, State], Any]:
        tape, x = carry
        index, params, row = scanned
        y, pullback = jax.vjp(stack.function, shared, params, x)
        tape = _write(tape, index, x)
        window = _read(tape, lax.max(index - width + 1, 0), width)
        if stack.detach_history:  # of use when this pass is itself differentiated
            window = lax.stop_gradient(window)
        return (tape, weighted_sum(y, window, row)), _without(pullback, (shared, params, x))

    scanned = (jnp.arange(depth), layers, _band(weights, layer, held))
    (tape, x), pullbacks = lax.scan(body, (empty_slots(x, depth), x), scanned)
    return x, (tape, pullbacks, shared, layers, weights)


class _Form(NamedTuple):
    """What a platform's compiler likes best.

    Attributes:
        flat: whether states lie in one axis on the way back. To flatten a state is free on a CPU, and a copy on a TPU.
        products: ``<rows[start + c], x>`` for every c below `count`, from ``(rows, start, count, x, total, dtype)``,
            where `total` is what the same rows were just added to. What comes after them is not looked at.
    """

    flat: bool
    products: Callable[[State, Array | int, int, State, State, Any], Float[Array, "more"]]


@_compiled
def _layers_bwd(stack: _Stack, residuals: Any, g: State) -> tuple[Any, Any, State, Array]:
    # What Explicit axes split cannot lie in one axis.
    forms = _FORMS | {"cpu": _FORMS["tpu"]} if any(map(explicit_axes, jax.tree.leaves(g))) else _FORMS
    backward = {platform: partial(_backward, stack, form) for platform, form in forms.items()}
    return lax.platform_dependent(residuals, g, **backward)


def _backward(stack: _Stack, form: _Form, residuals: Any, g: State) -> tuple[Any, Any, State, Array]:
    tape, pullbacks, shared, layers, weights = residuals
    depth, width = weights.shape
    ring = width <= _WIDEST_RING
    k = np.arange(depth)[:, None]
    slot = np.arange(width)
    held = k + (slot - k) % width if ring else np.minimum(k, depth - width) + slot
    hold = _flat if form.flat else lambda x: x

    def body(carry: tuple[State, State, State, Any], scanned: Any) -> tuple[tuple[State, State, State, Any], Any]:
        cotangents, carried, g, d_shared = carry
        index, params, pullback, column, live, scanned_x = scanned
        x = scanned_x if ring else carried
        d_shared_here, d_params, dx = _with(pullback, (shared, params, _like(g, x)))(g)
        cotangents = _write(cotangents, index % width if ring else index, hold(g))
        start = 0 if ring else lax.min(index, depth - width)
        total = hold(dx)
        if not stack.detach_history:
            rows = _read(cotangents, start, width)
            if not ring:
                # Some slots still hold states. Weight 0 would not do: times an infinite state it is NaN.
                rows = [_where(alive, row) for alive, row in zip(live, rows, strict=True)]
            total = weighted_sum(total, rows, column)
        past = lax.stop_gradient(x) if stack.detach_history else x
        d_column = form.products(cotangents, start, width, past, total, weights.dtype)
        d_shared = jax.tree.map(jnp.add, d_shared, _real(d_shared_here))
        if not ring:
            # The next state is taken from the tape as it is now: a read of an older one would cost a copy of it all.
            (carried,) = _read(cotangents, lax.max(index - 1, 0), 1)
        return (cotangents, carried, _like(g, total), d_shared), (_real(d_params), d_column)

    d_shared = [jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else None for leaf in shared]
    if form.flat:
        tape = jax.tree.map(lambda rows: rows.reshape(depth, -1), tape)
    live = None if ring else jnp.asarray(held >= k)
    scanned = (jnp.arange(depth), layers, pullbacks, _band(weights, held, k), live, tape if ring else None)
    cotangents, last = (empty_slots(hold(g), width), None) if ring else (tape, _read(tape, depth - 1, 1)[0])
    start = (cotangents, last, g, d_shared)
    (_, _, g, d_shared), (d_layers, d_columns) = lax.scan(body, start, scanned, reverse=True)
    j = np.arange(depth)[:, None]
    k = j - width + 1 + slot
    d_weights = d_columns[np.maximum(k, 0), j % width if ring else j - np.clip(k, 0, depth - width)]
    return d_shared, d_layers, g, summed_like(jnp.where(k >= 0, d_weights, 0.0), weights)


_layers.defvjp(_layers_fwd, _layers_bwd)


def _band(weights: Float[Array, "L W"], j: np.ndarray, k: np.ndarray) -> Float[Array, "L W"]:
    """The weight of state k in layer j, 0 where it is not in the layer's window, or where there is no such layer."""
    depth, width = weights.shape
    inside = (k >= 0) & (k <= j) & (k > j - width) & (j < depth)
    return jnp.where(inside, weights[np.minimum(j, depth - 1), np.clip(width - 1 - (j - k), 0, width - 1)], 0.0)


def _where(condition: bool | Array, x: State) -> State:
    """x, or 0 in its place."""
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jnp.zeros((), leaf.dtype)), x)


def _write(tape: State, slot: Array, x: State) -> State:
    return jax.tree.map(lambda rows, leaf: lax.dynamic_update_index_in_dim(rows, leaf, slot, 0), tape, x)


def _read(tape: State, start: Array | int, count: int) -> list[State]:
    return [
        jax.tree.map(lambda rows, c=c: lax.dynamic_index_in_dim(rows, start + c, keepdims=False), tape)
        for c in range(count)
    ]


def _flat(x: State) -> State:
    return jax.tree.map(jnp.ravel, x)


def _like(x: State, flat: State) -> State:
    return jax.tree.map(lambda leaf, row: row.reshape(leaf.shape), x, flat)


def _by_matrix(
    rows: State, start: Array | int, count: int, x: State, total: State, dtype: Any
) -> Float[Array, "count"]:
    """For a CPU: products of a matrix and a vector, as a sum to one number is not vectorized.

    A ring of flat rows is a matrix as it lies in memory.
    """

    def products(first: Array | int, size: int) -> Array:
        def leaf_products(rows: Array, leaf: Array) -> Array:
            if size < len(rows):
                rows = lax.dynamic_slice_in_dim(rows, start + first, size)
            wide = jnp.promote_types(leaf.dtype, dtype)
            exact = lax.Precision.HIGHEST
            return jnp.dot(rows, leaf, precision=exact, preferred_element_type=wide).astype(dtype)

        return jax.tree.reduce(jnp.add, jax.tree.map(leaf_products, rows, x))

    if count <= _WIDEST_RING:
        return products(0, count)
    # A library gets a copy of a slice, so it gets one part at a time; the last may overlap the one before.
    parts = -(-count // _WIDEST_RING)
    size = -(-count // parts)
    firsts = np.minimum(np.arange(parts) * size, count - size)
    c = np.arange(count)
    return lax.map(partial(products, size=size), jnp.asarray(firsts))[c // size, c - firsts[c // size]]


def _by_sums(rows: State, start: Array | int, count: int, x: State, total: State, dtype: Any) -> Float[Array, " more"]:
    """For a TPU: a sum for each row, and one for `total`, which nobody needs.

    It makes one pass of the sums and of what made `total`: the compiler joins what makes an array with what sums it up,
    but not two things that merely read the same.
    """

    def product(row: State) -> Array:
        sums = jax.tree.map(lambda a, b: jnp.sum(_product(a, b, dtype)), row, x)
        return jax.tree.reduce(jnp.add, sums).astype(dtype)

    return jnp.stack([product(row) for row in [*_read(rows, start, count), total]])


def _at_once(rows: State, start: Array | int, count: int, x: State, total: State, dtype: Any) -> Float[Array, "count"]:
    """For a GPU: one sum of many numbers, since of separate sums no more than eight go into one pass."""

    def leaf_products(leaf: Array, *rows: Array) -> Array:
        products = [_product(row, leaf, dtype) for row in rows]
        return jnp.stack(_sums(products)).astype(dtype)

    return jax.tree.reduce(jnp.add, jax.tree.map(leaf_products, x, *_read(rows, start, count)))


def _product(a: Array, b: Array, dtype: Any) -> Array:
    wide = jnp.promote_types(b.dtype, dtype)
    return a.astype(wide) * b.astype(wide)


@jax.custom_jvp
def _sums(arrays: list[Array]) -> list[Array]:
    zero = [jnp.zeros((), array.dtype) for array in arrays]
    return lax.reduce(arrays, zero, lambda a, b: list(map(jnp.add, a, b)), range(arrays[0].ndim))


# JAX has no derivative of a sum of many.
_sums.defjvp(lambda primals, tangents: (_sums(*primals), [jnp.sum(tangent) for tangent in tangents[0]]))

_FORMS = {
    "cpu": _Form(flat=True, products=_by_matrix),
    "tpu": _Form(flat=False, products=_by_sums),
    "default": _Form(flat=False, products=_at_once),
}


def _real(cotangents: Any) -> Any:
    """None in place of the cotangents of keys and integers, which have no derivative."""
    return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, cotangents)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Input:
    """Stands for what a pullback keeps of the branch's own inputs, which need not be stored a second time."""

    index: int


def _without(pullback: Any, inputs: Any) -> Any:
    place = {id(leaf): _Input(index) for index, leaf in enumerate(jax.tree.leaves(inputs))}
    return jax.tree.map(lambda leaf: place.get(id(leaf), leaf), pullback)


def _with(pullback: Any, inputs: Any) -> Any:
    leaves = jax.tree.leaves(inputs)
    return jax.tree.map(
        lambda leaf: leaves[leaf.index] if isinstance(leaf, _Input) else leaf,
        pullback,
        is_leaf=lambda leaf: isinstance(leaf, _Input),
    )
