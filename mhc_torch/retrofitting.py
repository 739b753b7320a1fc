"""Retrofit: streams, or history, around the branches of a model that exists, which goes on computing what it computed.

A block computes `h = h + branch(norm(h))` for each of its branches in turn, and keeps doing so with streams X in the
place of h. A hook hands the first module of a branch H_pre X in place of X; a hook after its last module hands the
block `(H_res - 1) X + H_post^T y` in place of the output y, so that the block's own sum is H_res X + H_post^T y.
So masks, caches, checkpointing and everything else that the forward of a block does stay its own.
"""

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from mhc_torch.connected import AroundHistory, AroundStreams, BranchHistory, Kind
from mhc_torch.history.config import MHCConfig, get_default_config
from mhc_torch.injection import placement
from mhc_torch.monitoring.connection import connections
from mhc_torch.nn.hyper_connections import ConnectionMaps
from mhc_torch.options import check_choice, resolve
from mhc_torch.streams import StreamConfig

Branches = Mapping[str, tuple[str, str]]
"""The branches of a block by name, in the order of their sums: the paths of the first and the last module of each."""

_STREAMS = StreamConfig(start="mixed")
CHILD = "hyper_connections"
_WATCH = "_mhc_watch"
_LLAMA: Branches = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}

BLOCKS: dict[type[nn.Module] | str, Branches] = {
    "DecoderLayer": _LLAMA,  # mhc_torch.models.Decoder
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

Between = tuple[str, str]
"""The paths of the module that puts out the first state of a stack, and of the one that takes the last."""

ENDS: dict[type[nn.Module] | str, Between] = {"DecoderLayer": ("embed_tokens", "norm")}
"""Where the states of blocks begin and end that leave it to the module around them to add what they put out."""

Ends = tuple[nn.Module, nn.Module] | None
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
        TypeError: block is no class of modules and no name; a branch has no pair of paths.
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
    for name, pair in branches.items() if isinstance(branches, Mapping) else [("", branches)]:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(path, str) for path in pair)):
            raise TypeError(
                "branches must give, by the name of each, the paths of its first and its last module, such as "
                f"{{'mlp': ('norm', 'mlp')}}; got {pair!r}{name and f' for {name!r}'}"
            )
    BLOCKS[block] = dict(branches)


