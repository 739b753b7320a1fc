"""The command line, as a newcomer meets it: real processes, files and exit statuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bridge
from bridge import __main__ as command_line

MODELS = """
import numpy
import torch
from flax import nnx

import bridge

def jax_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 3, rngs=rngs))

def torch_model():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))

def broken():
    raise KeyError("no such thing")

class Fails(torch.nn.Sequential):
    def forward(self, x):
        raise RuntimeError("no kernel")

def fails():
    return Fails(*torch_model())

def leaves():
    raise SystemExit(1)

def jax_tokens():
    return nnx.Embed(5, 3, rngs=nnx.Rngs(0))

def torch_tokens():
    return bridge.convert(jax_tokens(), torch.nn.Embedding(5, 3))

def out_of_range():
    return numpy.array([[1, 7]])

no_function = 3

def jax_drop():
    return nnx.Sequential(nnx.Linear(8, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(0)))

def torch_drop():
    return bridge.convert(jax_drop(), torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.Dropout(0.5)))
"""
MODELS_OF = ("models.py:jax_model", "models.py:torch_model")
PAIR = ("--jax", "models.py:jax_model", "--torch", "models.py:torch_model")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command line in a folder with models.py and weights in torch.pt -> (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text(MODELS)
    torch.manual_seed(0)
    bridge.save("torch.pt", nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))

    def run(*arguments):
        status = command_line.main(arguments)
        return status, *capsys.readouterr()

    return run


def test_inspect(run):
    status, output, errors = run("inspect", "torch.pt")
    assert (status, errors) == (0, "")
    assert output.splitlines()[0] == "0.weight  float32[16, 8]"
    assert "4 arrays, 195 numbers" in output


def test_convert_and_verify(run):
    assert run("convert", "torch.pt", "jax.safetensors", "--to", "jax", *PAIR)[0] == 0
    assert bridge.load("jax.safetensors")["layers.0.kernel"].shape == (8, 16)
    weights = ("--jax-weights", "jax.safetensors", "--torch-weights", "torch.pt")
    models = ("models.py:jax_model", "models.py:torch_model")
    np.save("x.npy", np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))
    for inputs in ("4x8", "x.npy"):
        status, output, _ = run("verify", *models, "--inputs", inputs, *weights, "--json", "report.json")
        assert status == 0
        assert "EQUAL" in output
        assert json.loads(Path("report.json").read_text())
    damaged = bridge.load("torch.pt")
    damaged["2.bias"][1] += 1
    bridge.save("torch.pt", damaged)
    status, output, _ = run("verify", *models, "--inputs", "4x8", *weights)
    assert status == 1
    assert "2.bias" in output


def test_convert_the_format_only(run):
    assert run("convert", "torch.pt", "copy.safetensors")[0] == 0
    assert run("convert", "copy.safetensors", "folder")[0] == 0
    whole, copy = bridge.load("torch.pt"), bridge.load("folder")
    assert whole.keys() == copy.keys()
    assert all(whole[name].tobytes() == copy[name].tobytes() for name in whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nothing.pt"), "no file or directory nothing.pt"),
        (("inspect", "models.py"), "models.py is in no known format"),
        (("convert", "torch.pt", "x.npz"), "no format that can be written"),
        (("convert", "torch.pt", "x.pt", "--to", "jax"), "go together"),
        (("convert", "torch.pt", "x.pt", "--to", "torch", *PAIR), "does not fit the model: .*; and 5 more"),
        (("verify", "models:jax_model", "nothing:f", "--inputs", "4x8"), "No module named 'nothing'"),
        (("verify", "nothing.py:f", "models.py:torch_model", "--inputs", "4x8"), "no file nothing.py"),
        (("verify", "models.py:f", "models.py:torch_model", "--inputs", "4x8"), "models.py has no function 'f'"),
        (("verify", "models.py:broken", "models.py:torch_model", "--inputs", "4x8"), "broken raised KeyError"),
        (("verify", *["models.py:torch_model"] * 2, "--inputs", "4x8"), "must return a flax.*Module"),
        (("verify", "jax_model", "models.py:torch_model", "--inputs", "4x8"), "does not name a model"),
        (("verify", *MODELS_OF, "--inputs", "4x8", "--steps", "-1"), "steps must not be negative"),
        (("verify", *MODELS_OF, "--inputs", "4x8", "--seed", "-1"), "non-negative"),
        (("verify", *MODELS_OF, "--inputs", "4x8", "--outputs", "a"), "'a' is not of the form JAX=TORCH"),
        (("verify", *MODELS_OF, "--inputs", "4x8", "--jax-weights", "torch.pt"), r"convert_file\(..., to=\"jax\"\)"),
        (("verify", *MODELS_OF, "--inputs", "no.npy"), "neither a file nor shapes"),
        (("verify", *MODELS_OF, "--inputs", "models.py:no_function"), "has no function 'no_function'"),
        (
            ("verify", *MODELS_OF, "--inputs", "4x7"),
            r"called with \[0\] float32\[4, 7\], and failed in layers.0",
        ),
        (("verify", "models.py:leaves", "models.py:torch_model", "--inputs", "4x8"), "leaves raised SystemExit"),
        (
            ("verify", "models.py:jax_model", "models.py:fails", "--inputs", "4x8"),
            r"RuntimeError at .*models.py:\d+: no kernel; torch_model was called with \[0\] float32\[4, 8\]",
        ),
        (
            *[("verify", "models.py:jax_tokens", "models.py:torch_tokens", "--inputs", "models.py:out_of_range")],
            "index out of range.*torch_model was called with .*int64",
        ),
    ],
)
def test_an_error_is_one_clear_line(run, arguments, message):
    before = sorted(path.name for path in Path().iterdir() if path.name != "__pycache__")
    status, output, errors = run(*arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert re.search(f"^error: .*{message}", errors), errors
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize("arguments", [("inspect",), ("verify", "--inputs"), ("convert", "a", "b", "--to", "numpy")])
def test_wrong_usage_is_one_line_too(run, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


@pytest.mark.filterwarnings("default")  # the command prints them
def test_what_is_not_proved_has_a_status_of_its_own(run):
    models = ("models.py:jax_drop", "models.py:torch_drop")
    status, output, errors = run("verify", *models, "--inputs", "4x8", "--no-training")
    assert status == 3
    assert "rate: jax layers.1 has 0.1, torch 1 means 0.5" in errors
    assert output.splitlines()[-1] == "NOT PROVED"


def test_the_help_has_examples(run, capsys):
    for arguments in (["--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            run(*arguments)
    output = capsys.readouterr().out
    assert "examples:" in output
    assert "exit status:" in output
    assert "--to {jax,torch}" in output


def test_what_the_shell_sees_of_an_error(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    call = [sys.executable, "-m", "bridge", "inspect", str(tmp_path / "x.safetensors")]
    failed = subprocess.run(call, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "not a safetensors file" in failed.stderr
