"""Injection: give the layers of an existing model hyper-connections."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhc_torch.history.config import MHCConfig, resolve_config
from mhc_torch.history.window import clear_history
from mhc_torch.nn.compatible import is_mhc_compatible
from mhc_torch.nn.shared_history import SharedHistory, live_window, span_forwards
from mhc_torch.nn.skip import MHCSkip


class InjectedSkip(MHCSkip):
    """The skip of an injected module, with the history that it mixes.

    Attributes:
        history_buffer: shared by all injected modules of a model under history_scope "global".
        gain: () parameter, only with preserve_function. It multiplies the history and starts at 0 (ReZero,
            arXiv 2003.04887), so that the model starts as the function it was; gradients reach the gain at the first
            step and the logits as soon as it has moved.
    """

    def __init__(self, history: SharedHistory, config: MHCConfig, preserve_function: bool) -> None:
        super().__init__(config=config)
        self.history_buffer = history
        if preserve_function:
            self.gain = nn.Parameter(torch.zeros(()))

    def coefficients(self, logits: Tensor, gate_logit: Tensor | None) -> Tensor:
        weights = super().coefficients(logits, gate_logit)
        return weights * self.gain if hasattr(self, "gain") else weights


def inject_mhc(
    module: nn.Module | None = None,
    target_types: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    target_class_name: str | int | None = None,
    max_history: int | None = None,
    clear_on_forward: bool | None = None,
    history_scope: str | None = None,
    *,
    preserve_function: bool = False,
    model: nn.Module | None = None,
    config: MHCConfig | None = None,
    **mhc_kwargs: Any,
) -> nn.Module:
    """Add mixed history to the output of every targeted module of a model: y becomes y + sum_k alpha_k x_k.

    The modules stay what and where they are; a forward hook adds the history, and a child `mhc_skip` holds the logits.
    So their attributes, state-dict keys, tied modules and further arguments work as before; load pre-trained weights
    before. Outputs may be a tensor, or a tuple or list with a tensor first, which alone is mixed. Left alone are
    modules that are @mhc_compatible, modules injected already, what is inside of any of these or of a target, and the
    inside of torch.nn.MultiheadAttention, which reads weights and calls no module.

    The states x_k are the last outputs of the same shape that targets put out before in the same forward of `module`.
    Where there is none yet, they begin with the input of the target, if it has that shape (or auto_project is on). A
    model whose blocks have residual connections keeps them: use preserve_function to start from what it computes.

    Args:
        module: the model; also accepted as `model=`.
        target_types: class or classes of the targets; subclasses count.
        target_class_name: exact name of the class of further targets, such as "BertLayer". A number in this place is
            max_history, as in the `mhc` package; what follows it there is given by name.
        max_history: window of every skip.
        clear_on_forward: begin every forward of `module` with an empty history, and leave none behind. If False, it
            goes on with that of the last forward which did not fail; call `clear_history()` on the model yourself.
        history_scope: "global", one history for all targets, or "module", one for each: a target that is called once
            in a forward then only ever sees its own input, with weight 1.
        preserve_function: start as the same function as before, see InjectedSkip.
        config: all options in one value, by default `get_default_config()`; the arguments change single ones.
        **mhc_kwargs: further fields of MHCConfig, as mode, constraint, or detach_history.

    The `mhc` package wraps a target in a module of its own, whose state dicts load as they are; `target.base_module`,
    `target.skip` and `target.history_buffer` are here too, unless the target has an attribute of that name.

    Returns:
        The same model, with a method `clear_history()`, also called `clear_mhc_history()`.

    Raises:
        TypeError: no module was given, target_types holds something else than classes, target_class_name is no string,
            max_history is given twice, or a setting is unknown or of the wrong type.
        ValueError: there is no target in the model, a target is an nn.Sequential, or a setting is outside its range.
    """
    root = module if module is not None else model
    if not isinstance(root, nn.Module) or (module is not None and model is not None):
        raise TypeError(f"module must be one torch.nn.Module, got {type(root).__name__}")
    if isinstance(target_class_name, int | float) and not isinstance(target_class_name, bool):
        # The published order is (model, target_types, max_history, clear_on_forward, history_scope).
        if max_history is not None:
            raise TypeError(
                f"max_history is {target_class_name!r} by its place in the mhc package, and {max_history!r} by ours: "
                "give what follows it by name, as clear_on_forward=True"
            )
        target_class_name, max_history = None, target_class_name
    if not isinstance(target_class_name, str | None):
        raise TypeError(f"target_class_name must be the name of a class, got {target_class_name!r}")
    types = (target_types,) if isinstance(target_types, type) else tuple(target_types or ())
    if any(not isinstance(target, type) for target in types):
        raise TypeError(f"target_types must be classes, got {target_types!r}; a name goes to target_class_name")
    if not types and target_class_name is None:
        raise ValueError("give target_types, target_class_name or both")
    config = resolve_config(
        config,
        max_history=max_history,
        clear_history_each_forward=clear_on_forward,
        history_scope=history_scope,
        **mhc_kwargs,
    )

    targets = list(_targets(root, lambda m: isinstance(m, types) or type(m).__name__ == target_class_name, set()))
    if not targets:
        wanted = [t.__name__ for t in types] + ([] if target_class_name is None else [target_class_name])
        raise ValueError(f"{type(root).__name__} holds no module of {wanted} outside of @mhc_compatible modules")
    fresh = [target for target in targets if not hasattr(target, "mhc_skip")]
    if any(isinstance(target, nn.Sequential) for target in fresh):
        raise ValueError("an nn.Sequential would call its skip as one more layer; target a class of your own instead")
    histories = [SharedHistory(config=config) for _ in fresh]
    if config.history_scope == "global":
        histories = histories[:1] * len(fresh)
    for target, history in zip(fresh, histories, strict=True):
        target.mhc_skip = skip = InjectedSkip(history, config, preserve_function).to(**placement(target))
        target.register_forward_hook(_add_history, with_kwargs=True)
        target.register_load_state_dict_pre_hook(_take_published)
        # Where the `mhc` package has them. No submodules: they would have a second name in state dicts.
        for name, value in (("base_module", target), ("skip", skip), ("history_buffer", history)):
            if not hasattr(target, name):
                object.__setattr__(target, name, value)
    if fresh:
        span_forwards(root, dict.fromkeys(histories), keep=not config.clear_history_each_forward)
    for name in ("clear_history", "clear_mhc_history"):
        if not hasattr(root, name):
            setattr(root, name, partial(clear_history, root))
    return root


def inject_mhc_default(
    module: nn.Module | None = None,
    max_history: int | None = None,
    clear_on_forward: bool | None = None,
    *,
    model: nn.Module | None = None,
    **mhc_kwargs: Any,
) -> nn.Module:
    """inject_mhc, whose arguments it takes, into every Linear, Conv2d and LayerNorm."""
    return inject_mhc(
        module,
        target_types=(nn.Linear, nn.Conv2d, nn.LayerNorm),
        max_history=max_history,
        clear_on_forward=clear_on_forward,
        model=model,
        **mhc_kwargs,
    )


def _targets(module: nn.Module, wanted: Callable[[nn.Module], bool], seen: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules to inject, each once however often it is tied."""
    if module in seen or is_mhc_compatible(module):
        return
    seen.add(module)
    if wanted(module):
        yield module
    elif not hasattr(module, "mhc_skip") and not isinstance(module, nn.MultiheadAttention):
        for child in module.children():
            yield from _targets(child, wanted, seen)


