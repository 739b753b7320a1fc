"""What docs/quality.md shows of the record: tables and figures. Nothing here is run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t

from benchmarks.markdown import ABSENT, NOT_RECORDED, markdown
from benchmarks.quality.arms import ARMS, COMPARED, DEEP
from benchmarks.quality.protocol import FULL, RESULT
from benchmarks.quality.record import losses, of, trains, tuned

FIGURE = Path("docs/images/quality.png")
LONGER = "residual, longer"
BASES = ("one stream with gates", "mHC", "mHC, mixed")
DEPTH = Path("docs/images/depth.png")
PATTERNS = Path("docs/images/maps.png")
PAIRS = (
    ("mHC, mixed", "mHC"),
    ("mHC, mixed", "mHC, alpha = 1"),
    ("mHC, mixed", "identity, mixed"),
    ("mHC, alpha = 1", "mHC"),
    ("mHC, maps at 10 times the rate", "mHC"),
    ("HC", "mHC"),
    ("HC, mixed", "mHC, mixed"),
    ("KromHC, mixed", "mHC, mixed"),
    ("mHC-lite, mixed", "mHC, mixed"),
    ("one stream with gates", "residual, wider"),
    ("mHC", "one stream with gates"),
    ("mHC, mixed", "one stream with gates"),
    ("identity, mixed", "one stream with gates"),
    ("mHC", "mHC, n = 2"),
    ("mHC, mixed", "mHC, mixed, n = 2"),
    ("mHC", "residual, wider"),
    ("mHC", "residual, longer"),
    ("HC", "residual, wider"),
    ("mHC, mixed", "residual, wider"),
    ("mHC, mixed", "residual, deeper"),
    ("mHC, mixed", "residual, longer"),
    ("history, mixed", "history, uniform"),
)
"""Of which the difference says something of its own: first over second."""


def recorded_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(header, rows) if rows else NOT_RECORDED


def interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The mean and half the width of its 95% interval, by Student's t."""
    values = np.asarray(differences, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return float(values.mean()), np.inf
    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def paired(content: Mapping[str, Any], arm: str, base: str, *parts: str) -> tuple[float, float] | None:
    """The difference of two arms, seed by seed, over the seeds that both have in the parts; None if none."""

    def by_seed(arm: str) -> dict[int, Any]:
        return {run["seed"]: run for part in parts for run in of(content, part, arm)}

    runs, others = by_seed(arm), by_seed(base)
    seeds = sorted(runs.keys() & others.keys())
    if not seeds:
        return None
    return interval(losses(runs[seed] for seed in seeds) - losses(others[seed] for seed in seeds))


def shown(found: tuple[float, float] | None) -> str:
    """A difference and its interval, in bold where it does not hold 0."""
    if found is None:
        return ABSENT
    mean, half = found
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def steps_worth(content: Mapping[str, Any], arm: str) -> float | None:
    """How many times the steps the residual network would need for what the arm gains.

    As if its loss fell evenly in the logarithm of the steps, between the residual network and the longer one; from the
    seeds that confirm, where there are any. None where one of the three is not recorded.
    """
    for part in ("confirm", "arms"):
        gain, longer = (paired(content, name, "residual", part) for name in (arm, LONGER))
        if gain and longer:
            return float(ARMS[LONGER].steps ** (gain[0] / longer[0]))
    return None


def recorded(content: Mapping[str, Any]) -> list[str]:
    return [arm for arm in ARMS if of(content, "arms", arm)]


def arms_table(records: Mapping[str, Any]) -> str:
    """Every arm over the residual network."""
    content = records.get(RESULT.name, {"runs": [], "costs": {}})
    rows = []
    base = content["costs"].get("residual")
    for arm in recorded(content):
        rate = tuned(content, arm)[0]
        cost = content["costs"].get(arm)
        costs = [ABSENT] * 3
        if cost and base:
            costs = [f"{cost['parameters'] / 1e3:.0f}", *(f"{cost[name] / base[name]:.2f}" for name in ("MFLOP", "MB"))]
        over = [""] * 3
        if arm != "residual":
            over = [shown(paired(content, arm, "residual", part)) for part in ("arms", "confirm")]
            worth = steps_worth(content, arm)
            over.append(ABSENT if worth is None else f"{worth:.2f}")
        rows.append([arm, f"{rate:g}", *costs, f"{losses(of(content, 'arms', arm)).mean():.3f}", *over])
    header = [
        "arm",
        "rate",
        "1000 parameters",
        "computation",
        "bytes",
        "bits per byte",
        "over residual",
        "confirmed",
        "worth in steps",
    ]
    return recorded_table(header, rows)


def figure_shown(records: Mapping[str, Any]) -> str:
    if RESULT.name not in records:
        return NOT_RECORDED
    return f"![Every arm over the residual network, with intervals](images/{FIGURE.name})\n"


def pairs_table(records: Mapping[str, Any]) -> str:
    content = records.get(RESULT.name, {"runs": []})
    rows = []
    for pair in PAIRS:
        found = [paired(content, *pair, *parts) for parts in (["arms"], ["confirm"], ["arms", "confirm"])]
        if found[-1]:
            rows.append([*pair, *map(shown, found if found[1] else [found[0], None, None])])
    return recorded_table(["arm", "over", "bits per byte", "confirmed", "all seeds"], rows)


def compared_table(records: Mapping[str, Any], part: str, bases: Sequence[str]) -> str:
    """The arms of a further comparison over some of them."""
    content = records.get(RESULT.name, {"runs": []})
    rows = []
    for arm in COMPARED[part]:
        if runs := of(content, part, arm):
            over = ["" if arm == base else shown(paired(content, arm, base, part)) for base in bases]
            rows.append([arm, f"{runs[0]['rate']:g}", f"{losses(runs).mean():.3f}", *over, largest_gain(runs)])
    header = ["arm", "rate", "bits per byte", *(f"over {base}" for base in bases), "largest gain"]
    return recorded_table(header, rows)


def largest_gain(runs: Sequence[Mapping[str, Any]]) -> str:
    """Of any token at any look; a residual network has no gain of its own."""
    if runs[0]["arm"].startswith("residual"):
        return ABSENT
    return f"{max(max(one or np.inf for one in run['largest gain']) for run in runs):.3g}"


def largest_rates(content: Mapping[str, Any], part: str, arm: str) -> list[float]:
    """The largest learning rate of each seed with which the network trains; 0 where none does."""
    runs = of(content, part, arm)
    return [
        max([run["rate"] for run in runs if run["seed"] == seed and trains(content, run)], default=0.0)
        for seed in sorted({run["seed"] for run in runs})
    ]


def geometric(rates: Sequence[float]) -> str:
    """The geometric mean of the rates that are not 0, and its 95% interval: of few of them that would say nothing."""
    found = [rate for rate in rates if rate]
    if not found:
        return ABSENT
    mean, half = interval(np.log(found))
    text = f"{np.exp(mean):.2g}"
    return text if len(found) < 5 else f"{text} ({np.exp(mean - half):.2g} to {np.exp(mean + half):.2g})"


def depth_table(records: Mapping[str, Any]) -> str:
    """Largest rates, and what happens at the rate that all arms were tried with."""
    content = records.get(RESULT.name, {"runs": []})
    rows = []
    for part in FULL.deep:
        for arm in DEEP:
            if not (runs := of(content, part, arm, FULL.deep_rate)):
                continue
            largest = largest_rates(content, part, arm)
            train = f"{np.count_nonzero(largest)} of {len(largest)}"
            first = np.mean([run["first gradient norm"] for run in runs])
            norms = [max((norm or np.inf) for norm in run["gradient norm"]) for run in runs]
            loss = losses(runs).mean()
            figures = [f"{loss:.3f}", f"{first:.2g}", f"{np.median(norms):.2g}", largest_gain(runs)]
            rows.append([part, arm, train, geometric(largest), *figures])
    header = ["network", "arm", "seeds that train", "largest rate", f"bits per byte at {FULL.deep_rate:g}"]
    return recorded_table([*header, "gradient norm, first", "largest, median", "largest gain"], rows)


def maps_table(records: Mapping[str, Any]) -> str:
    """How far maps moved in training, and how different the streams are that they left."""
    content = records.get(RESULT.name, {"runs": []})
    rows = []
    for arm in recorded(content):
        runs = [run for run in of(content, "arms", arm) if "moved" in run]
        if not runs:
            continue
        moved = [f"{np.mean([run['moved'][part] for run in runs]):.2g}" for part in ("H_res", "H_pre", "H_post")]
        away, rank, cosine = (
            np.mean(np.array([run[name] for run in runs], float)) for name in ("from identity", "rank", "similarity")
        )
        alike = ABSENT if np.isnan(cosine) else f"{cosine:.2f}"  # of a single stream
        rows.append([arm, *moved, f"{away:.2g}", f"{rank:.2f}", alike])
    return recorded_table(["arm", "H_res moved", "H_pre", "H_post", "H_res from identity", "rank", "cosine"], rows)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Every arm over the residual network, with intervals, in each of the comparisons."""
    panels = {
        f"8 branches, {FULL.main.sizes.steps} steps": ("arms", "confirm"),
        f"8 branches, {FULL.compared['long'].sizes.steps} steps": ("long",),
        f"100 branches, {FULL.compared['deep'].sizes.steps} steps": ("deep",),
    }
    arms = [
        arm for arm in ARMS if arm != "residual" and any(of(content, part, arm) for part in ("arms", "long", "deep"))
    ]
    size = (13, 1.4 + 0.3 * len(arms))
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", sharey=True)
    for axis, (title, parts) in zip(axes, panels.items(), strict=True):
        for place, arm in enumerate(reversed(arms)):
            color = {"residual": "tab:gray", "history": "tab:green"}.get(arm.split(",")[0], "tab:blue")
            for part in parts:
                if found := paired(content, arm, "residual", part):
                    mean, half = found
                    above = {"arms": 0.1, "confirm": -0.15}.get(part, 0)
                    face = "white" if part == "arms" else color
                    axis.errorbar(mean, place + above, xerr=half, fmt="o", color=color, markerfacecolor=face, capsize=3)
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), list(reversed(arms)))
    seeds = f"hollow: {len(FULL.main.seeds)} seeds, full: {len(FULL.confirm_seeds)}"
    figure.supxlabel(
        f"held-out bits per byte over the residual network, 95% intervals, each panel at its scale: less is better\n"
        f"blue: streams, green: history, gray: residual networks; {seeds}"
    )
    _save(figure, path)


def deep(content: Mapping[str, Any]) -> list[str]:
    """The parts with deep networks that are recorded."""
    return [part for part in FULL.deep if of(content, part, DEEP[0])]


def draw_depth(content: Mapping[str, Any], path: Path) -> None:
    """Gains, gradient norms and losses of deep networks on the way, medians and ranges, at the rate that all tried."""
    parts = deep(content)
    figure, axes = plt.subplots(len(parts), 3, figsize=(12, 3.4 * len(parts)), layout="constrained", squeeze=False)
    for part, row in zip(parts, axes, strict=True):
        for arm, color in zip(DEEP, plt.get_cmap("tab10").colors, strict=False):  # type: ignore[attr-defined]
            runs = of(content, part, arm, FULL.deep_rate)
            for axis, name in zip(row, ("largest gain", "gradient norm", "training loss"), strict=True):
                if runs:
                    values = np.array([run[name] for run in runs], float)
                    steps = FULL.deep[part].sizes.every * (1 + np.arange(values.shape[1]))
                    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
                    axis.plot(steps, np.median(values, 0), color=color, label=arm)
                axis.set(xlabel="step", ylabel=name, title=part)
        row[0].set_yscale("log")
        row[1].set_yscale("log")
    figure.legend(*axes[0][2].get_legend_handles_labels(), loc="outside lower center", ncols=len(DEEP), frameon=False)
    _save(figure, path)


def draw_patterns(content: Mapping[str, Any], path: Path) -> None:
    """Mean maps of every branch after training from seed 0."""
    found = {arm: of(content, "arms", arm)[0] for arm in recorded(content)}
    found = {
        arm: run["patterns"] for arm, run in found.items() if len(run.get("patterns", {"H_pre": [[]]})["H_pre"][0]) == 4
    }
    names = [arm for arm in ("mHC", "mHC, mixed", "mHC, maps at 10 times the rate", "HC") if arm in found]
    figure, axes = plt.subplots(len(names), 3, figsize=(11, 1.9 * len(names)), layout="constrained", squeeze=False)
    for arm, row in zip(names, axes, strict=True):
        for axis, (name, values) in zip(
            row, sorted(found[arm].items(), key=lambda one: one[0] == "H_res"), strict=True
        ):
            matrix = np.array(values)
            shape = matrix.transpose(1, 0, 2).reshape(4, -1) if name == "H_res" else matrix.T
            limit = float(abs(shape).max())
            image = axis.imshow(shape, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            figure.colorbar(image, ax=axis)
            axis.set_xticks(range(0, shape.shape[1], 4 if name == "H_res" else 1), range(len(matrix)))
            axis.set(title=f"{arm}: {name}", xlabel="branch", ylabel="new stream" if name == "H_res" else "stream")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "figure": figure_shown,
    "arms": arms_table,
    "pairs": pairs_table,
    "depth": depth_table,
    "maps": maps_table,
    "long": partial(compared_table, part="long", bases=("residual", "residual, wider", *BASES)),
    "deep": partial(compared_table, part="deep", bases=("residual", "residual, 1.5 times as wide", *BASES)),
}


def figures(records: Mapping[str, Any]) -> list[tuple[Callable[[Any, Path], None], Path, Path]]:
    """What draws each figure of which something is recorded, from which result, to which file."""
    if RESULT.name not in records:
        return []
    found = [(draw, RESULT, FIGURE), (draw_patterns, RESULT, PATTERNS)]
    return found + [(draw_depth, RESULT, DEPTH)] * bool(deep(records[RESULT.name]))
