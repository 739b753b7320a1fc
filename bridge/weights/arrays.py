"""Arrays at the level of bits: the dtypes that JAX, PyTorch and NumPy share, and lossless copies."""

import warnings
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

# name: (numpy dtype, torch dtype).  The name is the one that numpy, ml_dtypes and jax all use.
_DTYPES: dict[str, tuple[Any, torch.dtype]] = {
    "float64": (np.float64, torch.float64),
    "float32": (np.float32, torch.float32),
    "float16": (np.float16, torch.float16),
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
    "float8_e5m2": (ml_dtypes.float8_e5m2, torch.float8_e5m2),
    "float8_e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, torch.float8_e4m3fnuz),
    "float8_e5m2fnuz": (ml_dtypes.float8_e5m2fnuz, torch.float8_e5m2fnuz),
    "float8_e8m0fnu": (ml_dtypes.float8_e8m0fnu, torch.float8_e8m0fnu),
    "complex64": (np.complex64, torch.complex64),
    "complex128": (np.complex128, torch.complex128),
    "int64": (np.int64, torch.int64),
    "int32": (np.int32, torch.int32),
    "int16": (np.int16, torch.int16),
    "int8": (np.int8, torch.int8),
    "uint64": (np.uint64, torch.uint64),
    "uint32": (np.uint32, torch.uint32),
    "uint16": (np.uint16, torch.uint16),
    "uint8": (np.uint8, torch.uint8),
    "bool": (np.bool_, torch.bool),
}
_TORCH = {name: dtype for name, (_, dtype) in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
# torch and numpy know each other's float16 but not bfloat16 or float8: those travel as integers of the same width.
_CARRIER = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16)}


def dtype_name(dtype: Any) -> str:
    """The shared name of a numpy, jax or torch dtype, such as "bfloat16"; TypeError if it is not shared."""
    name = _NAMES.get(dtype) if isinstance(dtype, torch.dtype) else np.dtype(dtype).name
    if name not in _DTYPES:
        raise TypeError(f"dtype {dtype} has no counterpart; the bridge carries {', '.join(_DTYPES)}")
    return name


def is_floating(name: str) -> bool:
    """Whether it is the name of a real floating-point dtype."""
    return name.startswith(("float", "bfloat"))


def is_shared(dtype: torch.dtype) -> bool:
    """Whether `dtype_name` knows it."""
    return dtype in _NAMES


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype called `name` (those of ml_dtypes included)."""
    return np.dtype(_DTYPES[name][0])


def to_numpy(array: Any) -> np.ndarray:
    """The bits of a torch tensor, jax array or numpy array: a read-only view, or a copy from another device."""
    if isinstance(array, torch.Tensor):
        name = dtype_name(array.dtype)
        tensor = array.detach().cpu().resolve_conj().resolve_neg()
        if _is_carried(name):
            return tensor.view(_CARRIER[tensor.itemsize][1]).numpy().view(numpy_dtype(name))
        return tensor.numpy()
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(f"an array of shape {array.shape} is spread over several processes: gather it first")
    result = np.asarray(array)
    dtype_name(result.dtype)
    return result


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A CPU tensor with the bits of `array`; it shares the memory of an array that may be written to."""
    return borrow(array if array.flags.writeable else array.copy())


def borrow(array: np.ndarray) -> torch.Tensor:
    """As `to_torch`, but on the memory of an array that may not be written to, too: only for reading."""
    name = dtype_name(array.dtype)
    if any(stride < 0 for stride in array.strides):  # torch has no such views
        array = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if _is_carried(name):
            return torch.from_numpy(array.view(_CARRIER[array.itemsize][0])).view(_TORCH[name])
        return torch.from_numpy(array)


def assign(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, by `copy_into`."""
    copy_into(borrow(target), source)


def copy_into(target: torch.Tensor, source: np.ndarray) -> None:
    """Copies values into a tensor of the same shape, on any device: bits, or rounded to another floating-point dtype.

    torch transposes matrices by blocks, and everything else element by element, which misses the cache: so a kernel
    whose first and last axes change places goes through a matrix, and is rearranged within its rows only.
    """
    floats = target.is_floating_point() and is_floating(dtype_name(source.dtype))
    same = dtype_name(target.dtype) == dtype_name(source.dtype)
    if tuple(target.shape) != source.shape or not (same or floats):
        raise ValueError(f"cannot copy {source.dtype}{source.shape} into {target.dtype}{tuple(target.shape)}")
    new, old = target.squeeze(), borrow(source).squeeze()
    if old.numel() == 0:
        return
    if old.ndim > 1 and old.stride(0) == 1:  # the first axis is the innermost of the source
        order = sorted(range(1, old.ndim), key=old.stride, reverse=True)
        rows = old.permute(*order, 0).contiguous()  # as it lies in memory
        turned = rows.view(-1, len(old)).T
        if old.ndim > 2:
            inverse = [1 + order.index(axis) for axis in range(1, old.ndim)]
            turned = turned.contiguous().view(len(old), *rows.shape[:-1]).permute(0, *inverse)
        new.copy_(turned)
    elif old.ndim > 2 and old.stride(-1) == max(old.stride()) and new.is_contiguous():  # the last is the outermost
        rows = old.movedim(-1, 0).contiguous()
        new.view(-1, len(rows)).copy_(rows.view(len(rows), -1).T)
    else:
        new.copy_(old)


def to_jax(array: np.ndarray, sharding: Any = None) -> jax.Array:
    """A jax array with the bits of `array`, whether x64 is enabled or not (64 bit values are never truncated).

    The array may be adopted instead of copied: do not write to it afterwards.
    """
    dtype_name(array.dtype)
    with jax.enable_x64(True):
        return jax.device_put(array, sharding)


def _is_carried(name: str) -> bool:
    return name.startswith(("bfloat", "float8"))
