"""JAX functions and models inside PyTorch programs, differentiable, over shared memory where that is safe.

Both libraries work on the same memory (DLPack), so what a call costs is bookkeeping, whatever the size of the arrays.
The safety of that rests on a few rules, all kept here: a call returns when JAX has finished, so that a tensor may be
changed afterwards; no result shares memory with an argument; and no dtype is converted behind the user's back.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn

from bridge.weights.arrays import to_numpy

_Structure = Hashable
_64_BIT = (torch.int64, torch.uint64, torch.float64, torch.complex128)
_PROCESS = os.getpid()


class _Program:
    """A JAX function of a flat list of arrays, compiled for one signature, and its derivatives, made when asked for."""

    known: list["_Program"] = []  # noqa: RUF012 - the op below takes an index, since it can take no object

    def __init__(self, function: Callable[..., Sequence[jax.Array]], specs: Sequence[jax.ShapeDtypeStruct]) -> None:
        self.function = function
        self.specs = list(specs)
        self.results = jax.eval_shape(function, *specs)
        self.floating = [i for i, r in enumerate(self.results) if jnp.issubdtype(r.dtype, jnp.inexact)]
        self.run = jax.jit(function)
        self.derivatives: dict[tuple[int, ...], int] = {}
        self.index = len(self.known)
        self.known.append(self)

    def derivative(self, wanted: tuple[int, ...]) -> int:
        """The program (arguments, cotangents of the floating-point results) -> gradients of the wanted arguments."""
        if wanted not in self.derivatives:

            def pullback(*arrays: jax.Array) -> Sequence[jax.Array]:
                inputs, cotangents = list(arrays[: len(self.specs)]), arrays[len(self.specs) :]

                def of_wanted(*values: jax.Array) -> list[jax.Array]:
                    for place, array in zip(wanted, values, strict=True):
                        inputs[place] = array
                    results = self.function(*inputs)
                    return [results[i] for i in self.floating]

                return jax.vjp(of_wanted, *(inputs[i] for i in wanted))[1](list(cotangents))

            specs = [*self.specs, *(self.results[i] for i in self.floating)]
            self.derivatives[wanted] = _Program(pullback, specs).index
        return self.derivatives[wanted]


def _to_jax(tensor: Tensor) -> jax.Array:
    if tensor.dtype in _64_BIT and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"JAX would truncate a tensor of {tensor.dtype} to 32 bits: convert it, or enable x64 "
            '(jax.config.update("jax_enable_x64", True))'
        )
    # DLPack takes neither what requires grad nor views with gaps, such as the expanded gradient of a sum.
    return jax.dlpack.from_dlpack(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _run(arguments: list[Tensor], program: int) -> list[Tensor]:
    if os.getpid() != _PROCESS:
        raise RuntimeError("JAX does not work in a forked process: start workers with the method 'spawn'")
    results = _Program.known[program].run(*map(_to_jax, arguments))
    jax.block_until_ready(results)
    # A result can be an argument, or another result, that was passed on; torch must be free to write into each.
    taken = {argument.data_ptr() for argument in arguments}
    tensors = []
    for result in results:
        tensor = torch.from_dlpack(result)
        tensor = tensor.clone() if tensor.data_ptr() in taken else tensor
        taken.add(tensor.data_ptr())
        tensors.append(tensor)
    return tensors


_call_jax = torch.library.custom_op("bridge::call_jax", _run, mutates_args=())


@_call_jax.register_fake
def _(arguments: list[Tensor], program: int) -> list[Tensor]:
    device = arguments[0].device if arguments else None
    return [
        torch.empty(result.shape, dtype=getattr(torch, result.dtype.name), device=device)
        for result in _Program.known[program].results
    ]


def _keep(ctx: Any, inputs: tuple[list[Tensor], int], output: list[Tensor]) -> None:
    arguments, ctx.program = inputs
    ctx.save_for_backward(*arguments)


def _pull_back(ctx: Any, cotangents: list[Tensor]) -> tuple[list[Tensor | None], None]:
    return _gradients(ctx.program, ctx.saved_tensors, ctx.needs_input_grad[0], cotangents), None


_call_jax.register_autograd(_pull_back, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """The same op for plain tensors, around PyTorch's dispatcher, which takes half the time of a small call."""

    @staticmethod
    def forward(program: int, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(_run(list(arguments), program))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.program, *arguments = inputs
        ctx.save_for_backward(*arguments)
        floating = _Program.known[ctx.program].floating
        if len(floating) < len(output):
            ctx.mark_non_differentiable(*(result for i, result in enumerate(output) if i not in floating))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx.program, ctx.saved_tensors, ctx.needs_input_grad[1:], cotangents)


