"""The declared rules of recurrent modules, and the second bias that torch has in them.

The gates are in the same order on both sides: input, forget, cell, output; reset, update, new. torch adds two biases
where Flax has one, so the second one must be zero: `fold_biases` makes it so.
"""

from typing import Any

import torch
from flax import nnx
from torch import nn

from bridge.weights.rules import Entry, Leaf, Refused, Setting, Zero, register

_DENSE = "in out -> out in"
_TWO_BIASES = "the JAX module has one bias where torch adds two; bridge.fold_biases adds this one to the first"
_INNER_BIAS = (
    "flax's GRUCell has no bias inside the product with the reset gate, which is the last third of this one; "
    "bridge.fold_biases adds the other two to the first bias"
)
_NO_BIAS = "the torch module has no bias"


def fold_biases(model: nn.Module) -> nn.Module:
    """Adds the second bias of every recurrent module of torch to its first, in place: the function stays the same.

    What is left of the second is zero and no longer trained, so that training goes as with Flax's one bias. Of a GRU
    the last third stays, since the reset gate multiplies it: where that is not zero, there is no module of Flax that
    computes the same.

    Args:
        model: a whole model or a module of it: RNN, LSTM, GRU and their cells, alone or in stacks.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no torch.nn.Module.

    Example:
        >>> lstm = torch.nn.LSTMCell(3, 2)
        >>> both = lstm.bias_ih + lstm.bias_hh
        >>> bool((fold_biases(lstm).bias_ih == both).all()), lstm.bias_hh.abs().sum().item()
        (True, 0.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and module.bias:
                for name, second in list(module.named_parameters(recurse=False)):
                    if name.startswith("bias_hh"):
                        _fold(module, module.get_parameter(name.replace("_hh", "_ih")), second)
    return model


def _fold(module: nn.Module, first: nn.Parameter, second: nn.Parameter) -> None:
    rows = len(second) * 2 // 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else len(second)
    first[:rows] += second[:rows]
    second[:rows] = 0
    if not second.any():
        second.requires_grad_(False)


def _gates(cell: nnx.LSTMCell) -> list[Entry]:
    """An LSTM whose gates are layers of their own."""
    entries: list[Entry] = []
    for i, gate in enumerate(("i", "f", "g", "o")):
        ours = "if_" if gate == "f" else f"i{gate}"
        entries += [Leaf(f"{ours}.kernel", "weight_ih", _DENSE, (i, 4))]
        entries += [Leaf(f"h{gate}.kernel", "weight_hh", _DENSE, (i, 4)), Leaf(f"h{gate}.bias", "bias_ih", part=(i, 4))]
    return entries


def _dense(cell: Any, biased: str) -> list[Entry]:
    weights = [Leaf(f"dense_{x}.kernel", f"weight_{x}h", _DENSE) for x in ("i", "h")]
    return [*weights, Leaf(f"dense_{biased}.bias", "bias_ih")]


def _of_cell(cell: nnx.Module, module: nn.Module, prefix: str = "", suffix: str = "") -> tuple[Entry, ...]:
    """The entries of one cell of Flax at `prefix`, whose weights torch has under names that end in `suffix`."""
    gated = isinstance(module, (nn.GRU, nn.GRUCell))
    wanted: tuple[type[nn.Module], ...] = (nn.LSTM, nn.LSTMCell)
    if isinstance(cell, (nnx.GRUCell, nnx.SimpleCell)):
        wanted = (nn.GRU, nn.GRUCell) if isinstance(cell, nnx.GRUCell) else (nn.RNN, nn.RNNCell)
    if not isinstance(module, wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        return (Refused(f"a {type(cell).__name__} is a torch.nn {names}", prefix.rstrip(".")),)
    if isinstance(cell, nnx.LSTMCell):
        leaves = _gates(cell)
    else:
        leaves = _dense(cell, "h" if isinstance(cell, nnx.OptimizedLSTMCell) else "i")
    entries: list[Entry] = []
    for leaf in leaves:
        assert isinstance(leaf, Leaf)
        if leaf.torch != "bias_ih" or module.bias:
            entries.append(Leaf(prefix + leaf.jax, leaf.torch + suffix, leaf.layout, leaf.part))
        else:
            entries.append(Zero(_NO_BIAS, jax=prefix + leaf.jax))
    return (*entries, Zero(_INNER_BIAS if gated else _TWO_BIASES, torch=f"bias_hh{suffix}"))


def _layers(jax: nnx.Module) -> list[tuple[str, nnx.RNN | nnx.Bidirectional]]:
    """The recurrent layers of a stack, or the one layer, under their paths."""
    if isinstance(jax, nnx.Sequential):
        found = [(f"layers.{i}", layer) for i, layer in enumerate(jax.layers)]
    else:
        found = [(str(i), layer) for i, layer in enumerate(jax)] if isinstance(jax, nnx.List) else [("", jax)]
    return [(path, layer) for path, layer in found if isinstance(layer, (nnx.RNN, nnx.Bidirectional))]


def _directions(layer: nnx.Module) -> list[tuple[str, Any]]:
    if isinstance(layer, nnx.Bidirectional):
        return [("forward_rnn.", layer.forward_rnn), ("backward_rnn.", layer.backward_rnn)]
    return [("", layer)]


def _stack(jax: nnx.Module, module: nn.RNNBase) -> tuple[Entry, ...]:
    layers = _layers(jax)
    ways = {len(_directions(layer)) for _, layer in layers}
    if len(layers) != module.num_layers or ways != {1 + module.bidirectional}:
        theirs = f"{module.num_layers} layers of {1 + module.bidirectional} directions"
        return (Refused(f"JAX has {len(layers)} layers of {sorted(ways)} directions, torch has {theirs}"),)
    if module.proj_size:
        return (Refused(f"torch projects its hidden states (proj_size={module.proj_size}), and no cell of flax does"),)
    entries: list[Entry] = []
    for i, (path, layer) in enumerate(layers):
        for (way, rnn), suffix in zip(_directions(layer), ("", "_reverse"), strict=False):
            prefix = f"{path}.{way}cell." if path else f"{way}cell."
            entries += _of_cell(rnn.cell, module, prefix, f"_l{i}{suffix}")
    return tuple(entries)


def _each(read: Any) -> Any:
    """What `read` tells of the cells below a module: the one value, or all where they differ."""

    def of(jax: nnx.Module) -> Any:
        cells = [rnn.cell for _, layer in _layers(jax) for _, rnn in _directions(layer)] or [jax]
        found = list(dict.fromkeys(read(cell) for cell in cells))
        return found[0] if len(found) == 1 else found

    return of


def _merge(jax: nnx.Module) -> str:
    merges = {layer.merge_fn for _, layer in _layers(jax) if isinstance(layer, nnx.Bidirectional)}
    return "concatenate" if merges <= {nnx.Bidirectional.merge_fn} else str(merges)


def _turns(jax: nnx.Module) -> list[bool]:
    return [layer.reverse for _, layer in _layers(jax) if isinstance(layer, nnx.RNN)]


def _rates(jax: nnx.Module) -> list[float]:
    """The dropouts between the layers of a stack."""
    inside: Any = jax.layers if isinstance(jax, nnx.Sequential) else jax if isinstance(jax, nnx.List) else ()
    return sorted({float(layer.rate) for layer in inside if isinstance(layer, nnx.Dropout)} - {0.0})


def _time_major(jax: nnx.Module) -> list[bool]:
    return sorted({layer.time_major for _, layer in _layers(jax)})


_ACTIVATION = _each(lambda cell: cell.activation_fn.__name__)
_GATES = (
    Setting("gate_fn", _each(lambda cell: cell.gate_fn.__name__), lambda _: "sigmoid"),
    Setting("activation_fn", _ACTIVATION, lambda _: "tanh"),
)
_PLAIN = (
    Setting("activation_fn", _ACTIVATION, lambda module: module.nonlinearity),
    Setting("residual", _each(lambda cell: cell.residual), lambda _: False),
)
_SEQUENCE = (
    Setting("time_major", _time_major, lambda module: [not module.batch_first]),
    Setting("reverse", _turns, lambda module: [False] * (0 if module.bidirectional else module.num_layers)),
    Setting("merge_fn", _merge, lambda _: "concatenate"),
    Setting("dropout", _rates, lambda module: [module.dropout] * (module.dropout > 0 and module.num_layers > 1)),
)

for _lstm in (nnx.LSTMCell, nnx.OptimizedLSTMCell):
    register(_lstm, nn.LSTMCell, by=_of_cell, settings=_GATES)
register(nnx.GRUCell, nn.GRUCell, by=_of_cell, settings=_GATES)
register(nnx.SimpleCell, nn.RNNCell, by=_of_cell, settings=_PLAIN)
for _layer in (nnx.RNN, nnx.Bidirectional, nnx.Sequential, nnx.List):
    register(_layer, nn.LSTM, by=_stack, settings=(*_GATES, *_SEQUENCE))
    register(_layer, nn.GRU, by=_stack, settings=(*_GATES, *_SEQUENCE))
    register(_layer, nn.RNN, by=_stack, settings=(*_PLAIN, *_SEQUENCE))
