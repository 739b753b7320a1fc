"""A fixed minute of every subject; `python -m tests.fuzz --minutes N --seed S` goes further."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("subject", fuzz.SUBJECTS)
def test_a_minute_of(subject: str) -> None:
    # A process of its own, since a subject may kill, fork or leave threads.
    command = [sys.executable, "-m", "tests.fuzz", subject, "--minutes", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
