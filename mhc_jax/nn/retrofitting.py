"""Retrofit: streams, or history, around the branches of a model that exists, which goes on computing what it computed.

A block computes `h = h + branch(norm(h))` for each of its branches in turn, and keeps doing so with streams X in the
place of h. The first module of a branch is handed H_pre X in place of X; what its last module puts out, y, reaches the
block as `(H_res - 1) X + H_post^T y`, so that the block's own sum is H_res X + H_post^T y. So masks, caches, remat and
everything else that a block does stay its own. Modules stay what and where they are: those that are called otherwise
get a subclass of their class.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mhc_jax.history import MHCConfig
from mhc_jax.nn.connected import AroundHistory, AroundStreams, BlockConnections, Kind, connect
from mhc_jax.nn.interception import Begins, Closes, Ends, Opens, Role, Runs, changed, given_back, intercept
from mhc_jax.options import resolve
from mhc_jax.streams import StreamConfig

Branches = Mapping[str, tuple[str, str]]
"""The branches of a block by name, in the order of their sums: the paths of the first and the last module of each."""

Between = tuple[str, str]
"""The paths of the module that puts out the first state of a stack, and of the one that takes the last."""

CHILD = "hyper_connections"

_STREAMS = StreamConfig(start="mixed")
_HISTORY = MHCConfig(init="mixed")

BLOCKS: dict[type[nnx.Module] | str, list[Branches]] = {
    "DecoderLayer": [
        # `mhc_jax.models.Decoder`, and the names of Llama, Mistral and Qwen3 in transformers.
        {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")},
        # Llama and Qwen of Tunix and others.
        {"attention": ("input_layernorm", "attn"), "mlp": ("post_attention_layernorm", "mlp")},
    ],
}
"""The blocks that are known, by class or by name of the class; `register_block` adds one."""

ENDS: dict[type[nnx.Module] | str, Between] = {"DecoderLayer": ("embed_tokens", "norm")}
"""Where the streams of blocks begin and end, if these are scanned."""


def register_block(block: type[nnx.Module] | str, branches: Branches, *, ends: Between | None = None) -> None:
    """Make a class of blocks known to `retrofit`; subclasses count.

    A call of such a block must compute `h = h + branch(h)` for each branch, or `h = norm(h + branch(h))` with a norm of
    each token, where h reaches the branch through its first module alone, and its last module puts out what is added to
    h: a dropout, if there is one before the sum. What else a module takes or puts out beside the state is free.

    Args:
        block: the class, or its name.
        branches: by a name for each branch, the paths of its first and its last module, in the order of the sums; or of
            a method of theirs, such as "attn.block", if that is what is called. The first module is a norm, or it, or
            the modules in it, have their width as `in_features`.
        ends: as of `retrofit`, for blocks that are scanned; paths from the nearest module that has both.

    Raises:
        TypeError: block is no class of modules and no name; a branch has no pair of paths.
        ValueError: there are no branches.

    Example:
        >>> register_block("GemmaBlock", {"attention": ("norm1", "attn"), "mlp": ("norm2", "mlp")})
        >>> BLOCKS["GemmaBlock"]
        [{'attention': ('norm1', 'attn'), 'mlp': ('norm2', 'mlp')}]
    """
    if not (isinstance(block, str) or (isinstance(block, type) and issubclass(block, nnx.Module))):
        raise TypeError(f"block must be a subclass of flax.nnx.Module or the name of one, got {block!r}")
    if not branches:
        raise ValueError(f"branches must name the residual branches of {_name(block)}, got none")
    for name, pair in branches.items() if isinstance(branches, Mapping) else [("", branches)]:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(path, str) for path in pair)):
            raise TypeError(
                "branches must give, by the name of each, the paths of its first and its last module, such as "
                f"{{'mlp': ('norm', 'mlp')}}; got {pair!r}{name and f' for {name!r}'}"
            )
    BLOCKS[block] = [dict(branches)]
    if ends is not None:
        ENDS[block] = ends


def retrofit(
    model: nnx.Module,
    block: type[nnx.Module] | str | None = None,
    streams: int | None = None,
    *,
    history: int | None = None,
    ends: Between | None = None,
    config: StreamConfig | MHCConfig | None = None,
    **options: Any,
) -> Any:
    """Put n residual streams around the residual branches of every block of a model, which keeps its function.

    Streams are made once, before the first block of a stack, and their mean is taken once, after the last; blocks with
    the same parent are a stack. Modules stay what and where they are, and so do the paths of their variables; each
    block gets a child `hyper_connections`, which holds the maps of its branches, as `ConnectionParam`s: by that filter
    they are trained alone.

    Blocks may be single modules, or one module whose variables have a leading axis of depth, that the model scans. A
    scan is handed its state by the model: there `ends` say where streams are made, and where their mean is taken.

    Args:
        model: the model, with the weights that it has learned.
        block: class of its residual blocks, or the name of one. None: every class that is known, in `BLOCKS`.
        streams: number n of streams, 2 at least; 4 if nothing else is said.
        history: in place of streams, the window of states of which each branch mixes the last ones into its sum,
            `h + y + gain * sum_k alpha_k x_k`, with a gain that starts at 0. The window reaches back over branches.
        ends: the paths of the module, or method, that puts out the first state, such as "embedder.encode", and of the
            one that takes the last, such as "norm". All blocks between the two are one stack.
        config: all options in one value, of streams or of history; keywords, the fields of it, change single ones.
            Without it, `start` of streams and `init` of history are "mixed": maps that can learn.

    Returns:
        The same model.

    Raises:
        TypeError: model is no module, or as `StreamConfig` and `MHCConfig`.
        ValueError: there is no such block; the model is retrofitted already; the residual sums of the blocks are not
            known; their widths differ; another module stands between two blocks; blocks are scanned, and where their
            states come from is not known; an option is out of range. The model is unchanged then.

    Example:
        >>> from flax import nnx
        >>> from mhc_jax.models import Decoder, DecoderConfig
        >>> from mhc_jax.nn import retrofit
        >>> config = DecoderConfig(100, features=16, mlp_features=32, depth=3, num_heads=2)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> before = model(tokens)
        >>> bool(jnp.allclose(retrofit(model, streams=2)(tokens), before, atol=1e-5))
        True
        >>> model.stack.layers.hyper_connections.attention.phi.shape
        (3, 32, 8)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    if "parameters" in options:
        raise TypeError(
            "parameters is an option of mhc_torch.retrofit; in JAX a filter says what is trained: "
            "TrainState.create(model, optimizer, trained=ConnectionParam)"
        )
    kind = _kind(streams, history, config, options)
    if done := next(_retrofitted(model), None):
        raise ValueError(f"the model is retrofitted already: {done[0]!r} has {CHILD}; unretrofit it first")
    plan = _Plan()
    for stack in _stacks(model, block, ends):
        plan.add(stack, kind)
    plan.carry_out()
    return model


