"""One jitted, donated update of any NNX model by any optax optimizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mhc_jax.monitoring.nonfinite import expect_finite

Batch = Any


Metrics = Mapping[str, Any]


LossFn = Callable[[Any, Batch], tuple[Float[Array, ""], Metrics]]


Diagnose = Callable[[Any, nnx.State], Metrics]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on, as one pytree: shard it, donate it, save it with `mhc_jax.training.checkpoint`.

    Attributes:
        step: number of updates made, int32.
        params: the parameters, which the optimizer updates.
        rest: whatever else the model holds and changes, such as batch statistics and random streams.
        opt_state: the state of the optimizer.
        graphdef: the structure of the model; static under jit.
        trained: the filter that found the parameters; static under jit.
    """

    step: Int[Array, ""] | Any  # jax.tree.map makes states of shapes and of shardings, too
    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState
    graphdef: nnx.GraphDef[Any] = field(metadata={"static": True})
    trained: Any = field(default=nnx.Param, metadata={"static": True})

    @classmethod
    def create(
        cls, model: nnx.Module, optimizer: optax.GradientTransformation, *, trained: Any = nnx.Param
    ) -> "TrainState":
        """The state before the first step. Copies the arrays: donating the state leaves `model` intact.

        Args:
            model: any NNX module.
            optimizer: any of optax.
            trained: a filter of NNX for the parameters that are trained, such as `mhc_jax.nn.ConnectionParam`; a list
                or tuple of filters is any of them. All else stays as it is.

        Raises:
            TypeError: `trained` is no filter, or is one that cannot be hashed.
            ValueError: the model has no such parameter.

        Example:
            >>> import optax
            >>> from mhc_jax.nn import ConnectionParam, HyperConnections
            >>> layer = HyperConnections(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), 8)
            >>> sorted(TrainState.create(layer, optax.adam(1e-3), trained=ConnectionParam).params)
            ['alpha', 'bias', 'phi']
        """
        trained = _hashable(trained)
        states = nnx.state(model, trained), nnx.state(model, nnx.Not(trained))
        if trained is not nnx.Param and not jax.tree.leaves(states[0]):
            raise ValueError(f"trained must find parameters of the {type(model).__name__}, {trained!r} finds none")
        params, rest = jax.tree.map(jnp.copy, states)
        return cls(jnp.int32(0), params, rest, optimizer.init(params), nnx.graphdef(model), trained)

    @property
    def model(self) -> Any:
        """The model, with the arrays of this state: a step that donates the state takes them away."""
        return nnx.merge(self.graphdef, self.params, self.rest, copy=True)


