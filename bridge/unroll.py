"""A scanned stack as the chain of its layers, so that each of them can be watched and run alone."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from mhc_jax.nn.hyper_connections import StreamStack
from mhc_jax.nn.sequential import MHCSequential
from mhc_jax.nn.stack import MHCStack
from mhc_jax.streams import expand, reduce


class StreamChain(nnx.Module):
    """The layers of a `StreamStack`, one after another."""

    def __init__(self, layers: list[nnx.Module], streams: int) -> None:
        self.layers = nnx.List(layers)
        self.streams = streams

    def __call__(self, x: Float[Array, "*tokens C"], *args: Any, **kwargs: Any) -> Float[Array, "*tokens C"]:
        wide = expand(x, self.streams)
        for layer in self.layers:
            wide = layer(wide, *args, **kwargs)
        return reduce(wide)


def unrolled(model: nnx.Module) -> nnx.Module:
    """A copy of `model` in which every `MHCStack` is the `MHCSequential` of its layers, every `StreamStack` a chain."""
    return _unroll(nnx.clone(model))


def _unroll(node: Any) -> Any:
    if isinstance(node, MHCStack):
        node = _sequential(node)
    elif isinstance(node, StreamStack):
        node = StreamChain(_layers(node.layers), node.streams)
    if isinstance(node, nnx.List):
        for i, child in enumerate(node):
            node[i] = _unroll(child)
    elif isinstance(node, nnx.Module):
        for name, child in vars(node).items():
            if isinstance(child, nnx.Module):
                setattr(node, name, _unroll(child))
    return node


def _layers(stacked: nnx.Module) -> list[nnx.Module]:
    """The single layers of a module whose parameters have a leading axis of depth."""
    graph, state = nnx.split(stacked)
    depth = jax.tree.leaves(state)[0].shape[0]
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(depth)]


def _sequential(stack: MHCStack) -> MHCSequential:
    layers = _layers(stack.layers)
    chain = MHCSequential(layers, config=stack.config, policy=stack.policy, rngs=nnx.Rngs(0))  # noise is off
    for i, skip in enumerate(chain.skip_layers):
        skip.mixing_logits.set_value(stack.mixing_logits[i])
        skip.deterministic = stack.deterministic
        if stack.config.use_gating:
            skip.gate_logit.set_value(stack.gate_logit[i])
    return chain