def unretrofit(model: nnx.Module) -> Any:
    """Take the connections off again, where they are as `retrofit` left them: the model is what it was.

    Raises:
        ValueError: the model is not retrofitted, or its connections have learned; it is unchanged then.

    Example:
        >>> from flax import nnx
        >>> from mhc_jax.models import Decoder, DecoderConfig
        >>> from mhc_jax.nn import retrofit, unretrofit
        >>> config = DecoderConfig(100, features=16, mlp_features=32, depth=3, num_heads=2)
        >>> model = unretrofit(retrofit(Decoder(config, rngs=nnx.Rngs(0))))
        >>> hasattr(model.stack.layers, "hyper_connections")
        False
    """
    found = list(_retrofitted(model))
    if not found:
        raise ValueError(f"{type(model).__name__} is not retrofitted")
    learned = [f"{name}.{CHILD}.{branch}" for name, block in found for branch in getattr(block, CHILD).learned()]
    if learned:
        raise ValueError(f"the connections have learned, without them the model is another: {learned}")
    for _, block in found:
        delattr(block, CHILD)
    for at in _walk(model):
        if changed(at.module):
            given_back(at.module)
    return model


def _kind(streams: int | None, history: int | None, config: Any, options: dict[str, Any]) -> Kind:
    """The connection that is asked for; a ValueError where it could not keep the function of a model."""
    if history is not None or isinstance(config, MHCConfig):
        if streams is not None:
            raise ValueError(f"streams must not be given with history, got {streams}")
        return AroundHistory(_history_config(resolve(_HISTORY, config, max_history=history, **options)))
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
    return config


