"""Keys and values of the tokens so far, so that the next one costs one token."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of the tokens so far, (B, K, S, D) for every layer; a call of `Decoder` appends to it."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of positions S that it holds."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, these last."""
        if layer in self.layers:
            old = self.layers[layer]
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        self.layers[layer] = k, v
        return k, v
