"""What the connections of a model do: figures that are cheap, jittable and need no second forward.

train_step = make_train_step(loss_fn, optimizer, diagnose=diagnose)
state, metrics = train_step(state, batch)
metrics["diagnostics"]["layers"]["entropy"]                # (L,), on the device until read
"""

from collections.abc import Iterator
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from mhc_jax.nn import HyperConnections, MatrixMHCSkip, MHCResNet, MHCSequential, MHCSkip, MHCStack, StreamStack
from mhc_jax.streams import Maps, StreamConfig, StreamParams, maps

# Outermost first: the skips inside a container are reported by the container, which knows their depth.
CONNECTIONS = (MHCStack, MHCSequential, MHCResNet, MHCSkip, MatrixMHCSkip, StreamStack, HyperConnections)


def entropy(weights: Float[Array, "*layers K"]) -> Float[Array, "*layers"]:
    """Shannon entropy `-sum_k alpha_k log alpha_k` in nats, with 0 log 0 = 0: 0 for one state, log K for their mean.

    Example:
        >>> entropy(jnp.array([[0.0, 1.0], [0.5, 0.5]])).round(4)
        Array([-0.    ,  0.6931], dtype=float32)
    """
    return -xlogy(weights, weights).sum(axis=-1)


def effective_window(weights: Float[Array, "*layers K"]) -> Float[Array, "*layers"]:
    """How far back a layer reaches on average, `sum_k alpha_k (K - k) / sum_k alpha_k`, in layers.

    1 is a residual connection, K all weight on the oldest state, (K + 1) / 2 their mean.

    Example:
        >>> effective_window(jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        Array([1., 3.], dtype=float32)
    """
    ages = jnp.arange(weights.shape[-1], 0, -1)
    return weights @ ages.astype(weights.dtype) / weights.sum(axis=-1)


def sum_errors(matrices: Float[Array, "*layers N N"]) -> tuple[Float[Array, "*layers"], Float[Array, "*layers"]]:
    """How far matrices are from doubly stochastic: the largest `|sum - 1|` over rows, and over columns.

    Example:
        >>> rows, columns = sum_errors(jnp.array([[0.5, 0.5], [1.0, 0.0]]))
        >>> float(rows), float(columns)
        (0.0, 0.5)
    """
    return abs(matrices.sum(axis=-1) - 1).max(axis=-1), abs(matrices.sum(axis=-2) - 1).max(axis=-1)