_NOT_OF_BLOCKS = {
    "auto_project": "the states of a stack have one width",
    "use_gating": "a gain that starts at 0 scales the history",
    "stochastic": "a block of an existing model hands no noise to its connections",
}


# Finding the blocks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _At:
    """A module or list of a model, where it is, and what it is in, the model first."""

    name: str
    module: Any
    parents: tuple[Any, ...]


def _name(block: type | str) -> str:
    return block if isinstance(block, str) else block.__name__


def _children(node: Any) -> list[tuple[str, Any]]:
    """The modules, and lists of them, that a node holds."""
    if isinstance(node, nnx.List | list | tuple):
        items = [(str(i), child) for i, child in enumerate(node)]
    else:
        items = list((node if isinstance(node, Mapping) else vars(node)).items())
    return [(str(key), child) for key, child in items if isinstance(child, nnx.Module | list | tuple | dict)]


def _walk(model: Any, stop: Callable[[Any], bool] = lambda _: False) -> Iterator[_At]:
    """What is in a model, itself first, shared modules each time; not what is inside of where to `stop`."""
    seen: set[int] = set()

    def walk(at: _At) -> Iterator[_At]:
        yield at
        if id(at.module) not in seen and not stop(at.module):
            seen.add(id(at.module))
            for key, child in _children(at.module):
                yield from walk(_At(f"{at.name}.{key}".lstrip("."), child, (*at.parents, at.module)))

    return walk(_At("", model, ()))


def _known(module: Any) -> list[Branches] | None:
    """The branches that a block may have whose class, or a class above it, is known."""
    return next((BLOCKS[key] for key in _keys(module) if key in BLOCKS), None)


def _keys(module: Any) -> Iterator[type | str]:
    return (key for cls in type(module).__mro__ for key in (cls, cls.__name__))


@dataclass(frozen=True)
class _Block:
    """What there is to know of a block before it is changed; `depth` is that of a stacked one."""

    name: str
    module: Any
    branches: Branches
    width: int
    dtype: Any
    depth: int | None


@dataclass(frozen=True)
class _Stack:
    """Blocks that run one after another, and where their states are made and taken, if not at their own ends."""

    blocks: list[_Block]
    ends: tuple[tuple[Any, str], tuple[Any, str]] | None


def _stacks(model: nnx.Module, block: type[nnx.Module] | str | None, ends: Between | None) -> list[_Stack]:
    if not (block is None or isinstance(block, str | type)):
        raise TypeError(f"block must be a class or the name of one, got a {type(block).__name__}")

    def wanted(module: Any) -> bool:
        if block is None:
            return _known(module) is not None
        return type(module).__name__ == block if isinstance(block, str) else isinstance(module, block)

    found = [at for at in _walk(model, wanted) if wanted(at.module)]
    if not found:
        what = "of a class that is known" if block is None else _name(block)
        raise ValueError(f"{type(model).__name__} holds no block {what}; it holds {_listed(model)}")
    if twice := [at.name for at, count in _counted(found) if count > 1]:
        raise ValueError(f"{twice[0]!r} is held several times: a block must run once in a call")
    if model is found[0].module:
        raise ValueError(f"{type(model).__name__} is a block itself: retrofit the model that holds it")
    if ends is not None:
        pair = isinstance(ends, tuple | list) and len(ends) == 2
        places = _placed(model, ends) if pair else None
        if places is None:
            raise ValueError(
                f"ends must be two paths of modules in {type(model).__name__}, or of methods, got {ends!r}"
            )
        return [_stack([_block(at) for at in found], places)]
    return _between_ends(found)


