"""The main job on a smaller network: it must learn, agree, reload, write its page, and say so when it does not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import demo.__main__
from demo import jax_side, settings, torch_side
from demo.record import Check


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    for module in (settings, jax_side, torch_side, demo.__main__):
        for name, value in {"DEPTH": 6, "EPOCHS": 6}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return tmp_path


def test_demo_learns_agrees_and_writes_its_page(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.__main__.main() == 0
    summary = capsys.readouterr().out
    assert "PASS" in summary
    page = (small / "runs/demo/report.html").read_text()
    assert page.count("<svg") == 4
    assert 'class="fail"' not in page
    assert not re.search(r'src="|<link|@import|href="http', page)  # nothing is fetched
    assert (small / "runs/demo/checkpoints/net.safetensors").exists()
    assert list((small / "runs/demo/tensorboard").glob("events*"))


def test_help_leaves_the_last_run_alone(tmp_path: Path) -> None:
    page = tmp_path / "runs/demo/report.html"
    page.parent.mkdir(parents=True)
    page.touch()
    root = Path(demo.__main__.__file__).parents[1]
    command = [sys.executable, "-m", "demo", "--help"]
    shown = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "usage: python -m demo" in shown.stdout
    assert page.exists()


class OtherEpsilon(torch_side.Block):
    """The same weights, another function."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm.eps = 1e-2


@pytest.mark.filterwarnings("ignore:the weights are converted")
def test_demo_fails_where_the_frameworks_differ(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_side, "Block", OtherEpsilon)
    train_split, _ = demo.__main__.load_splits()
    checks, reports = demo.__main__.check_agreement(train_split)
    assert not any(check.passed for check in checks if "float64" in check.what)
    assert not any(report.ok for report in reports)


def test_a_check_of_nan_does_not_pass() -> None:
    assert not Check("gradients", float("nan"), 1.0).passed
    assert Check("gradients", 1e-12, 1e-9).passed


def test_both_frameworks_get_the_same_batches() -> None:
    train_split, _ = demo.__main__.load_splits()
    loader = torch_side.Epochs(train_split)
    for epoch in range(2):
        ours = list(jax_side.epoch_batches(train_split, epoch))
        theirs = list(loader)
        assert len(ours) == len(theirs) == settings.STEPS_PER_EPOCH
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one.images, other.images.numpy())
            np.testing.assert_array_equal(one.digits, other.digits.numpy())
