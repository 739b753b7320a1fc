"""Small helpers on lists of states."""

from collections.abc import Iterable, Sequence

from torch import Tensor


def ensure_list(x: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """A tensor alone in a list; of any other iterable the items. A list comes back as itself."""
    if isinstance(x, Tensor):
        return [x]
    return x if isinstance(x, list) else list(x)


def get_last_k(history: Sequence[Tensor], k: int) -> list[Tensor]:
    """The last `k` states, or all where there are fewer.

    Raises:
        ValueError: k is negative.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    return list(history[max(len(history) - k, 0) :])
