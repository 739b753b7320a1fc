"""The sizes of the study and the text that it trains on; docs/quality.md says why they are these."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from benchmarks.record import RESULTS

RESULT = RESULTS / "quality-cpu.json"


@dataclass(frozen=True)
class Sizes:
    """One training of one network.

    Attributes:
        layers: of the decoder, each of which has two branches.
        warmup: steps in which the learning rate rises to what it is called by; from there it falls to 0 at the end.
        every: steps between two looks at the run.
        held_out: windows of the text that no training sees.
    """

    width: int = 48
    layers: int = 4
    heads: int = 4
    batch: int = 4
    length: int = 64
    steps: int = 300
    warmup: int = 20
    every: int = 30
    held_out: int = 256


@dataclass(frozen=True)
class Deep:
    """Runs that look for the largest learning rate with which a deep network trains."""

    sizes: Sizes
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """The whole study.

    Attributes:
        rates: of which every arm gets its best by the tuning seeds; at an edge the next by a factor of 2 is tried, too.
        confirm_seeds: from which the main comparison is done again.
        deep: by the name of the part.
        deep_rate: the first rate that is tried there; factors of 2 from there.
        long: of the runs that ask whether a difference lasts; the rate is tuned for these again.
        arms: those that run; none for all.
    """

    sizes: Sizes
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    confirm_seeds: tuple[int, ...]
    deep: dict[str, Deep]
    deep_rate: float
    long: Sizes
    long_seeds: tuple[int, ...]
    arms: tuple[str, ...] = ()

    def chosen(self, arms: Iterable[str]) -> list[str]:
        return [arm for arm in arms if not self.arms or arm in self.arms]


def _deep(branches: int, steps: int, seeds: int) -> Deep:
    sizes = Sizes(16, branches // 2, heads=2, batch=4, length=32, steps=steps, warmup=10, every=steps // 10)
    return Deep(sizes, tuple(range(seeds)))


FULL = Protocol(
    sizes=Sizes(),
    rates=(5e-3, 1e-2, 2e-2),
    tuning_seeds=(100, 101),
    seeds=(0, 1, 2, 3, 4),
    confirm_seeds=tuple(range(10, 20)),
    deep={
        "100 branches": _deep(100, steps=100, seeds=3),
        "200 branches": _deep(200, steps=100, seeds=3),
        "100 branches, 400 steps": _deep(100, steps=400, seeds=10),
        "200 branches, 400 steps": _deep(200, steps=400, seeds=5),
    },
    deep_rate=1.6e-2,
    long=Sizes(steps=1200),
    long_seeds=tuple(range(10)),
)

_TINY = Sizes(16, 1, heads=2, batch=2, length=16, steps=4, warmup=2, every=2, held_out=4)
QUICK = Protocol(
    sizes=_TINY,
    rates=(1e-2,),
    tuning_seeds=(100,),
    seeds=(0, 1),
    confirm_seeds=(10,),
    deep={part: Deep(_TINY, (0,)) for part in FULL.deep},
    deep_rate=1.6e-2,
    long=_TINY,
    long_seeds=(0,),
    arms=("residual", "mHC, maps at 10 times the rate", "history, uniform"),
)

# Sections contain each other's paragraphs: each is kept where it comes first, so that none is trained on and held out.
_PARAGRAPHS = dict.fromkeys(part for name in sorted(topics) for part in topics[name].split("\n\n"))
TEXT = np.frombuffer("\n\n".join(_PARAGRAPHS).encode(), np.uint8)
TRAINED, HELD_OUT = np.split(TEXT, [len(TEXT) * 9 // 10])
TEXT_HASH = hashlib.sha256(TEXT.tobytes()).hexdigest()


def windows(text: Int[np.ndarray, " bytes"], seed: int, length: int, *shape: int) -> jax.Array:
    """Windows of the text and the byte after each, (*shape, length + 1), drawn by the seed."""
    begins = np.random.default_rng(seed).integers(0, len(text) - length, (*shape, 1))
    return jnp.asarray(text[begins + np.arange(length + 1)], jnp.int32)


def bits_of_frequencies() -> float:
    """Bits per byte of the held-out text by the frequencies of bytes alone: what a network without context can do."""
    frequencies = (np.bincount(TRAINED, minlength=256) + 1) / (len(TRAINED) + 256)
    return float(-np.log2(frequencies[HELD_OUT]).mean())
