"""The declared rules of layers around layers: norms of weights, and low-rank updates."""

from flax import nnx
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bridge.weights.rules import SAME, Child, Entry, Leaf, Refused, Setting, find, register

# ---- weight norm -----------------------------------------------------------------------------------------------------


def _norm_names(module: nn.Module) -> tuple[str, str] | None:
    """Where torch keeps the lengths and the directions: since 2.0 or before."""
    leaves = module.state_dict().keys()
    for names in (("parametrizations.weight.original0", "parametrizations.weight.original1"), ("weight_g", "weight_v")):
        if leaves >= set(names):
            return names
    return None


def _norm_axis(module: nn.Module) -> int | None:
    """The axis of the torch weight whose slices are normalized; None if all of it is at once."""
    if is_parametrized(module, "weight"):
        dim = next(iter(module.parametrizations.weight)).dim  # type: ignore[union-attr, arg-type]
    else:
        hooks = (hook for hook in module._forward_pre_hooks.values() if getattr(hook, "name", "") == "weight")
        dim = next(hook.dim for hook in hooks)  # type: ignore[attr-defined]
    return None if dim in (None, -1) else int(dim)


def _weight_norm(jax: nnx.WeightNorm, module: nn.Module) -> tuple[Entry, ...]:
    names = _norm_names(module)
    if names is None:
        return (Refused("torch has no weight_norm on `weight` there"),)
    lengths, directions = names
    layer = jax.layer_instance
    rule = find(type(layer), type(module))
    inner = rule.of("entries", layer, module) if rule else ()
    kernel = next((leaf for leaf in inner if isinstance(leaf, Leaf) and leaf.torch == "weight"), None)
    if kernel is None:
        return (Refused(f"no rule tells the kernel of a {type(layer).__name__} from a torch {type(module).__name__}"),)
    axis = _norm_axis(module)
    ndim = getattr(layer, kernel.jax).ndim
    left, right = (_axes(side, ndim) for side in kernel.layout.split("->"))
    features = jax.feature_axes if isinstance(jax.feature_axes, tuple) else (jax.feature_axes,)
    ours = [left[i] for i in features]
    theirs = [] if axis is None else [right[axis]]
    if ours != theirs:
        what = f"flax normalizes for each index of {ours or 'nothing'}, torch of {theirs or 'nothing'}"
        return (Refused(f"{what}, axes of the layout {kernel.layout!r}"),)
    layout = SAME if axis is None else f"x -> {' '.join('x' if i == axis else '()' for i in range(ndim))}"
    entries = [Leaf(f"layer_instance.{kernel.jax}", directions, kernel.layout)]
    if jax.scales is not None:
        entries += [Leaf(f"scales.{path}", lengths, layout) for path in jax.scales if path == (kernel.jax,)]
    rest = [leaf for leaf in inner if isinstance(leaf, Leaf) and leaf is not kernel]
    entries += [Leaf(f"layer_instance.{leaf.jax}", leaf.torch, leaf.layout, leaf.part) for leaf in rest]
    if "bias" not in {leaf.jax for leaf in rest} and getattr(layer, "bias", None) is not None:
        entries.append(Leaf("layer_instance.bias", "bias"))
    return tuple(entries)


def _axes(side: str, ndim: int) -> list[str]:
    """The names of the axes on one side of a layout, without the signs of mirrored ones."""
    names = [name.lstrip("~") for name in side.split()]
    if "..." not in names:
        return names
    at = names.index("...")
    return [*names[:at], *(f"axis{i}" for i in range(ndim - len(names) + 1)), *names[at + 1 :]]


register(
    nnx.WeightNorm,
    nn.Module,
    by=_weight_norm,
    settings=(Setting("epsilon", lambda m: m.epsilon, lambda _: 0.0),),
)

# ---- spectral norm ---------------------------------------------------------------------------------------------------

_SPECTRAL = (
    "flax's SpectralNorm goes on with the power iteration at every call and overwrites its kernel, torch's keeps both "
    "vectors; for inference bake it in, torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') (or "
    "torch.nn.utils.remove_spectral_norm), and convert into the plain layer"
)
register(nnx.SpectralNorm, nn.Module, by=lambda *_: (Refused(_SPECTRAL),))

