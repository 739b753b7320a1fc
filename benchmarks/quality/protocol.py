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
class Comparison:
    """Arms at rates of their own, tuned as those of the main comparison; of `arms.COMPARED`."""

    sizes: Sizes
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """The whole study.

    Attributes:
        main: every arm; of the rates it gets its best by the tuning seeds, and at an edge the next by a factor of 2 is
            tried, too.
        confirm_seeds: from which the main comparison is done again.
        deep: by the name of the part.
        deep_rate: the first rate that is tried there; factors of 2 from there.
        compared: further comparisons, by the name of the part.
        arms: those that run; none for all.
    """

    main: Comparison
    tuning_seeds: tuple[int, ...]
    confirm_seeds: tuple[int, ...]
    deep: dict[str, Deep]
    deep_rate: float
    compared: dict[str, Comparison]
    arms: tuple[str, ...] = ()

    def chosen(self, arms: Iterable[str]) -> list[str]:
        return [arm for arm in arms if not self.arms or arm in self.arms]


def _deep(branches: int, steps: int) -> Sizes:
    return Sizes(16, branches // 2, heads=2, batch=4, length=32, steps=steps, warmup=10, every=steps // 10)


_RATES = (5e-3, 1e-2, 2e-2)

FULL = Protocol(
    main=Comparison(Sizes(), _RATES, seeds=(0, 1, 2, 3, 4)),
    tuning_seeds=(100, 101),
    confirm_seeds=tuple(range(10, 20)),
    deep={
        "100 branches": Deep(_deep(100, steps=100), seeds=tuple(range(3))),
        "200 branches": Deep(_deep(200, steps=100), seeds=tuple(range(3))),
        "100 branches, 400 steps": Deep(_deep(100, steps=400), seeds=tuple(range(10))),
        "200 branches, 400 steps": Deep(_deep(200, steps=400), seeds=tuple(range(5))),
    },
    deep_rate=1.6e-2,
    compared={
        "long": Comparison(Sizes(steps=1200), _RATES, seeds=tuple(range(10))),
        "deep": Comparison(_deep(100, steps=400), (4e-3, 8e-3, 1.6e-2), seeds=tuple(range(10))),
    },
)

_TINY = Sizes(16, 1, heads=2, batch=2, length=16, steps=4, warmup=2, every=2, held_out=4)
QUICK = Protocol(
    main=Comparison(_TINY, (1e-2,), seeds=(0, 1)),
    tuning_seeds=(100,),
    confirm_seeds=(10,),
    deep={part: Deep(_TINY, (0,)) for part in FULL.deep},
    deep_rate=1.6e-2,
    compared={part: Comparison(_TINY, (1e-2,), seeds=(0,)) for part in FULL.compared},
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