def _counted(found: Sequence[_At]) -> Iterator[tuple[_At, int]]:
    counts = Counter(id(at.module) for at in found)
    return ((at, counts[id(at.module)]) for at in found)


def _between_ends(found: Sequence[_At]) -> list[_Stack]:
    """Blocks with the same parent as a stack; stacked ones between the ends that are known of them."""
    rows: dict[int, list[_At]] = {}
    for at in found:
        rows.setdefault(id(at.parents[-1]), []).append(at)
    stacks = []
    scanned: dict[Any, tuple[list[_Block], Any]] = {}  # one stack between the same ends
    for row in rows.values():
        _check_between(row)
        blocks = [_block(at) for at in row]
        if all(block.depth is None for block in blocks):
            stacks.append(_stack(blocks, None))
            continue
        for at, block in zip(row, blocks, strict=True):
            places = _known_ends(at)
            key = tuple((id(module), method) for module, method in places)
            scanned.setdefault(key, ([], places))[0].append(block)
    return stacks + [_stack(blocks, places) for blocks, places in scanned.values()]


def _known_ends(at: _At) -> Any:
    ends = next((ENDS[key] for key in _keys(at.module) if key in ENDS), None)
    places = (_placed(parent, ends) for parent in reversed(at.parents)) if ends else ()
    found = next((place for place in places if place is not None), None)
    if found is None:
        tried = f", and there are no {ends} around it" if ends else ""
        raise ValueError(
            f"the variables of {at.name!r}, a {type(at.module).__name__}, have a leading axis of depth{tried}: give "
            "ends, the paths of the module that puts out the first state and of the one that takes the last"
        )
    return found


def _check_between(row: Sequence[_At]) -> None:
    """Only blocks stand between the blocks of a list."""
    parent = row[0].parents[-1]
    if not isinstance(parent, nnx.List | list | tuple):
        return
    places = [int(at.name.rpartition(".")[2]) for at in row]
    if others := sorted(set(range(places[0], places[-1])) - set(places)):
        name = f"{row[0].name.rpartition('.')[0]}.{others[0]}".lstrip(".")
        kind = type(parent[others[0]]).__name__
        raise ValueError(f"{name!r}, a {kind}, stands between blocks, where it would get streams")


def _stack(blocks: list[_Block], ends: Any) -> _Stack:
    widths = {block.name: block.width for block in blocks}
    if len(set(widths.values())) > 1:
        raise ValueError(f"the blocks of a stack must have one width, got {widths}")
    return _Stack(blocks, ends)


def _listed(model: nnx.Module) -> str:
    """The classes of the modules in `model` that hold others, and how many there are of each."""
    inside = {id(at.module): at.module for at in _walk(model) if at.name and isinstance(at.module, nnx.Module)}
    counts = Counter(type(module).__name__ for module in inside.values() if _children(module))
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "no other modules"


def _placed(node: Any, paths: Sequence[str]) -> Any:
    """The modules at these paths and which method of each is meant; None where there is none."""
    places = [_place(node, path) for path in paths]
    return None if None in places else tuple(places)


def _place(node: Any, path: str) -> tuple[Any, str] | None:
    *way, last = path.split(".")
    for key in way:
        node = dict(_children(node)).get(key)
        if node is None:
            return None
    held = dict(_children(node)).get(last)
    if isinstance(held, nnx.Module):
        return held, "__call__"
    is_method = isinstance(node, nnx.Module) and callable(getattr(type(node), last, None))
    return (node, last) if is_method else None


