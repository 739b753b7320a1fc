"""What README and documentation show of the measurements is what the recorded files say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from benchmarks import table
from benchmarks.quality import report as quality

ROOT = Path(__file__).parents[2]
RECORDS = table.load(table.RESULTS)
ADVICE = "run `python -m benchmarks table --write`"


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_pages_show_the_recorded_results(page):
    text = page.read_text()
    assert table.PLACE.search(text)
    assert text == table.filled(text, RECORDS), ADVICE


def test_what_the_study_says_in_words_stands_in_its_tables():
    page = (ROOT / "docs/quality.md").read_text()
    tables = " ".join(place[0] for place in table.PLACE.finditer(page))
    text = " ".join(page.partition("## Protocol")[0].split())
    for found in re.finditer(r"[-+]\d\.\d+ ± \d\.\d+|\d\.\d+ \(\d\.\d+ to \d\.\d+\)|\d\.\d+e[-+]\d+", text):
        assert found[0] in tables


@pytest.mark.parametrize(
    ("draw", "result", "figure"), quality.figures(RECORDS), ids=lambda value: getattr(value, "stem", "")
)
def test_figures_are_drawn_from_the_recorded_results(draw, result, figure, tmp_path):
    draw(RECORDS[result.name], tmp_path / figure.name)
    shown, drawn = (matplotlib.image.imread(path) for path in (ROOT / figure, tmp_path / figure.name))
    assert shown.shape == drawn.shape, ADVICE
    # Releases of matplotlib draw letters with slightly different edges; another curve is another matter.
    assert np.abs(shown - drawn).mean() < 1e-3, ADVICE


def test_a_changed_result_changes_the_page():
    path = ("bridge-cpu.json", "forward", "times the floor")
    page = "<!-- benchmarks: peers -->\n\nold\n<!-- /benchmarks -->"
    assert "old" not in table.filled(page, RECORDS)
    spread = {"median": 98.765, "p10": 97.0, "p90": 99.0}
    changed = {**RECORDS, path[0]: {**RECORDS[path[0]], path[1]: {path[2]: spread}}}
    assert "| 98.77 (97.00 to 99.00) |" in table.filled(page, changed)


def test_what_was_not_recorded_is_shown_as_absent():
    assert table.ABSENT in table.peers({})


def test_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="speed"):
        table.filled("<!-- benchmarks: speed -->\n<!-- /benchmarks -->", RECORDS)


def test_quick_runs_leave_the_recorded_results_alone():
    command = [sys.executable, "-m", "benchmarks", "bridge", "--quick", "--output", str(table.RESULTS)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--quick would overwrite the recorded results" in refused.stderr


@pytest.mark.parametrize("suite", ["history", "streams", "torch_front", "quality"])
def test_a_quick_run_of_one_suite_leaves_them_alone_too(suite):
    result = table.RESULTS / f"{suite}-cpu.json"
    before = result.read_bytes()
    command = [sys.executable, "-m", f"benchmarks.{suite}", "--quick", "--output", str(result)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "would overwrite recorded results" in refused.stderr
    assert refused.returncode == 1
    assert result.read_bytes() == before


def test_without_an_output_quick_results_go_elsewhere(tmp_path):
    before = (table.RESULTS / "history-cpu.json").read_bytes()
    command = [sys.executable, "-m", "benchmarks.history", "--quick", "--parts", "compile"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (table.RESULTS / "history-cpu.json").read_bytes() == before
    assert json.loads((tmp_path / "runs/benchmarks/history-cpu.json").read_text()).keys() == {"compile"}


def test_a_quick_suite_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "bridge", "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bridge-cpu.json", "bridge_conversion.json"}
    assert "| `JaxFunction`, forward |" in run.stdout
