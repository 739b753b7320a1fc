"""AdamW as language models are trained with it: warmup, cosine, clipping, and what trains and decays by name."""

from fnmatch import fnmatchcase
from typing import Any

import jax
import optax

from mhc_jax.training.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, steps: int, params: Any) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates.

    Args:
        params: the parameters, or their shapes: for their names.

    Raises:
        ValueError: a pattern of `train` or `decay` is the name of no parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> from mhc_jax.training.config import OptimizerConfig
        >>> params = {"mlp": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
        >>> optimizer = make_optimizer(OptimizerConfig(train=("head/*",), warmup=0, decay=("*/kernel",)), 9, params)
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
        >>> bool((updates["mlp"]["kernel"] == 0).all()), bool((updates["head"]["kernel"] == 0).all())
        (True, False)
    """
    names = jax.tree.leaves(named(params, lambda name: name))
    for field in ("train", "decay"):
        for pattern in getattr(config, field):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"optimizer.{field}: no parameter has a name as {pattern!r}; they are {names}")
    adamw = optax.adamw(
        learning_rate(config, steps),
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda tree: named(tree, lambda name: _matches(name, config.decay)),
    )
    return optax.partition(
        {True: optax.chain(optax.clip_by_global_norm(config.clip), adamw), False: optax.set_to_zero()},
        lambda tree: named(tree, lambda name: _matches(name, config.train)),
    )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Rises evenly from 0 over the warmup, and falls as a cosine to the end.

    Example:
        >>> from mhc_jax.training.config import OptimizerConfig
        >>> rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup=10, final=0.1), 110)
        >>> [round(float(rate(step)), 2) for step in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    highest = config.learning_rate
    # Optax asks for an update after the warmup, which a run of warmup alone does not make.
    length = max(steps, config.warmup + 1)
    return optax.warmup_cosine_decay_schedule(0.0, highest, config.warmup, length, highest * config.final)


def named(tree: Any, value: Any) -> Any:
    """`value(name)` in the place of every leaf of `tree`, whose name is such as `stack/layers/mlp/up_proj/kernel`."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: value(_name(keys)), tree)


def _name(keys: Any) -> str:
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
