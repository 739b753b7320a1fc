"""The types of what connections hold, by which it is told from what a model holds."""

from flax import nnx


class ConnectionParam(nnx.Param):
    """A parameter of history or streams: logits, gates, and what maps are made of.

    It is an `nnx.Param`, and a filter that finds connections alone.

    Example:
        >>> from flax import nnx
        >>> from mhc_jax.nn import ConnectionParam, HyperConnections
        >>> layer = HyperConnections(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), 8, streams=2)
        >>> sorted(path[0] for path, _ in nnx.to_flat_state(nnx.state(layer, ConnectionParam)))
        ['alpha', 'bias', 'phi']
    """


class Place(nnx.Variable):
    """Where in its stack a branch stands: a number that is neither trained nor written."""