# ---- low-rank updates ------------------------------------------------------------------------------------------------

_DENSE = "in out -> out in"


def _adapter(module: nn.Module) -> str:
    """The name of peft's one active adapter, or "" where there are no adapters."""
    matrices = getattr(module, "lora_A", None)
    if not isinstance(matrices, nn.ModuleDict):
        return ""
    active = getattr(module, "active_adapters", list(matrices))
    return active[0] if len(active) == 1 else ""


def _matrices(jax: str, module: nn.Module) -> tuple[Entry, ...]:
    """The two matrices: flax's, whose product acts on rows, below the JAX path `jax`."""
    found: list[Entry] = []
    for letter in ("a", "b"):
        ours = f"{jax}lora_{letter}"
        theirs = next((name for name in (f"lora_{letter.upper()}", f"lora_{letter}") if hasattr(module, name)), None)
        if theirs is None:
            return (Refused(f"torch has no lora_A or lora_a there, and so no lora_{letter}", jax.rstrip(".")),)
        inner = getattr(module, theirs)
        if isinstance(inner, nn.ModuleDict):
            adapter = _adapter(module)
            if not adapter:
                active = getattr(module, "active_adapters", [])
                return (Refused(f"torch has {len(active)} active adapters {list(active)}, and flax one"),)
            found.append(Leaf(ours, f"{theirs}.{adapter}.weight", _DENSE))
        elif isinstance(inner, nn.Module):
            found.append(Leaf(ours, f"{theirs}.weight", _DENSE))
        else:  # capitals are loralib's (rank, in), as in the paper; small letters are as flax has them
            found.append(Leaf(ours, theirs, _DENSE if theirs.endswith(letter.upper()) else SAME))
    return tuple(found)


def _base(module: nn.Module) -> str:
    """The prefix of the layer that is updated: a submodule, or the module itself."""
    names = ("base_layer", "base_module", "base", "linear")
    return next((f"{name}." for name in names if isinstance(getattr(module, name, None), nn.Module)), "")


def _lora_linear(_: nnx.LoRALinear, module: nn.Module) -> tuple[Entry, ...]:
    base = _base(module)
    own = (Leaf("kernel", f"{base}weight", _DENSE), Leaf("bias", f"{base}bias"))
    return (*own, *_matrices("lora.", module))


def _lora(jax: nnx.LoRA, module: nn.Module) -> tuple[Entry, ...]:
    matrices = _matrices("", module)
    if jax.base_module is None:
        return matrices
    if not (base := _base(module).rstrip(".")):
        if not isinstance(jax.base_module, nnx.Linear):
            return (Refused("torch has no base_layer there"),)
        own = (Leaf("base_module.kernel", "weight", _DENSE), Leaf("base_module.bias", "bias"))
        return (*own, *matrices)
    return (Child("base_module", base), *matrices)


def _scaling(module: nn.Module) -> float:
    """What torch multiplies the update by: peft's by adapter, loralib's one number."""
    scaling = getattr(module, "scaling", 1.0)
    return float(scaling.get(_adapter(module), 1.0) if isinstance(scaling, dict) else scaling)


def _dropout(module: nn.Module) -> float:
    found = getattr(module, "lora_dropout", None)
    if isinstance(found, nn.ModuleDict):
        found = dict(found).get(_adapter(module))
    return float(getattr(found, "p", 0.0))


def _merged(module: nn.Module) -> bool:
    return bool(getattr(module, "merged", False))


_UPDATE = (
    Setting("scaling", lambda _: 1.0, _scaling),
    Setting("dropout", lambda _: 0.0, _dropout),
    Setting("merged", lambda _: False, _merged),
)
for _kind in (nn.Module, nn.Linear):  # the latter, or the rule of two linear layers would apply with equal right
    register(nnx.LoRALinear, _kind, by=_lora_linear, settings=_UPDATE)
register(nnx.LoRA, nn.Module, by=_lora, settings=_UPDATE)
