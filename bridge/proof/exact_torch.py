"""A torch program in float64, whatever its steps are fixed to: casts inside are lifted."""

from typing import Any

import numpy as np
import torch

from bridge._private import Mode, parameters_of
from bridge.proof.exact_jax import blurred, inexact
from bridge.proof.precision import epsilon
from bridge.proof.trees import arrays, is_array, transform

_WIDE = {torch.complex32: torch.complex128, torch.complex64: torch.complex128}
_aten = torch.ops.aten


def _double(dtype: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        return dtype
    return torch.float64 if dtype.is_floating_point else _WIDE.get(dtype, dtype)


class Exact(Mode):
    """While the context lasts, every operation computes in float64: `.float()`, `dtype=` and the like are lifted.

    Attributes:
        unlifted: operations whose results were coarser all the same.
        rounded: whether the program holds constants that are rounded, other than its parameters and buffers.
        blur: None, or random numbers: such constants are then off by one more rounding.
    """

    def __init__(self, blur: np.random.Generator | None = None) -> None:
        super().__init__()
        self.unlifted: set[str] = set()
        self.rounded = False
        self.blur = blur

    def __enter__(self) -> "Exact":
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.view.dtype:  # of the bits
            self.unlifted.add("view(dtype)")
            own = next(
                (d for d in (torch.float64, torch.float32, torch.float16) if d.itemsize == args[1].itemsize), None
            )
            source = args[0].to(own) if args[0].is_floating_point() and own else args[0]
            return self._up(func(source, args[1]))
        if func is _aten.lift_fresh.default:
            return self.constant(args[0])
        declared = parameters_of(func)
        new = [self._argument(*argument, value) for argument, value in zip(declared, args, strict=False)]
        written = dict(declared)
        kwargs = {name: self._argument(name, written[name], value) for name, value in kwargs.items()}
        result = func(*new, **kwargs)
        if isinstance(result, torch.Tensor) and self._is_exact(result):  # nearly always, so this is fast
            return result
        given = {id(x) for x in arrays((args, kwargs))}
        if all(self._is_exact(x) or id(x) in given for x in arrays(result)):
            return result
        self.unlifted.add(func.name())
        return transform(lambda x: self._up(x) if is_array(x) and id(x) not in given else x, result)

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is written into the program, or held by a module without being a leaf of it."""
        if self._is_exact(tensor):
            return tensor
        wide = tensor.detach().to(_double(tensor.dtype))
        if tensor.is_floating_point():
            off = inexact(tensor.detach().float().cpu().numpy())
            self.rounded |= bool(off.any())
            if self.blur is not None:
                values = blurred(wide.cpu().numpy(), off * epsilon(tensor.dtype) / 2, self.blur)
                wide = torch.as_tensor(values, device=wide.device)
        return wide

    def _argument(self, name: str, written: bool, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return _double(value)
        if name == "half_to_float":  # of a softmax
            return False
        if written:
            return value
        if isinstance(value, (list, tuple)):
            return transform(lambda x: self._up(x) if isinstance(x, torch.Tensor) else x, value)
        return self._up(value) if isinstance(value, torch.Tensor) else value

    @staticmethod
    def _is_exact(tensor: torch.Tensor) -> bool:
        return _double(tensor.dtype) == tensor.dtype

    def _up(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._is_exact(tensor) else tensor.to(_double(tensor.dtype))