def composite_gain(matrices: Float[Array, "L N N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """By how much the skips alone can amplify a signal and a gradient through all layers.

    The largest absolute row sum (forward) and column sum (backward) of `M_{L-1} ... M_0`: the "Amax gain magnitude" of
    the paper (arXiv 2512.24880, section 3.1). 1 and 1 for doubly stochastic matrices.

    Args:
        matrices: the residual map of every layer, which acts on columns: `H_res`, or `window_matrices`.

    Example:
        >>> forward, backward = composite_gain(jnp.array([[[0.0, 1.0], [0.5, 0.5]]] * 8))
        >>> round(float(forward), 4), round(float(backward), 4)
        (1.0, 1.332)
    """
    start = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    product, _ = lax.scan(lambda product, matrix: (matrix @ product, None), start, matrices)
    return abs(product).sum(axis=-1).max(), abs(product).sum(axis=-2).max()


def window_matrices(weights: Float[Array, "*layers H"]) -> Float[Array, "*layers H H"]:
    """History mixing as a linear map of the window: the oldest state drops out, the weighted sum comes in last.

    Example:
        >>> window_matrices(jnp.array([0.25, 0.75]))
        Array([[0.  , 1.  ],
               [0.25, 0.75]], dtype=float32)
    """
    shift = jnp.eye(weights.shape[-1], k=1, dtype=weights.dtype)[:-1]
    shift = jnp.broadcast_to(shift, (*weights.shape[:-1], *shift.shape))
    return jnp.concatenate([shift, weights[..., None, :]], axis=-2)


def diagnose(model: nnx.Module, grads: nnx.State) -> dict[str, dict[str, Array]]:
    """Figures of every connection of `model`, from its parameters and their gradients.

    Args:
        model: any NNX module that holds connections.
        grads: gradients of its parameters, in the structure of `nnx.state(model, nnx.Param)`.

    Returns:
        For every outermost connection, under its name in the model (`"model"` if it is the model itself), for its L
        layers (1 for a lone skip) and its window H:

        - `weights` (L, H): alpha, the latest state last, 0 where there is none yet;
        - `entropy`, `effective_window` (L,): of these;
        - `gain_forward`, `gain_backward` (): composite gain of the window through all layers, gates included; for a
          matrix skip its `row_sum_error` and `column_sum_error` () instead;
        - `logits_grad_norm` (L,): norm of the gradient of each layer's logits;
        - `grad_norm` (L,): norm of the gradient of each layer's parameters, not for a lone skip.

        For hyper-connections, whose maps depend on the token, those of the biases alone, around which the maps of the
        tokens lie (`mhc_jax.streams.maps` has them, and needs the streams); for L branches, in the order in which
        a layer holds them, and n streams:

        - `pre`, `post` (L, n), `res` (L, n, n): the weights with which streams are read, written and mixed;
        - `row_sum_error`, `column_sum_error` (L,): of `res`; `gain_forward`, `gain_backward` (): of all branches;
        - `alpha` (L, 3): the gates of what depends on the token, not for static maps;
        - `maps_grad_norm` (L,): norm of the gradient of the maps' parameters;
        - `grad_norm` (L,): that of the branch's, where the connection holds the branch.

    Example:
        >>> from mhc_jax.nn import MHCStack
        >>> stack = MHCStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=6, init="uniform", rngs=nnx.Rngs(0))
        >>> grads = nnx.grad(lambda stack: stack(jnp.ones((2, 4))).sum())(stack)
        >>> report = diagnose(stack, grads)["model"]
        >>> report["weights"].shape, report["effective_window"]
        ((6, 4), Array([1. , 1.5, 2. , 2.5, 2.5, 2.5], dtype=float32))
    """
    return {
        "/".join(map(str, path)) or "model": _figures(connection, reduce(lambda tree, key: tree[key], path, grads))
        for path, connection in connections(model)
    }


def _figures(connection: Any, grads: nnx.State) -> dict[str, Array]:
    if isinstance(connection, StreamStack):
        return _stream_figures(connection.layers, grads["layers"])
    if isinstance(connection, HyperConnections):
        graph, state = nnx.split(connection)
        single = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[None], state))
        return _stream_figures(single, jax.tree.map(lambda leaf: leaf[None], grads))
    weights = jnp.atleast_2d(connection.mixing_weights())
    figures = {"weights": weights, "entropy": entropy(weights), "effective_window": effective_window(weights)}
    if isinstance(connection, MatrixMHCSkip):
        figures["row_sum_error"], figures["column_sum_error"] = sum_errors(connection.mixing_matrix())
    else:
        gated = jnp.atleast_2d(connection.mixing_weights(gated=True))
        figures["gain_forward"], figures["gain_backward"] = composite_gain(window_matrices(gated))

    if isinstance(connection, MHCStack):
        norms = jax.vmap(optax.tree.norm)
        return figures | {"logits_grad_norm": norms(grads["mixing_logits"]), "grad_norm": norms(grads["layers"])}
    if isinstance(connection, MHCSequential):
        # A layer without parameters has no entry among the gradients.
        layers = [grads.get("wrapped_modules", {}).get(layer, {}) for layer in range(len(weights))]
        skips = [grads["skip_layers"][layer] for layer in range(len(weights))]
    elif isinstance(connection, MHCResNet):
        layers = [grads["blocks"][layer] for layer in range(len(weights))]
        skips = [layer["skip"] for layer in layers]
    else:
        layers, skips = [], [grads]
    figures["logits_grad_norm"] = jnp.stack([optax.tree.norm(skip["mixing_logits"]) for skip in skips])
    if layers:
        figures["grad_norm"] = jnp.stack([jnp.asarray(optax.tree.norm(layer), float) for layer in layers])
    return figures


def _stream_figures(layers: nnx.Module, grads: nnx.State) -> dict[str, Array]:
    """The figures of all hyper-connections of a layer whose variables have a leading axis of depth."""
    figures = []
    for path, connection in _hyper_connections(layers):
        own = reduce(lambda tree, key: tree[key], path, grads)
        learned = {name: own[name] for name in ("phi", "alpha", "bias") if name in own}
        found = jax.vmap(partial(_bias_maps, connection.config))(connection.bias[...])._asdict()
        if connection.alpha is not None:
            found["alpha"] = connection.alpha[...]
        found["maps_grad_norm"] = jax.vmap(optax.tree.norm)(learned)
        if connection.branch is not None:
            # The zeros stand for a branch without parameters.
            found["grad_norm"] = jax.vmap(optax.tree.norm)((own.get("branch", {}), jnp.zeros_like(found["pre"])))
        figures.append(found)
    # All branches of the first layer, then those of the second.
    merged = {name: jnp.stack([found[name] for found in figures], 1) for name in figures[0]}
    merged = {name: leaf.reshape(-1, *leaf.shape[2:]) for name, leaf in merged.items()}
    merged["row_sum_error"], merged["column_sum_error"] = sum_errors(merged["res"])
    merged["gain_forward"], merged["gain_backward"] = composite_gain(merged["res"])
    return merged


def _bias_maps(config: StreamConfig, bias: Float[Array, " m"]) -> Maps:
    return maps(StreamParams(None, None, bias), jnp.zeros((config.streams, 1), bias.dtype), config)


def _hyper_connections(module: nnx.Module) -> list[tuple[tuple[Any, ...], HyperConnections]]:
    """The outermost hyper-connections of a module in the order in which it holds them, and their paths."""
    if isinstance(module, HyperConnections):
        return [((), module)]
    children = enumerate(module) if isinstance(module, nnx.List) else vars(module).items()
    return [
        ((name, *path), connection)
        for name, child in children
        if isinstance(child, nnx.Module)
        for path, connection in _hyper_connections(child)
    ]


def connections(model: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The outermost connections of a model and their paths."""
    found: list[tuple[Any, ...]] = []
    for path, module in sorted(nnx.iter_modules(model), key=lambda item: len(item[0])):
        if isinstance(module, CONNECTIONS) and not any(path[: len(outer)] == outer for outer in found):
            found.append(path)
            yield path, module
