"""One layer of a stack as a value."""

from dataclasses import dataclass
from typing import Any

from flax import nnx


@dataclass(frozen=True)
class Merged:
    """`layer(variables, x, *more)` of the module that `graphdef` describes: equal to another of the same graph."""

    graphdef: Any

    def __call__(self, variables: nnx.State, x: Any, *more: nnx.State) -> Any:
        return nnx.merge(self.graphdef, variables, *more)(x)
