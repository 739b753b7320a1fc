"""Checkpoints: what was trained is saved, read back into fresh networks, and must predict the same digits."""

from pathlib import Path

import numpy as np
from flax import nnx

import bridge
from demo import jax_side, torch_side
from demo.data import Split
from demo.record import Check
from demo.settings import SEED
from mhc_jax.training import checkpoint


def check_reloads(
    model: jax_side.Classifier, net: torch_side.Classifier, test_split: Split, folder: Path
) -> list[Check]:
    """Saves the JAX network with Orbax and the PyTorch network as safetensors, and counts changed predictions."""
    folder.mkdir(parents=True)
    checkpoint.save(folder / "orbax", model)
    reloaded = checkpoint.restore(folder / "orbax", like=jax_side.Classifier(rngs=nnx.Rngs(SEED + 1)))
    images = test_split.images
    changed_jax = np.sum(jax_side.predict(model, images) != jax_side.predict(reloaded, images))

    bridge.save(folder / "net.safetensors", net)
    fresh = bridge.load(folder / "net.safetensors", torch_side.Classifier())
    changed_torch = np.sum(torch_side.predict(net, images) != torch_side.predict(fresh, images))
    return [
        Check("predictions changed by an Orbax checkpoint (JAX)", int(changed_jax), 0),
        Check("predictions changed by a safetensors file (PyTorch)", int(changed_torch), 0),
    ]
