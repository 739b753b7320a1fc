"""The report: one self-contained page, written atomically."""

import html
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template

from demo import charts
from demo.record import Check, Run


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        first, *rest = cells
        return (
            f"<tr><{tag}>{first}</{tag}>" + "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in rest) + "</tr>"
        )

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _checks(checks: Sequence[Check]) -> str:
    verdict = {True: '<span class="pass">agrees</span>', False: '<span class="fail">differs</span>'}
    rows = ([html.escape(c.what), f"{c.measured:.2g}", f"{c.allowed:.0g}", verdict[c.passed]] for c in checks)
    return _table(["compared", "measured", "allowed", "verdict"], rows)


def versions() -> str:
    """The versions a reader needs to repeat the run."""
    packages = ["jax", "flax", "optax", "torch", "lightning", "numpy", "scikit-learn"]
    return f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages)


def write_report(path: Path, runs: Sequence[Run], agreement: Sequence[Check], reloads: Sequence[Check]) -> None:
    """Writes the page for `runs`: the mHC networks (those with weights) and the networks they are compared with."""
    mixed = [run for run in runs if run.weights is not None]
    depth, window = mixed[0].weights.shape  # type: ignore[union-attr]
    tiles = [(f"{100 * run.accuracies[-1]:.1f} %", f"held-out accuracy, {run.name}") for run in runs]
    accuracy_rows = (
        [run.name, f"{run.losses[-20:].mean():.4f}", f"{100 * run.accuracies[-1]:.1f} %", f"{run.seconds:.0f} s"]
        for run in runs
    )
    fields = {
        "lead": f"A {depth}-layer network learns to read handwritten digits with manifold-constrained "
        "hyper-connections, once in JAX and once in PyTorch, from the same weights and the same batches.",
        "tiles": "".join(
            f'<div class="tile"><b>{figure}</b><span>{html.escape(label)}</span></div>' for figure, label in tiles
        ),
        "depth": depth,
        "window": window,
        "learning": charts.learning(runs),
        "accuracy_table": _table(
            ["network", "training loss, last 20 steps", "held-out accuracy", "time with compiling and logging"],
            accuracy_rows,
        ),
        "gradients": charts.gradients(runs),
        "heatmaps": charts.heatmaps(mixed),
        "entropies": charts.entropies(mixed, window),
        "verification": _checks(agreement),
        "checkpoints": _checks(reloads),
        "versions": html.escape(versions()),
    }
    page = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).substitute(fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
