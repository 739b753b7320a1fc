"""What the connections of a model do: figures that are cheap, jittable and need no second forward.

train_step = make_train_step(loss_fn, optimizer, diagnose=diagnose)
state, metrics = train_step(state, batch)
metrics["diagnostics"]["layers"]["entropy"]                # (L,), on the device until read
"""

from functools import reduce

from flax import nnx
from jaxtyping import Array

from mhc_jax.monitoring.connection import connections


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
        - `entropy` (L, n): of the shares in each row of `res`; `identity_distance` (L,): largest `|res - I|`;
        - `row_sum_error`, `column_sum_error` (L,): of `res`; `gain_forward`, `gain_backward` (): of all branches;
        - `alpha` (L, 3): the gates of what depends on the token, not for static maps;
        - `maps_grad_norm` (L,): norm of the gradient of the maps' parameters, `grad_norm` (L,) of the branch's.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.nn import MHCStack
        >>> stack = MHCStack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), depth=6, init="uniform", rngs=nnx.Rngs(0))
        >>> grads = nnx.grad(lambda stack: stack(jnp.ones((2, 4))).sum())(stack)
        >>> report = diagnose(stack, grads)["model"]
        >>> report["weights"].shape, report["effective_window"]
        ((6, 4), Array([1. , 1.5, 2. , 2.5, 2.5, 2.5], dtype=float32))
    """
    return {
        "/".join(map(str, path)) or "model": connection.figures(reduce(lambda tree, key: tree[key], path, grads))
        for path, connection in connections(model)
    }