def retrofit(
    model: nn.Module,
    block: type[nn.Module] | str | None = None,
    streams: int | None = None,
    *,
    history: int | None = None,
    parameters: Literal["all", "new"] = "all",
    config: StreamConfig | MHCConfig | None = None,
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
        streams: number n of streams, 2 at least; 4 if nothing else is said.
        history: in place of streams, the window of states of which each branch mixes the last ones into its sum,
            `h + y + gain * sum_k alpha_k x_k`, with a gain that starts at 0. The window reaches back over branches.
        parameters: "all" leaves what is trained as it is; "new" freezes all but the parameters of the connections.
        config: all options in one value, of streams or of history; keywords, the fields of it, change single ones.
            Without it, `start` of streams and `init` of history are "mixed": maps that can learn.

    Returns:
        The same model.

    Raises:
        TypeError: model is no module, or as `StreamConfig` and `MHCConfig`.
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
    kind = _kind(streams, history, config, options)
    if done := next(_retrofitted(model), None):
        raise ValueError(f"the model is retrofitted already: {done[0]!r} has {CHILD}; unretrofit it first")
    plans = [(_ends(model, stack), *_plan(model, stack)) for stack in _stacks(model, block)]
    made = [child for ends, width, blocks in plans for child in _made(kind, ends, width, blocks)]

    # All that can fail has been done.
    if parameters == "new":
        model.requires_grad_(False)
    for target, child in made:
        child.attach(target)
        target.add_module(CHILD, child)
    for holder in _holders(model):
        _Watch(holder, kind)
    return model


def _made(
    kind: Kind, ends: Ends, width: int, blocks: Sequence[tuple[nn.Module, Branches]]
) -> Iterator[tuple[nn.Module, "BlockConnections"]]:
    """The blocks of a stack, and the connections of each."""
    index = 0
    first, last = ends or (blocks[0][0], blocks[-1][0])
    for target, branches in blocks:
        begin, end = (first if target is blocks[0][0] else None), (last if target is blocks[-1][0] else None)
        yield target, BlockConnections(kind, branches, width, index, begin, end, **placement(target))
        index += len(branches)


def _kind(streams: int | None, history: int | None, config: Any, options: dict[str, Any]) -> Kind:
    """The connection that is asked for; a ValueError where it could not keep the function of a model."""
    if history is not None or isinstance(config, MHCConfig):
        if streams is not None:
            raise ValueError(f"streams must not be given with history, got {streams}")
        default = replace(get_default_config(), init="mixed")
        return AroundHistory(_history_config(resolve(default, config, max_history=history, **options)))
    return AroundStreams(_stream_config(resolve(_STREAMS, config, streams=streams, **options)))


def _stream_config(config: StreamConfig) -> StreamConfig:
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
    return config


def _history_config(config: MHCConfig) -> MHCConfig:
    if config.max_history < 2:
        raise ValueError(f"history must be at least 2, got {config.max_history}: one state is what the model has")
    if config.mode == "residual":
        raise ValueError("mode must be 'mhc' or 'hc', got 'residual': it mixes no history")
    for name, why in _NOT_OF_BLOCKS.items():
        if value := getattr(config, name):
            raise ValueError(f"{name} must be False, got {value}: {why}")
    if not config.clear_history_each_forward or config.history_scope != "global":
        raise ValueError(
            "clear_history_each_forward must be True and history_scope 'global': the window is part of the state that "
            f"blocks pass on; got {config.clear_history_each_forward} and {config.history_scope!r}"
        )
    return config


_NOT_OF_BLOCKS = {
    "auto_project": "the states of a stack have one width",
    "use_gating": "a gain that starts at 0 scales the history",
    "stochastic": "a block of an existing model hands no noise to its connections",
}


def unretrofit(model: nn.Module) -> nn.Module:
    """Take the connections off again, where they are as `retrofit` left them: the model is what it was.

    What `parameters="new"` froze stays frozen.

    Raises:
        ValueError: the model is not retrofitted, or its connections have learned; it is unchanged then.
    """
    found = list(_retrofitted(model))
    if not found:
        raise ValueError(f"{type(model).__name__} is not retrofitted")
    learned = [f"{name}.{CHILD}.{key}" for name, block in found for key in _connections_of(block).learned()]
    if learned:
        raise ValueError(f"the connections have learned, without them the model is another: {learned}")
    for holder in _holders(model):
        vars(holder)[_WATCH].stop()
    for _, block in found:
        _connections_of(block).detach()
        delattr(block, CHILD)
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
    """What the branch that runs in this thread has read: its connection, the states, and what `added` takes beside.

    A copy begins with nothing. Not a context variable, which torch.compile cannot follow.
    """

    read: tuple[Any, Tensor, tuple[Any, ...]] | None = None

    def __reduce__(self) -> Any:
        return _Running, ()


class BlockConnections(nn.ModuleDict):
    """The connections of the branches of one block, by the names of these, and the hooks by which the block uses them.

    Args:
        kind: how they are connected.
        branches: those of the block.
        width: features C of a state.
        index: the number of the first branch in its stack.
        first: what makes the states, in the first block of a stack: the block, or the module that puts out one.
        last: what gives one again, in the last: the block, or the module that takes one.
        **factory: dtype and device of the parameters.
    """

    def __init__(
        self,
        kind: Kind,
        branches: Branches,
        width: int,
        index: int,
        first: nn.Module | None,
        last: nn.Module | None,
        **factory: Any,
    ) -> None:
        self.first: nn.Module | None
        self.last: nn.Module | None
        super().__init__({name: kind.branch(width, index + i, **factory) for i, name in enumerate(branches)})
        self.kind, self.branches = kind, branches
        # Not as submodules: they are elsewhere.
        vars(self).update(first=first, last=last)
        self._running = _Running()
        self._hooks: list[Any] = []

    def attach(self, block: nn.Module) -> None:
        """Let `block` run on the states."""
        for name, (begin, _) in self.branches.items():
            module = block.get_submodule(begin)
            hook = partial(self.read, name, _parameters(module))
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for end in dict.fromkeys(block.get_submodule(end) for _, end in self.branches.values()):
            self._hooks.append(end.register_forward_hook(self.write))
        if self.first is block:
            hook = partial(self.expand, _parameters(block))
            self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        elif self.first is not None:
            self._hooks.append(self.first.register_forward_hook(self.open))
        if self.last is block:
            # Before the hooks of others, who want to see what the model goes on with.
            self._hooks.append(block.register_forward_hook(self.reduce, prepend=True))
        elif self.last is not None:
            last: nn.Module = self.last
            last_hook = partial(self.close, _parameters(last))
            self._hooks.append(last.register_forward_pre_hook(last_hook, with_kwargs=True))

    def called_otherwise(self, block: nn.Module) -> set[nn.Module]:
        """The modules that are given, or put out, something else than by themselves."""
        inside = {block.get_submodule(path) for ends in self.branches.values() for path in ends}
        return inside | {module for module in (self.first, self.last) if module not in (None, block)}

    def learned(self) -> list[str]:
        """The branches whose sums no longer are those that the model was retrofitted with."""
        parts: Any = self
        return [name for name in self.branches if parts[name].have_learned()]

    def detach(self) -> None:
        """Let the block run as before."""
        for hook in self._hooks:
            hook.remove()

    def read(
        self, branch: str, order: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Before the first module of a branch: what it reads, in place of the states."""
        states = _state_of(order, args, kwargs)
        connection = self[branch]
        state, *rest = connection(states)
        self._running.read = connection, states, tuple(rest)
        return _replaced(args, kwargs, states, state)

    def write(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last module of a branch: what the block is to add to the states in place of the output."""
        if self._running.read is None:
            raise RuntimeError(f"a branch has ended, in a {type(module).__name__}, that has not begun")
        connection, states, rest = self._running.read
        self._running.read = None
        return _with_first(output, connection.added(states, _first(output), *rest))

    def expand(self, order: tuple[str, ...], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the first block: the states in place of one."""
        state = _state_of(order, args, kwargs)
        return _replaced(args, kwargs, state, self.kind.expand(state))

    def open(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the module that puts out the first state: the states in place of it."""
        return _with_first(output, self.kind.expand(_first(output)))

    def close(self, order: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module that takes the last state: one in place of the states."""
        states = _state_of(order, args, kwargs)
        return _replaced(args, kwargs, states, self.kind.reduce(states))

    def reduce(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the last block: one state again."""
        return _with_first(output, self.kind.reduce(_first(output)))


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module is called with, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def _state_of(order: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among the arguments, in the order of the signature."""
    named = [kwargs[name] for name in order if name in kwargs] + [v for k, v in kwargs.items() if k not in order]
    for value in (*args, *named):
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"a retrofitted module must be called with a tensor, its state; got {(*args, *named)}")


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
        raise TypeError(f"block must be a class or the name of one, got a {type(block).__name__}")

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
        if hasattr(block, CHILD):
            raise ValueError(f"{name!r}, a {type(block).__name__}, has an attribute {CHILD} of its own")
        known = _known(block)
        if known is None:
            raise ValueError(
                f"the residual sums of {name!r}, a {type(block).__name__}, are not known; name its branches with "
                f"register_block({type(block).__name__}, ...): it holds {[key for key, _ in block.named_children()]}"
            )
        modules = dict(block.named_modules(remove_duplicate=False))
        branches = {key: ends for key, ends in known.items() if key not in _OPTIONAL or ends[0] in modules}
        missing = [path for ends in branches.values() for path in ends if path not in modules]
        if missing:
            raise ValueError(
                f"the residual sums of {name!r}, a {type(block).__name__}, are not those that are known: it holds no "
                f"{missing}"
            )
        begins = Counter(modules[begin] for begin, _ in branches.values())
        for key, (begin, _) in branches.items():
            if begins[modules[begin]] > 1:
                raise ValueError(f"{name}.{begin}, a {type(modules[begin]).__name__}, begins several branches")
            first = next(modules[begin].parameters(), None)
            if first is None:
                raise ValueError(f"{name}.{begin}, which begins a branch, holds no parameter that would tell the width")
            widths[f"{name}.{key}"] = int(first.shape[-1])
        blocks.append((block, branches))
    if len(set(widths.values())) > 1:
        raise ValueError(f"the blocks of a stack must have one width, got {widths}")
    return next(iter(widths.values())), blocks


def _ends(model: nn.Module, stack: Sequence[tuple[str, nn.Module]]) -> Ends:
    """The modules between which the states of a stack live, where the blocks leave the sum to what is around them."""
    name, block = stack[0]
    paths = next((ENDS[key] for cls in type(block).__mro__ for key in (cls, cls.__name__) if key in ENDS), None)
    while paths is not None and name:
        name = name.rpartition(".")[0]
        around = dict(model.get_submodule(name).named_modules())
        if all(path in around for path in paths):
            return around[paths[0]], around[paths[1]]
    return None


def called_otherwise(model: nn.Module) -> set[nn.Module]:
    """The modules of a retrofitted model that are given, or put out, something else than by themselves.

    They are called by themselves by their method `forward`.
    """
    found: set[nn.Module] = set()
    return found.union(*(_connections_of(block).called_otherwise(block) for _, block in _retrofitted(model)))


def around_ends(model: nn.Module) -> set[nn.Module]:
    """The modules inside the blocks of a retrofitted model in which a branch begins or ends.

    They run within their block alone.
    """
    found = set[nn.Module]()
    for _, block in _retrofitted(model):
        for path in (path for ends in _connections_of(block).branches.values() for path in ends):
            while path := path.rpartition(".")[0]:
                found.add(block.get_submodule(path))
    return found


def _connections_of(block: nn.Module) -> BlockConnections:
    child: Any = block.get_submodule(CHILD)
    return child


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules around the blocks that have streams."""
    blocks = {block for _, block in _retrofitted(model)}
    return [module for module in _outside(model, blocks.__contains__) if not blocks.isdisjoint(module.modules())]


def _retrofitted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks that have streams, and their names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, CHILD, None), BlockConnections):
            yield name, module


# What holds the blocks ------------------------------------------------------------------------------------------------


class _Watch:
    """What a module that holds blocks with connections does beside its own: a hook, and a method of transformers."""

    def __init__(self, module: nn.Module, kind: Kind) -> None:
        vars(module)[_WATCH] = self
        self._module = module
        self._hook = module.register_forward_hook(partial(_single_states, kind))
        self._before = vars(module).get("_init_weights")
        self._initializes = hasattr(module, "_init_weights")
        if self._initializes:
            module._init_weights = partial(_initialize, module, self._before)  # type: ignore[assignment]

    def stop(self) -> None:
        del vars(self._module)[_WATCH]
        self._hook.remove()
        if self._initializes:
            del self._module._init_weights
        if self._before is not None:
            self._module._init_weights = self._before


def _initialize(holder: Any, own: Callable[[nn.Module], Any] | None, module: nn.Module) -> None:
    """`_init_weights` of a model of transformers, which asks it for what a checkpoint has not brought."""
    if isinstance(module, ConnectionMaps | BranchHistory):
        module.reset_parameters(lambda parameter: not getattr(parameter, "_is_hf_initialized", False))
    elif own is not None:
        own(module)
    else:
        type(holder)._init_weights(holder, module)


def _single_states(kind: Kind, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: the states of all layers, that transformers collects on request, as the model goes on with them."""
    if isinstance(output, dict):
        for key, value in output.items():
            if (states := _single(kind, value)) is not value:
                output[key] = states
        return output
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(_single(kind, value) for value in output)
    return output


def _single(kind: Kind, states: Any) -> Any:
    """`states` with one in place of each that has one axis more than the last, which is single."""
    if not (isinstance(states, tuple) and states and all(isinstance(state, Tensor) for state in states)):
        return states
    if all(state.ndim == states[-1].ndim for state in states):
        return states
    return tuple(kind.reduce(state) if state.ndim == states[-1].ndim + 1 else state for state in states)