def published_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Those of `keys` that an injected model of the `mhc` package has in its state dict, and what they are called here.

    Example:
        >>> published_keys(inject_mhc(nn.Linear(2, 2), nn.Linear), ["base_module.bias", "skip.mixing_logits"])
        {'base_module.bias': 'bias', 'skip.mixing_logits': 'mhc_skip.mixing_logits'}
    """
    keys = list(keys)
    names: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "mhc_skip"):
            prefix = path and f"{path}."
            below = [key for key in keys if key.startswith(prefix)]
            names |= _published_below(prefix, below)
    return names


def _published_below(prefix: str, keys: list[str]) -> dict[str, str]:
    """published_keys of one target, all of whose keys begin with `prefix`."""
    ours = {f"{prefix}base_module.": prefix, f"{prefix}skip.": f"{prefix}mhc_skip."}
    # A target of ours may itself have a child called `skip`; then it has other keys, too.
    if f"{prefix}skip.mixing_logits" not in keys or not all(key.startswith(tuple(ours)) for key in keys):
        return {}
    return {key: new + key.removeprefix(old) for key in keys for old, new in ours.items() if key.startswith(old)}


def _take_published(target: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of an injected module, before it loads."""
    names = _published_below(prefix, [key for key in state_dict if key.startswith(prefix)])
    # All out before one comes in: their `skip` may be the name of a child of ours.
    state_dict |= {names[theirs]: value for theirs, value in [(theirs, state_dict.pop(theirs)) for theirs in names]}


def placement(target: nn.Module) -> dict[str, Any]:
    """Device and dtype of the target's parameters, float32 at least."""
    for parameter in target.parameters():
        if parameter.is_floating_point():
            return {"device": parameter.device, "dtype": torch.promote_types(parameter.dtype, torch.float32)}
    return {}


def _add_history(target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of an injected module."""
    is_sequence = isinstance(output, tuple | list) and len(output) > 0
    branch = output[0] if is_sequence else output
    if not isinstance(branch, Tensor):
        raise TypeError(
            f"{type(target).__name__} put out {type(output).__name__}; only modules whose output is a tensor, "
            "or a tuple or list with a tensor first, can be injected"
        )
    skip: Any = target.mhc_skip
    start = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    mixed = skip(branch, live_window(skip, skip.history_buffer, branch, start))
    skip.history_buffer.append(mixed)
    if not is_sequence:
        return mixed
    changed = (mixed, *output[1:])
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)
