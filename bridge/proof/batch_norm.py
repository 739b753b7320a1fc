"""Running variances, whose conventions differ: torch averages unbiased variances of the batches, Flax biased ones."""

from collections.abc import Iterable

import numpy as np
import torch
from flax import nnx

from bridge.proof.record import Recording, floats
from bridge.weights.leaves import submodule
from bridge.weights.match import ModulePair


class BatchNorms:
    """The batch norms of a pair of models, and how many numbers each took a mean of in a recorded run."""

    def __init__(
        self, jax_model: nnx.Module, torch_model: torch.nn.Module, pairs: Iterable[ModulePair], calls: Recording
    ) -> None:
        self.before: dict[str, np.ndarray] = {}
        self.count: dict[str, int] = {}
        self.momentum: dict[str, float] = {}
        for pair in pairs:
            ours = submodule(jax_model, pair.jax)
            if isinstance(ours, nnx.BatchNorm) and pair.torch in calls.calls:
                x = floats(calls.calls[pair.torch][0].args)[0]
                name = f"{pair.torch}.running_var".lstrip(".")
                self.before[name] = torch_model.state_dict()[name].double().cpu().numpy()
                self.count[name] = x.numel() // x.shape[1]
                self.momentum[name] = ours.momentum

    def in_torch(self, state: dict[str, np.ndarray], below: str, updates: int) -> dict[str, np.ndarray]:
        """The state, relative to the module `below`, with its variances as torch has them after some equal updates.

        An update is v <- m v + (1 - m) b for the biased variance b of n numbers, in torch b n/(n-1).
        """
        changed = dict(state)
        for name, before in self.before.items():
            local = name.removeprefix(below).lstrip(".")
            if local in state and self.count[name] > 1:
                kept = self.momentum[name] ** updates * before
                factor = self.count[name] / (self.count[name] - 1)
                changed[local] = (kept + (state[local] - kept) * factor).astype(state[local].dtype)
        return changed