def _block(at: _At) -> _Block:
    """What a block is; a ValueError where there is no telling."""
    module, kind = at.module, type(at.module).__name__
    known = _known(module)
    if known is None:
        raise ValueError(
            f"the residual sums of {at.name!r}, a {kind}, are not known; name its branches with "
            f"register_block({kind}, ...): it holds {[key for key, _ in _children(module)]}"
        )
    missing = [[path for ends in one.values() for path in ends if _place(module, path) is None] for one in known]
    if all(missing):
        raise ValueError(
            f"the residual sums of {at.name!r}, a {kind}, are not those that are known: it holds no {missing[0]}"
        )
    branches = known[missing.index([])]
    if hasattr(module, CHILD):
        raise ValueError(f"{at.name!r}, a {kind}, has an attribute {CHILD} of its own")
    shapes = {}
    for branch, (begin, _) in branches.items():
        shape = _shape(_place(module, begin)[0])  # type: ignore[index]
        if not shape:
            raise ValueError(f"{at.name}.{begin}, which begins a branch, has no parameter that would tell the width")
        shapes[f"{at.name}.{branch}"] = shape
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the blocks of a stack must have one width, got { {k: v[-1] for k, v in shapes.items()} }")
    *depth, width = next(iter(shapes.values()))
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    floats = (leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
    dtype = jnp.promote_types(next(floats, jnp.float32), jnp.float32)
    return _Block(at.name, module, branches, width, dtype, depth[0] if depth else None)


def _shape(begin: Any) -> tuple[int, ...] | None:
    """The width that the first module of a branch tells by its parameters, and before it the depth, if stacked.

    Where it has none of its own, the modules in it tell, if they agree.
    """
    shapes = [value.shape for value in vars(begin).values() if isinstance(value, nnx.Param)]
    width = getattr(begin, "in_features", None)
    width = width[0] if isinstance(width, tuple) and len(width) == 1 else width
    if not shapes:
        inside = {_shape(child) for _, child in _children(begin) if isinstance(child, nnx.Module)}
        told = {shape for shape in inside if shape and width in (None, shape[-1])}
        return told.pop() if len(told) == 1 else None
    if width is None:
        return min(shapes, key=len)
    return next((shape[: shape.index(width) + 1] for shape in sorted(shapes, key=len) if width in shape), None)


def _retrofitted(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """The blocks that have connections, and their names."""
    for at in _walk(model):
        if isinstance(at.module, nnx.Module) and isinstance(getattr(at.module, CHILD, None), BlockConnections):
            yield at.name, at.module


# Changing them --------------------------------------------------------------------------------------------------------


class _Plan:
    """All that is to be changed in a model, made and checked before any of it is."""

    def __init__(self) -> None:
        self._modules: dict[int, Any] = {}
        self._roles: dict[int, tuple[str, list[Role]]] = {}
        self._children: list[tuple[Any, BlockConnections]] = []

    def add(self, stack: _Stack, kind: Kind) -> None:
        first = 0
        last = len(stack.blocks) - 1 if stack.ends is None else None
        for position, block in enumerate(stack.blocks):
            names = tuple(block.branches)
            self._children.append((block.module, connect(kind, names, block.width, block.dtype, first, block.depth)))
            opens = stack.ends is None and position == 0
            self._role((block.module, "__call__"), block.name, Runs(kind, opens, position == last))
            for branch, (begin, end) in block.branches.items():
                self._role(_place(block.module, begin), f"{block.name}.{begin}", Begins(branch))
                self._role(_place(block.module, end), f"{block.name}.{end}", Ends())
            first += len(names) * (block.depth or 1)
        if stack.ends is not None:
            self._role(stack.ends[0], "ends", Opens(kind))
            self._role(stack.ends[1], "ends", Closes(kind))

    def _role(self, place: Any, name: str, role: Role) -> None:
        module, method = place
        self._modules[id(module)] = module
        known, roles = self._roles.setdefault(id(module), (method, []))
        if role in roles:  # a dropout that ends both branches
            return
        if known != method or any(type(role) is type(other) for other in roles):
            raise ValueError(f"{name}, a {type(module).__name__}, begins or ends several branches: {[*roles, role]}")
        roles.append(role)

    def carry_out(self) -> None:
        classes: dict[int, Any] = {}
        for key, (method, roles) in self._roles.items():
            in_order = tuple(sorted(roles, key=lambda role: isinstance(role, Ends)))
            classes[key] = intercept(self._modules[key].__class__, method, in_order)
        for key, kind in classes.items():
            object.__setattr__(self._modules[key], "__class__", kind)
        for block, connections in self._children:
            setattr(block, CHILD, connections)
