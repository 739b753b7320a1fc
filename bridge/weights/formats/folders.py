"""Folders that hold a checkpoint: of Orbax's CheckpointManager, and of transformers."""

from pathlib import Path

_ORBAX = ("_METADATA", "checkpoint", "manifest.ocdbt")  # one of them is in every checkpoint that Orbax wrote
_TRANSFORMERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint in a folder: itself; the last step of a CheckpointManager; the weights of a transformers model.

    Raises:
        ValueError: there are several items in a step, and none is called "default".
    """
    if any((folder / name).exists() for name in _ORBAX):
        return folder
    for name in _TRANSFORMERS:
        if (folder / name).is_file():
            return folder / name
    inside = [path for path in folder.iterdir() if path.is_dir()]
    if steps := [path for path in inside if path.name.isdecimal()]:
        return checkpoint_in(max(steps, key=lambda path: int(path.name)))
    items = [path for path in inside if any((path / name).exists() for name in _ORBAX)]
    if default := [path for path in items if path.name == "default"]:
        return default[0]
    if len(items) > 1:
        names = ", ".join(sorted(path.name for path in items))
        raise ValueError(f"path: {folder} holds several checkpoints ({names}); give the path of one")
    return items[0] if items else folder
