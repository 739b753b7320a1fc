"""Names that programs put around the names of a model's weights when they save them."""

from collections import Counter
from collections.abc import Collection, Iterable

# What training programs call the weights among all that they save; the first one is Lightning's.
ENTRIES = ("state_dict", "model_state_dict", "model", "params")
# Parts of names: of torch's data parallel modules, of torch.compile, and of variables in checkpoints of older Flax.
_WRAPPERS = ("module", "_orig_mod", "value")


def bare(name: str) -> str:
    """The name, or a module's path, without what wrappers add.

    Example:
        >>> bare("module._orig_mod.body.weight")
        'body.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def understood(stored: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """What the names in a file are called in a model that wants the names `wanted`, of those that have another.

    Where the model is one entry of what the file holds, the other entries are named too: as "", for they are no
    weights.

    Example:
        >>> understood(["model.module.bias", "optimizer.step"], ["bias"])
        {'model.module.bias': 'bias', 'optimizer.step': ''}
        >>> understood(["bias", "scale"], ["bias"])
        {}
    """
    stored, wanted = list(stored), set(wanted)
    renamed = _bare(stored, wanted)
    if wanted.intersection(renamed.values()) or wanted.intersection(stored):
        return {old: new for old, new in renamed.items() if old != new}
    for entry in ENTRIES:
        inside = [name.removeprefix(f"{entry}.") for name in stored if name.startswith(f"{entry}.")]
        names = _bare(inside, wanted)
        if wanted.intersection(names.values()):
            return dict.fromkeys(stored, "") | {f"{entry}.{old}": new for old, new in names.items()}
    return {}


def _bare(stored: list[str], wanted: set[str]) -> dict[str, str]:
    """Each name without wrappers, where that is a name that is wanted and that no other name is or becomes."""
    names = {name: name if name in wanted or bare(name) not in wanted else bare(name) for name in stored}
    count = Counter(names.values())
    return {old: old if count[new] > 1 else new for old, new in names.items()}
