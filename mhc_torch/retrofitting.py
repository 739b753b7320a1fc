"""Retrofit: residual streams around the branches of a model that exists, which goes on computing what it computed.

A block computes `h = h + branch(norm(h))` for each of its branches in turn, and keeps doing so with streams X in the
place of h. A hook hands the first module of a branch H_pre X in place of X; a hook after its last module hands the
block `(H_res - 1) X + H_post^T y` in place of the output y, so that the block's own sum is H_res X + H_post^T y.
So masks, caches, checkpointing and everything else that the forward of a block does stay its own.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mhc_torch.injection import placement
from mhc_torch.monitoring.connection import connections
from mhc_torch.nn.hyper_connections import ConnectionMaps
from mhc_torch.options import check_choice, resolve
from mhc_torch.streams import Maps, StreamConfig, collapse, expand, reduce, write

Branches = Mapping[str, tuple[str, str]]
"""The branches of a block by name, in the order of their sums: the paths of the first and the last module of each."""

_DEFAULTS = StreamConfig(start="mixed")
_CHILD = "hyper_connections"
_WATCH = "_mhc_watch"
_LLAMA: Branches = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}

BLOCKS: dict[type[nn.Module] | str, Branches] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "GPT2Block": {
        "attention": ("ln_1", "attn"),
        "cross_attention": ("ln_cross_attn", "crossattention"),
        "mlp": ("ln_2", "mlp"),
    },
    # The norms come after the sums, where they act on each stream.
    "BertLayer": {
        "attention": ("attention.self", "attention.output.dropout"),
        "cross_attention": ("crossattention.self", "crossattention.output.dropout"),
        "mlp": ("intermediate", "output.dropout"),
    },
    "ViTLayer": {"attention": ("layernorm_before", "dropout"), "mlp": ("layernorm_after", "dropout")},
}
"""The blocks that are known, by class or by name of the class; `register_block` adds one."""

_OPTIONAL = ("cross_attention",)  # branches that only some blocks of a class have


def register_block(block: type[nn.Module] | str, branches: Branches) -> None:
    """Make a class of blocks known to `retrofit`; subclasses count.

    The forward of such a block must compute `h = h + branch(h)` for each branch, or `h = norm(h + branch(h))` with a
    norm of each token, where h reaches the branch through its first module alone, and its last module puts out what is
    added to h: a dropout, if there is one before the sum.

    Args:
        block: the class, or its name.
        branches: by a name for each branch, the paths of its first and its last module, in the order of the sums. The
            last axis of the first parameter in the first module must be the width of h, as it is in a norm.

    Raises:
        TypeError: block is no class of modules and no name.
        ValueError: there are no branches.

    Example:
        ```
        register_block("MyBlock", {"attention": ("norm1", "attn"), "mlp": ("norm2", "mlp.dropout")})
        ```
    """
    if not (isinstance(block, str) or (isinstance(block, type) and issubclass(block, nn.Module))):
        raise TypeError(f"block must be a subclass of torch.nn.Module or the name of one, got {block!r}")
    if not branches:
        raise ValueError(f"branches must name the residual branches of {_name(block)}, got none")
    BLOCKS[block] = dict(branches)


def retrofit(
    model: nn.Module,
    block: type[nn.Module] | str | None = None,
    streams: int | None = None,
    *,
    parameters: Literal["all", "new"] = "all",
    config: StreamConfig | None = None,
    **options: Any,
) -> nn.Module:
    """Put n residual streams around the residual branches of every block of a model, which keeps its function.

    Streams are made once, before the first block of a stack, and their mean is taken once, after the last; blocks with
    the same parent are a stack. Modules stay what and where they are, and so do the keys of their parameters; each
    block gets a child `hyper_connections`, which holds the maps of its branches. Outputs `hidden_states` of
    transformers have the means of the streams.

    Args:
        model: the model, with the weights that it has learned.
        block: class of its residual blocks, or the name of one. None: every class that is known, which are those in
            `BLOCKS`: of transformers the blocks of Llama, Qwen3, Mistral, GPT-2, BERT and ViT.
        streams: number n of streams, 2 at least; 4 if neither this nor config says otherwise.
        parameters: "all" leaves what is trained as it is; "new" freezes all but the parameters of the maps.
        config: all options of the maps in one value; keywords, the fields of `StreamConfig`, change single ones.
            Without it, `start` is "mixed": maps that can learn.

    Returns:
        The same model.

    Raises:
        TypeError: model is no module, or as `StreamConfig`.
        ValueError: there is no such block; the model is retrofitted already; the residual sums of the blocks are not
            known; their widths differ; another module stands between two blocks; an option is out of range.
            The model is unchanged then.

    Example:
        ```
        model = retrofit(LlamaForCausalLM.from_pretrained(path), streams=4, parameters="new")
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4, connection_lr=1e-3, weight_decay=0.1))
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("parameters", parameters, ("all", "new"))
    config = resolve(_DEFAULTS, config, streams=streams, **options)
    if config.streams < 2:
        raise ValueError(f"streams must be at least 2, got {config.streams}: with one stream the model is what it was")
    for name in ("epsilon", "read_epsilon", "post_epsilon"):
        if value := getattr(config, name):
            shown = "pre_epsilon" if name == "read_epsilon" else name
            raise ValueError(f"{shown} must be 0, got {value}: with it the model would not keep its function")
    if config.single_pass:
        raise ValueError("single_pass must be False: a block of an existing model hands no maps to the next")
    if config.post_scale <= 1:
        raise ValueError(f"post_scale must be above 1, got {config.post_scale}: H_post has to start as 1")
    if done := next(_retrofitted(model), None):
        raise ValueError(f"the model is retrofitted already: {done[0]!r} has streams; unretrofit it first")
    plans = [_plan(model, stack) for stack in _stacks(model, block)]

    if parameters == "new":
        model.requires_grad_(False)
    for width, blocks in plans:
        index = 0
        for position, (target, branches) in enumerate(blocks):
            child = BlockStreams(config, width, index, branches, **placement(target))
            child.attach(target, branches, first=position == 0, last=position == len(blocks) - 1)
            target.add_module(_CHILD, child)
            index += len(branches)
    for holder in _holders(model):
        _Watch(holder)
    return model


def unretrofit(model: nn.Module) -> nn.Module:
    """Take the streams off again, where the maps are as `retrofit` left them: the model is what it was.

    What `parameters="new"` froze stays frozen.

    Raises:
        ValueError: the model is not retrofitted, or its maps have learned; it is unchanged then.
    """
    found = list(_retrofitted(model))
    if not found:
        raise ValueError(f"{type(model).__name__} is not retrofitted")
    learned = [f"{name}.{_CHILD}.{key}" for name, block in found for key in _streams_of(block).learned()]
    if learned:
        raise ValueError(f"the maps have learned, without them the model is another: {learned}")
    for holder in _holders(model):
        vars(holder)[_WATCH].stop()
    for _, block in found:
        _streams_of(block).detach()
        delattr(block, _CHILD)
    return model


def connection_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all connections in `model`, each once: maps of streams, and logits and gates of history."""
    own = (model.get_submodule(name).parameters(recurse=False) for name, _ in connections(model))
    return list(dict.fromkeys(parameter for parameters in own for parameter in parameters))


def parameter_groups(
    model: nn.Module, lr: float, connection_lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch: what is trained of the model, and of its connections, which have no decay.

    Maps and logits may learn faster than weights, and decay would pull them to maps that mean nothing.

    Args:
        lr: learning rate of the model.
        connection_lr: that of the connections.
        weight_decay: decay of the model's weights.
    """
    new = set(connection_parameters(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in new], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if p in new], "lr": connection_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Running(threading.local):
    """What the branch that runs in this thread has read: the streams, H_post and H_res. A copy begins with nothing.

    Not a context variable, which torch.compile cannot follow.
    """

    read: tuple[Tensor, Tensor, Tensor] | None = None

    def __reduce__(self) -> Any:
        return _Running, ()


class BranchMaps(ConnectionMaps):
    """The maps of a branch whose modules stand elsewhere in the block. Called with streams, it gives their maps."""

    def __init__(self, width: int, config: StreamConfig, layer_index: int, running: _Running, **factory: Any) -> None:
        super().__init__(width, config, layer_index, **factory)
        self._running = running

    def forward(self, streams: Float[Tensor, "*tokens n C"]) -> Maps:
        return self.token_maps(streams)

    def mixed_states(self, streams: Tensor) -> list[Tensor]:
        """The states that a call mixes."""
        return [streams]

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first module of the branch: H_pre X in place of X, wherever it is given."""
        streams = _first_tensor(args, kwargs)
        pre, post, res = self(streams)
        self._running.read = streams, post, res
        return _replaced(args, kwargs, streams, collapse(pre, streams))

    def have_learned(self) -> bool:
        """Whether the maps are others than those that they started as, for some token."""
        start = self.start_values()
        return any(
            bool((self.get_parameter(name) != torch.as_tensor(start[name]).to(self.bias)).any())
            for name in start.keys() - {"alpha"}
        )


class BlockStreams(nn.ModuleDict):
    """The maps of the branches of one block, by the names of these, and the hooks by which the block uses them."""

    def __init__(
        self, config: StreamConfig, width: int, layer_index: int, branches: Iterable[str], **factory: Any
    ) -> None:
        running = _Running()
        super().__init__(
            {name: BranchMaps(width, config, layer_index + i, running, **factory) for i, name in enumerate(branches)}
        )
        self.config = config
        self._running = running
        self._hooks: list[Any] = []

    def attach(self, block: nn.Module, branches: Branches, *, first: bool, last: bool) -> None:
        """Let `block` run on streams; the first block makes them, the last puts out their mean."""
        for name, (begin, _) in branches.items():
            read: Any = self[name]
            self._hooks.append(block.get_submodule(begin).register_forward_pre_hook(read.read, with_kwargs=True))
        for end in dict.fromkeys(end for _, end in branches.values()):
            self._hooks.append(block.get_submodule(end).register_forward_hook(self.write))
        if first:
            self._hooks.append(block.register_forward_pre_hook(self.expand, with_kwargs=True))
        if last:
            # Before the hooks of others, who want to see what the model goes on with.
            self._hooks.append(block.register_forward_hook(self.reduce, prepend=True))

    def learned(self) -> list[str]:
        """The branches whose maps are not those that they started as."""
        return [name for name, maps in self.items() if isinstance(maps, BranchMaps) and maps.have_learned()]

    def detach(self) -> None:
        """Let the block run as before."""
        for hook in self._hooks:
            hook.remove()

    def write(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last module of a branch: what the block is to add to the streams in place of the output."""
        if self._running.read is None:
            raise RuntimeError(f"a branch has ended, in a {type(module).__name__}, that has not begun")
        streams, post, res = self._running.read
        self._running.read = None
        one = torch.eye(self.config.streams, dtype=res.dtype, device=res.device)
        return _with_first(output, write(streams, _first(output), post, res - one))

    def expand(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first block: n streams in place of one."""
        state = _first_tensor(args, kwargs)
        return _replaced(args, kwargs, state, expand(state, self.config.streams))

    def reduce(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last block: the mean of the streams."""
        return _with_first(output, reduce(_first(output)))


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with `new` where `old` is."""
    swap = {name: new if value is old else value for name, value in kwargs.items()}
    return tuple(new if value is old else value for value in args), swap


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, first: Tensor) -> Any:
    """An output like `output` with `first` as its first tensor."""
    if not isinstance(output, tuple | list):
        return first
    changed = (first, *output[1:])
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)


# Finding the blocks ---------------------------------------------------------------------------------------------------


def _name(block: type | str) -> str:
    return block if isinstance(block, str) else block.__name__


def _known(module: nn.Module) -> Branches | None:
    """The branches of a block whose class, or a class above it, is known."""
    keys = (key for cls in type(module).__mro__ for key in (cls, cls.__name__))
    return next((BLOCKS[key] for key in keys if key in BLOCKS), None)


def _stacks(model: nn.Module, block: type[nn.Module] | str | None) -> list[list[tuple[str, nn.Module]]]:
    """The blocks of `model` and their names, those with the same parent together."""
    if not (block is None or isinstance(block, str | type)):
        raise TypeError(f"block must be a class or the name of one, got {block!r}")

    def wanted(module: nn.Module) -> bool:
        if block is None:
            return _known(module) is not None
        return type(module).__name__ == block if isinstance(block, str) else isinstance(module, block)

    stacks = [stack for parent in _outside(model, wanted) if (stack := _stack(model, parent, wanted))]
    if not stacks:
        what = "of a class that is known" if block is None else _name(block)
        raise ValueError(f"{type(model).__name__} holds no block {what}; it holds {_listed(model)}")
    return stacks


def _outside(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """`module` and what is in it, but for the inside of the wanted ones."""
    if not wanted(module):
        yield module
        for child in module.children():
            yield from _outside(child, wanted)


def _stack(model: nn.Module, parent: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """The wanted children of `parent`, and their names in `model`."""
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is parent)
    children = [(prefix + name, child) for name, child in parent.named_children()]
    places = [i for i, (_, child) in enumerate(children) if wanted(child)]
    if not places:
        return []
    row = children[places[0] : places[-1] + 1]
    if isinstance(parent, nn.ModuleList | nn.Sequential):
        if len(children) < len(parent):
            raise ValueError(f"{prefix[:-1]!r} holds a module several times: a block must run once in a forward")
        if others := [(name, child) for name, child in row if not wanted(child)]:
            name, child = others[0]
            raise ValueError(f"{name!r}, a {type(child).__name__}, stands between blocks, where it would get streams")
    return [(name, child) for name, child in row if wanted(child)]


def _listed(model: nn.Module) -> str:
    """The classes of the modules in `model` that hold others, and how many there are of each."""
    counts = Counter(type(module).__name__ for module in model.modules() if any(True for _ in module.children()))
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "no other modules"


def _plan(model: nn.Module, stack: Sequence[tuple[str, nn.Module]]) -> tuple[int, list[tuple[nn.Module, Branches]]]:
    """The width of the blocks of a stack, and the branches of each; a ValueError where there is no telling."""
    blocks: list[tuple[nn.Module, Branches]] = []
    widths: dict[str, int] = {}
    for name, block in stack:
        known = _known(block)
        if known is None:
            raise ValueError(
                f"the residual sums of {name!r}, a {type(block).__name__}, are not known; name its branches with "
                f"register_block({type(block).__name__}, ...): it holds {[key for key, _ in block.named_children()]}"
            )
        modules = dict(block.named_modules())
        branches = {key: ends for key, ends in known.items() if key not in _OPTIONAL or ends[0] in modules}
        missing = [path for ends in branches.values() for path in ends if path not in modules]
        if missing:
            raise ValueError(
                f"the residual sums of {name!r}, a {type(block).__name__}, are not those that are known: it holds no "
                f"{missing}"
            )
        for key, (begin, _) in branches.items():
            first = next(modules[begin].parameters(), None)
            if first is None:
                raise ValueError(f"{name}.{begin}, which begins a branch, holds no parameter that would tell the width")
            widths[f"{name}.{key}"] = int(first.shape[-1])
        blocks.append((block, branches))
    if len(set(widths.values())) > 1:
        raise ValueError(f"the blocks of a stack must have one width, got {widths}")
    return next(iter(widths.values())), blocks


def _streams_of(block: nn.Module) -> BlockStreams:
    child: Any = block.get_submodule(_CHILD)
    return child


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules around the blocks that have streams."""
    blocks = {block for _, block in _retrofitted(model)}
    return [module for module in _outside(model, blocks.__contains__) if not blocks.isdisjoint(module.modules())]


def _retrofitted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that have streams, and their names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, _CHILD, None), BlockStreams):
            yield name, module


# What holds the blocks ------------------------------------------------------------------------------------------------


class _Watch:
    """What a module that holds blocks with streams does beside its own: a hook, and a method of transformers."""

    def __init__(self, module: nn.Module) -> None:
        vars(module)[_WATCH] = self
        self._module = module
        self._hook = module.register_forward_hook(_mean_states)
        self._initializes = hasattr(type(module), "_init_weights")
        if self._initializes:
            module._init_weights = partial(_initialize, module)  # type: ignore[assignment]

    def stop(self) -> None:
        del vars(self._module)[_WATCH]
        self._hook.remove()
        if self._initializes:
            del self._module._init_weights


def _initialize(holder: Any, module: nn.Module) -> None:
    """`_init_weights` of a model of transformers, which asks it for what a checkpoint has not brought."""
    if isinstance(module, ConnectionMaps):
        module.reset_parameters(lambda parameter: not getattr(parameter, "_is_hf_initialized", False))
    else:
        type(holder)._init_weights(holder, module)


def _mean_states(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the states of all layers, that transformers collects on request, without the axis of streams."""
    if isinstance(output, dict):
        for key, value in output.items():
            if (states := _means(value)) is not value:
                output[key] = states
        return output
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(_means(value) for value in output)
    return output


def _means(states: Any) -> Any:
    """`states` with the mean of streams in place of each that has one axis more than the last, which is no stream."""
    if not (isinstance(states, tuple) and states and all(isinstance(state, Tensor) for state in states)):
        return states
    if all(state.ndim == states[-1].ndim for state in states):
        return states
    return tuple(reduce(state) if state.ndim == states[-1].ndim + 1 else state for state in states)