def _hashable(trained: Any) -> Any:
    """The filter, a value of its own where it is a list."""
    trained = nnx.Any(*trained) if isinstance(trained, list | tuple) else trained
    try:
        nnx.filterlib.to_predicate(trained)
        hash(trained)
    except (TypeError, ValueError) as error:  # flax fails to format what it refuses
        raise TypeError(f"trained must be a filter of NNX that can be hashed, got {trained!r}") from error
    return trained


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    diagnose: Diagnose | None = None,
    shardings: TrainState | None = None,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """Compiles one update of the parameters.

    Args:
        loss_fn: `(model, batch) -> (loss, metrics)` with a scalar loss and a dict of further metrics, any pytree.
            Changes that the forward makes to the model (batch statistics, random streams) are kept.
        optimizer: the one `TrainState.create` was given.
        diagnose: `(model, grads) -> dict`, such as `mhc_jax.monitoring.diagnostics.diagnose`: what else to report from
            the parameters and gradients already at hand, without a second forward. Gradients of parameters that are
            not trained are 0.
        shardings: where the new state lives, from `mhc_jax.training.sharding`. Without it, the compiler decides.
        accumulate: parts that a batch is taken in, one after the other, for the memory of one of them. Loss, metrics
            and gradients are the mean over the parts.

    Returns:
        `train_step(state, batch) -> (state, metrics)`. It donates the old state, whose arrays must not be used again.
        `metrics` are `loss`, `grad_norm` (of all gradients together) and those of `loss_fn`, `diagnose` under its own
        name; they stay on the device until read.

    Raises:
        ValueError: accumulate is below 1; on the first call, a metric has a name that the step reports itself, or the
            rows of the batch are no multiple of `accumulate`.
        TypeError: on the first call, if `loss_fn` returns something else.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> def loss_fn(model, batch):
        ...     error = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        ...     return error, {"rmse": jnp.sqrt(error)}
        >>> optimizer = optax.adam(0.1)
        >>> state = TrainState.create(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optimizer)
        >>> train_step = make_train_step(loss_fn, optimizer)
        >>> batch = {"x": jnp.eye(2), "y": jnp.array([[1.0], [2.0]])}
        >>> for _ in range(200):
        ...     state, metrics = train_step(state, batch)
        >>> sorted(metrics), bool(metrics["loss"] < 1e-3), int(state.step)
        (['grad_norm', 'loss', 'rmse'], True, 200)
    """

    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")

    def loss_and_rest(
        params: nnx.State, state: TrainState, batch: Batch
    ) -> tuple[Float[Array, ""], tuple[Metrics, nnx.State]]:
        model = replace(state, params=params).model
        result = loss_fn(model, batch)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise TypeError(f"loss_fn must return (loss, metrics), where metrics is a dict, maybe {{}}; got {result}")
        loss, metrics = result
        return loss, (metrics, nnx.state(model, nnx.Not(state.trained)))

    differentiate = jax.value_and_grad(loss_and_rest, has_aux=True)

    def in_parts(state: TrainState, batch: Batch) -> Any:
        """The same result, of one part of the batch after the other."""
        parts = jax.tree.map(lambda leaf: _parts(leaf, accumulate), batch)

        def one(carry: tuple[nnx.State, Any], part: Batch) -> tuple[tuple[nnx.State, Any], None]:
            rest, total = carry
            (loss, (metrics, rest)), grads = differentiate(state.params, replace(state, rest=rest), part)
            return (rest, jax.tree.map(jnp.add, total, (loss, metrics, grads))), None

        shapes = jax.eval_shape(differentiate, state.params, state, jax.tree.map(lambda leaf: leaf[0], parts))
        (loss, (metrics, _)), grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (rest, total), _ = jax.lax.scan(one, (state.rest, (loss, metrics, grads)), parts)
        loss, metrics, grads = jax.tree.map(lambda leaf: leaf / accumulate, total)
        return (loss, (metrics, rest)), grads

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        whole = accumulate == 1
        result = differentiate(state.params, state, batch) if whole else in_parts(state, batch)
        (loss, (metrics, rest)), grads = result
        expect_finite(loss, "loss")
        for keys, leaf in jax.tree_util.tree_leaves_with_path(grads):
            expect_finite(leaf, f"gradient of {jax.tree_util.keystr(keys[:-1], simple=True, separator='/')}")
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = replace(state, step=state.step + 1, params=params, rest=rest, opt_state=opt_state)
        report = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if diagnose is not None:
            model = replace(state, rest=rest).model
            still = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.All(nnx.Param, nnx.Not(state.trained))))
            report["diagnostics"] = diagnose(model, nnx.merge_state(still, grads))
        if clash := report.keys() & metrics.keys():
            raise ValueError(f"loss_fn: its metrics {sorted(clash)} have names that the step reports itself")
        return new_state, report | dict(metrics)

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    mesh = jax.tree.leaves(shardings)[0].mesh

    def placed_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        # The model asks for the mesh around it, and splits its states by it.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(state, batch)

    # Metrics are whole on every device, so that each of several processes can read them.
    return jax.jit(placed_step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def _parts(leaf: Array, accumulate: int) -> Array:
    """(rows, ...) to (parts, rows of one, ...): every device keeps its rows, and has some of each part."""
    if jnp.ndim(leaf) == 0 or len(leaf) % accumulate:
        raise ValueError(f"batch: an array of shape {jnp.shape(leaf)} must have a multiple of {accumulate} rows")
    return jnp.swapaxes(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 0, 1)