def _call(arguments: Sequence[Tensor], program: int) -> Sequence[Tensor]:
    if torch.compiler.is_compiling() or not all(type(a) is Tensor or type(a) is nn.Parameter for a in arguments):
        return _call_jax(list(arguments), program)
    return _Eager.apply(program, *arguments)


def _gradients(
    index: int, arguments: Sequence[Tensor], needed: Sequence[bool], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    program = _Program.known[index]
    wanted = tuple(i for i, is_needed in enumerate(needed) if is_needed)
    floating = [cotangents[i] for i in program.floating]
    gradients: list[Tensor | None] = [None] * len(arguments)
    for place, gradient in zip(wanted, _call([*arguments, *floating], program.derivative(wanted)), strict=True):
        gradients[place] = gradient
    return gradients


class JaxFunction:
    """A JAX function that takes and gives torch tensors, as a differentiable operation of torch.

    Arguments and results may be nested tuples, lists and dicts; arguments that are no tensors are static, and must be
    hashable. The function is compiled once for each set of shapes, dtypes and static arguments. `torch.compile` sees
    one opaque operation, also with `fullgraph=True`. Derivatives of any order work; the backward pass runs the function
    again, so that only its arguments are kept.

    Args:
        function: a pure JAX function of arrays.

    Raises:
        TypeError: a tensor has 64 bits per number while JAX's x64 is off, a static argument is not hashable, or the
            function returns something else than arrays.
        RuntimeError: the process was forked: JAX's threads do not survive that.

    Example:
        >>> import jax.numpy as jnp, torch
        >>> norm = JaxFunction(lambda x: jnp.sqrt((x * x).sum()))
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> norm(x).backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """

    functions: list[Callable[..., Any]] = []  # noqa: RUF012 - see _Program.known

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__}")
        self.index = len(self.functions)
        self.functions.append(function)

    def __deepcopy__(self, memo: dict[int, Any]) -> "JaxFunction":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return JaxFunction, (self.functions[self.index],)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives for these arguments, on the device of its tensors."""
        tensors: list[Tensor] = []
        structure = _flatten((args, kwargs), tensors)
        signature = tuple([(tuple(t.shape), t.dtype) for t in tensors])
        program, results = _prepare(self.index, structure, signature)
        return _unflatten(results, iter(_call(tensors, program)))


_prepared: dict[Hashable, tuple[int, _Structure]] = {}


@torch.compiler.assume_constant_result
def _prepare(index: int, structure: Any, signature: Any) -> tuple[int, _Structure]:
    """The program for one signature of a function, and the structure of its results."""
    key = (index, structure, signature)
    try:
        if key in _prepared:
            return _prepared[key]
    except TypeError as error:
        raise TypeError(f"arguments that are no tensors are static and must be hashable: {error}") from None
    function = JaxFunction.functions[index]
    results: list[_Structure] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        args, kwargs = _unflatten(structure, iter(arrays))
        outputs: list[jax.Array] = []
        result = function(*args, **kwargs)
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result)):
            raise TypeError(f"function must return arrays, nested in tuples, lists and dicts; got {result}")
        results.append(_flatten(result, outputs))
        return outputs

    specs = [jax.ShapeDtypeStruct(shape, str(dtype).removeprefix("torch.")) for shape, dtype in signature]
    program = _Program(flat, specs).index
    _prepared[key] = program, results[0]
    return _prepared[key]


# Pytrees in plain Python, which torch.compile can follow, with a structure that is hashable.
_ARRAY = ("array",)


def _flatten(tree: Any, leaves: list[Any]) -> Any:
    if isinstance(tree, (Tensor, jax.Array)):
        leaves.append(tree)
        return _ARRAY
    if isinstance(tree, dict):
        return ("dict", tuple([(key, _flatten(value, leaves)) for key, value in tree.items()]))
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return (kind, tuple([_flatten(value, leaves) for value in tree]))
    return ("static", tree)


def _unflatten(structure: Any, leaves: Any) -> Any:
    kind = structure[0]
    if kind == "array":
        return next(leaves)
    if kind == "dict":
        return {key: _unflatten(value, leaves) for key, value in structure[1]}
    if kind == "static":
        return structure[1]
    children = [_unflatten(value, leaves) for value in structure[1]]
    return children if kind == "list" else tuple(children)


class JaxModule(nn.Module):
    """A JAX model as a torch module: its parameters are torch parameters, and any torch optimizer trains them.

    `state_dict` has the paths of the JAX model. Batch statistics and the state of random streams are buffers, which a
    call brings up to date; `train()` and `eval()` switch the JAX model's mode.

    Args:
        model: an nnx.Module. It is copied; `update(model)` brings the trained weights back.

    Raises:
        TypeError: `model` is no nnx.Module.

    Example:
        >>> import torch
        >>> from flax import nnx
        >>> model = JaxModule(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> {name: tuple(p.grad.shape) for name, p in model.named_parameters()}
        {'bias': (2,), 'kernel': (4, 2)}
    """

    def __init__(self, model: nnx.Module) -> None:
        super().__init__()
        if not isinstance(model, nnx.Module):
            raise TypeError(f"model must be an nnx.Module, got {type(model).__name__}")
        graphs = []
        for training in (False, True):
            copied = nnx.clone(model)
            copied.train() if training else copied.eval()
            graph, state = nnx.split(copied)
            graphs.append(graph)
        leaves = list(nnx.to_flat_state(state))
        self._paths = [tuple(map(str, path)) for path, _ in leaves]
        self._trained = [isinstance(leaf, nnx.Param) for _, leaf in leaves]
        for path, trained, (_, leaf) in zip(self._paths, self._trained, leaves, strict=True):
            tensor = torch.tensor(np.asarray(_raw(leaf.get_value())))
            owner = self._owner(path)
            if trained:
                owner.register_parameter(path[-1], nn.Parameter(tensor))
            else:
                owner.register_buffer(path[-1], tensor)
        self._call = JaxFunction(partial(_apply, graphs, leaves))

    def _owner(self, path: tuple[str, ...]) -> nn.Module:
        """The module that holds a leaf; modules on the way to it are made when missing."""
        owner: nn.Module = self
        for name in path[:-1]:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        return owner

    def _tensors(self) -> list[Tensor]:
        return [getattr(self._owner(path), path[-1]) for path in self._paths]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the JAX model gives for these tensors; static arguments as in `JaxFunction`."""
        tensors = self._tensors()
        # Buffers are copied, for autograd keeps the arguments and they change below.
        given = [t if trained else t.clone() for t, trained in zip(tensors, self._trained, strict=True)]
        result, state = self._call(given, self.training, args, kwargs)
        with torch.no_grad():
            for tensor, trained, new in zip(tensors, self._trained, state, strict=True):
                if not trained:
                    tensor.copy_(new)
        return result

    def update(self, model: nnx.Module) -> nnx.Module:
        """Copies parameters and other state into `model`, a JAX model of the same structure, and returns it."""
        arrays = [jnp.array(to_numpy(tensor)) for tensor in self._tensors()]
        nnx.update(model, _restored(nnx.to_flat_state(nnx.state(model)), arrays))
        return model


def _apply(
    graphs: list[nnx.GraphDef], like: Any, arrays: list[jax.Array], training: bool, args: tuple, kwargs: dict
) -> tuple[Any, list[jax.Array]]:
    model = nnx.merge(graphs[training], _restored(like, arrays))
    result = model(*args, **kwargs)
    return result, [_raw(leaf.get_value()) for _, leaf in nnx.to_flat_state(nnx.state(model))]


def _restored(like: Any, arrays: Sequence[jax.Array]) -> nnx.State:
    """A state with the given paths and kinds of leaves that holds these arrays."""
    leaves = [
        (path, leaf.replace(jax.random.wrap_key_data(array) if _is_key(leaf.get_value()) else array))
        for (path, leaf), array in zip(like, arrays, strict=True)
    ]
    return nnx.from_flat_state(leaves)


def _raw(array: jax.Array) -> jax.Array:
    """An array that torch has a dtype for: random keys as their bits."""
    return jax.random.key_data(array) if _is_key(array) else array


def _is_key(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
