"""bridge.verify on models that cast inside, or parts of them: a planted fault is named, a healthy pair is EQUAL."""

import numpy as np

import bridge
from tests.bridge import casting


def trial(seed: int) -> None:
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        smallest, common = casting.HEALTHY[rng.integers(len(casting.HEALTHY))]
        part = str(rng.choice(casting.parts_with([smallest])))
        training = bool(rng.random() < 0.2)
        report = bridge.verify(**casting.part(part, seed, casting.Options(**common)), training=training)
        assert report.ok, f"{part} with {common}: {report}"
    else:
        name = list(casting.FAULTS)[rng.integers(len(casting.FAULTS))]
        common, planted, *layers = casting.FAULTS[name]
        part = str(rng.choice(casting.parts_with(layers)))
        report = bridge.verify(**casting.part(part, seed, casting.Options(**common), **planted), training=False)
        wanted = sorted(path.removeprefix(part).lstrip(".") for path in layers)
        assert report.verdict == "DIFFERENT", f"{name} in {part}: {report}"
        assert sorted(report.faults) == wanted, f"{name} in {part}: {report}"
