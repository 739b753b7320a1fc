"""What a verification found: rows of figures, a verdict, and the same as a table, as JSON and as a page."""

import html
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bridge.proof.metrics import Figures
from bridge.weights.formats.replacing import replacing


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        check: what was compared: "weights", "value", "layer value", "gradient", and so on.
        path: the torch name of the module, parameter or input that it belongs to; "" is the whole model.
        jax_path: its JAX name.
        shape, dtype: of the torch value.
        figures: the JAX value (`a`) against the torch value (`b`), as the models computed them.
        ok: whether the two agree as far as rounding allows.
        proved: whether that says something: False where the value answers to rounding with a jump.
        why: where the tolerances come from, after what is wrong.
        jax_error, torch_error: largest distance of each side from its own float64 run.
        float64_gap: largest distance of the two float64 runs from each other: of the functions, without the rounding.
        tolerance: bound on `jax_error` and `torch_error`.
        float64_tolerance: bound on `float64_gap`.
    """

    check: str
    path: str
    jax_path: str
    shape: tuple[int, ...]
    dtype: str
    figures: Figures
    ok: bool
    why: str
    proved: bool = True
    jax_error: float = 0.0
    torch_error: float = 0.0
    float64_gap: float = 0.0
    tolerance: float = 0.0
    float64_tolerance: float = 0.0

    def strain(self) -> float:
        """How much of a tolerance the row uses up: it holds up to 1."""
        shares = [(max(self.jax_error, self.torch_error), self.tolerance), (self.float64_gap, self.float64_tolerance)]
        return max(error / allowed if allowed else float(error > 0) for error, allowed in shares)


@dataclass(frozen=True)
class Report:
    """The result of `bridge.verify`. Prints as a table; is truthy when all is equal.

    Attributes:
        header: versions, devices, precision settings, threads, seed.
        rows: every comparison, in the order of execution.
        faults: torch path of each module where a difference is born -> what is wrong there.
        notes: what could not be compared.
        unproved: why equal figures are no proof: there was no float64 reference, a setting differs, and the like.
        logits: Kullback-Leibler divergence in nats and top-k agreement of the model's output, taken as logits.

    Example:
        >>> report = Report({"seed": 0}, [], unproved=["setting differs: rate"])
        >>> report.verdict, report.ok, report.exit_status
        ('NOT PROVED', False, 3)
    """

    header: dict[str, Any]
    rows: list[Row]
    faults: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)
    logits: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "DIFFERENT" if a fault was found, "NOT PROVED" if none was but `unproved` has reasons, else "EQUAL"."""
        if self.faults or not all(row.ok for row in self.rows):
            return "DIFFERENT"
        return "NOT PROVED" if self.unproved else "EQUAL"

    @property
    def ok(self) -> bool:
        """Whether the verdict is "EQUAL"."""
        return self.verdict == "EQUAL"

    @property
    def exit_status(self) -> int:
        """0 if equal, 1 if different, 3 if not proved: `sys.exit(report.exit_status)` in continuous integration."""
        return {"EQUAL": 0, "DIFFERENT": 1, "NOT PROVED": 3}[self.verdict]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        *found, verdict = self._verdict()
        return "\n".join([*self._head(), "", *found, "", self.table(), "", verdict])

    def table(self, full: bool = False) -> str:
        """Every row with all its figures; by default those that fail, and of other checks the closest to it.

        Of the rows that fail, or prove nothing, the first twenty are shown.
        """
        checks = {row.check: sum(other.check == row.check for other in self.rows) for row in self.rows}
        shown, more = self.rows, 0
        if not full:
            wrong = sorted((row for row in self.rows if not (row.ok and row.proved)), key=lambda row: row.ok)
            fine = [[row for row in self.rows if row.check == check and row.ok and row.proved] for check in checks]
            told = {row.check for row in wrong}
            shown = wrong[:_FAILING] + [
                max(rows, key=Row.strain) for rows in fine if rows and rows[0].check not in told
            ]
            more = len(wrong[_FAILING:])
        lines = [("of", *_COLUMNS), *((str(checks[row.check]), *_cells(row, full)) for row in shown)]
        if not full:
            kept = [i for i, name in enumerate(lines[0]) if name in _SHORT]
            lines = [tuple(line[i] for i in kept) for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        rule = "  ".join("-" * width for width in widths[:-1])  # the last column is text
        rest = [f"and {more} more that fail or prove nothing: table(full=True) has them"] if more else []
        return "\n".join([texts[0], rule, *texts[1:], *rest])

    def _head(self) -> list[str]:
        return [f"{name}: {value}" for name, value in self.header.items()]

    def _verdict(self) -> list[str]:
        failed = sum(not row.ok for row in self.rows)
        lines = [f"note: {note}" for note in self.notes]
        lines += [f"{name}: {value:.3g}" for name, value in self.logits.items()]
        lines += [f"FAULT in {path or 'the whole model'}: {text}" for path, text in self.faults.items()]
        lines += [f"NOT PROVED: {text}" for text in self.unproved]
        return [*lines, self.verdict + (f": {failed} of {len(self.rows)} comparisons fail" if failed else "")]

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as strict JSON (infinity and NaN as strings), written to `path` if given."""
        content = {"ok": self.ok, "verdict": self.verdict, **asdict(self)}
        text = json.dumps(_strict(content), indent=1, allow_nan=False)
        return _written(text, path)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained page, written to `path` if given."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        body = "".join(
            f'<tr class="{"ok" if row.ok else "bad"}" title="{html.escape(row.why)}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
            + "</tr>\n"
            for row in self.rows
        )
        lines = "".join(f"<p>{html.escape(line)}</p>\n" for line in self._verdict())
        facts = "".join(f"<li>{html.escape(line)}</li>\n" for line in self._head())
        title = f"bridge.verify: {self.verdict.lower()}"
        page = _PAGE.format(title=title, lines=lines, facts=facts, head=head, body=body)
        return _written(page, path)


_COLUMNS = (
    *("check", "path", "shape", "dtype", "max abs", "at", "jax", "torch", "max rel", "p99", "ulp", "ulp p99"),
    *("cosine", "SNR dB", "NaN", "inf", "jax-f64", "torch-f64", "allowed", "f64-f64", "allowed f64", "verdict", "why"),
)
_SHORT = (
    "of",
    "check",
    "path",
    "max abs",
    "jax-f64",
    "torch-f64",
    "allowed",
    "f64-f64",
    "allowed f64",
    "verdict",
    "why",
)
_FAILING = 20  # rows of them in a table that is not full

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em }}
table {{ border-collapse: collapse; font: 12px ui-monospace, monospace }}
th, td {{ padding: .2em .6em; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd }}
th {{ position: sticky; top: 0; background: #fff }}
tr.bad {{ background: #fdd }}
</style>
<h1>{title}</h1>
{lines}<ul>
{facts}</ul>
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody></table>
</html>
"""


def _cells(row: Row, full: bool = True) -> tuple[str, ...]:
    f = row.figures
    wrong = row.why.partition("; tolerance")[0] if not (row.ok and row.proved) else ""
    cells: tuple[Any, ...] = (
        *(row.check, row.path or ".", "x".join(map(str, row.shape)) or "()", row.dtype),
        *(f.max_abs, str(list(f.index)), f.a, f.b, f.max_rel, f.p99, f.ulp_max, f.ulp_p99, f"{f.cosine:.7f}"),
        *(f.snr_db, f"{f.nan[0]}/{f.nan[1]}", f"{f.inf[0]}/{f.inf[1]}", row.jax_error, row.torch_error),
        *(row.tolerance, row.float64_gap, row.float64_tolerance, _word(row), row.why if full else wrong),
    )
    return tuple(f"{cell:.3g}" if isinstance(cell, int | float) else cell for cell in cells)


def _word(row: Row) -> str:
    return "DIFFERENT" if not row.ok else "ok" if row.proved else "not proved"


def _strict(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _strict(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_strict(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        with replacing(Path(path)) as new:
            new.write_text(text, encoding="utf-8")
    return text
