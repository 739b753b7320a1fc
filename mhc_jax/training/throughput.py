"""Tokens a second, and the fraction of the peak of the devices that a decoder's operations come to."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mhc_jax.models import DecoderConfig

PEAKS = {
    "TPU v4": 2.75e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v5p": 4.59e14,
    "TPU v6 lite": 9.2e14,
    "TPU v6e": 9.2e14,
    "TPU7x": 1.155e15,
    "NVIDIA A100": 3.12e14,
    "NVIDIA H100": 9.89e14,
    "NVIDIA H200": 9.89e14,
    "NVIDIA B200": 2.25e15,
}
"""Operations a second in bfloat16 of one device, by the start of its `device_kind`. A TPU7x is two devices."""


def peak(device_kind: str) -> float | None:
    """Operations a second of a device of this kind in bfloat16, as its maker says; None where it is not known.

    Example:
        >>> peak("NVIDIA H100 80GB HBM3"), peak("TPU v5 lite"), peak("cpu")
        (989000000000000.0, 197000000000000.0, None)
    """
    known = [kind for kind in PEAKS if device_kind.startswith(kind)]
    return PEAKS[max(known, key=len)] if known else None


def flops_per_token(sizes: DecoderConfig, length: int) -> float:
    """Operations of a decoder for one token of a row of `length`, forward and backward, of its matrix products alone.

    6 for every weight that a token is multiplied by, and 12 L (heads · width of a head) T for attention, whose half
    that is masked counts as well. What connections and remat add does not count.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.

    Example:
        >>> sizes = DecoderConfig(100, features=8, mlp_features=16, depth=2, num_heads=2)
        >>> flops_per_token(sizes, 10) == 6 * (2 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 100) + 12 * 2 * 8 * 10
        True
    """
    queries = sizes.num_heads * sizes.head_width
    attention = sizes.features * (2 * queries + 2 * sizes.kv_heads * sizes.head_width)
    layer = attention + 3 * sizes.features * sizes.mlp_features
    weights = sizes.depth * layer + sizes.features * sizes.vocabulary
    return 6.0 * weights + 12.0 * sizes.depth * queries * length


class Throughput:
    """A stopwatch for updates.

    Args:
        tokens: of an update.
        flops: of a token.
        peak: operations a second of all devices together; None where it is not known.
    """

    def __init__(self, tokens: int, flops: float, peak: float | None) -> None:
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self._since: tuple[int, float] | None = None

    def read(self, step: int) -> dict[str, float]:
        """Since it was read last: `tokens_per_second` and, where the peak is known, `peak_fraction`; at first nothing.

        Args:
            step: updates that are done.
        """
        now, since = time.perf_counter(), self._since
        self._since = step, now
        if since is None or step == since[0]:
            return {}
        speed = (step - since[0]) * self.tokens / (now - since[1])
        figures = {"tokens_per_second": speed}
        return figures if self.peak is None else figures | {"peak_fraction": speed * self.flops / self.peak}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count."""
        begin = time.perf_counter()
        yield
        if self._since is not None:
            self._since = self._since[0], self._since[1] + time.perf_counter() - begin
