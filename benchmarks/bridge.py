"""What the bridge costs: converting large models against a copy of the file, and calls from torch into JAX.

python -m benchmarks.bridge [conversion | call] [--quick] [--output FILE]
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flax import nnx
from torch import nn

import bridge
import mhc_jax.models as jax_models
import mhc_jax.nn as jax_mhc
import mhc_torch as torch_mhc
import mhc_torch.models as torch_models
from benchmarks import bridge_call
from benchmarks.record import output_file
from benchmarks.timing import Spread, environment, interleaved, ratio, write_json


class TorchResNet(nn.Module):
    """The torch form of `mhc_jax.models.MHCResNet` with bottleneck blocks."""

    def __init__(self, stage_sizes: Sequence[int], num_classes: int, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, features, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.blocks = nn.ModuleList()
        width = features
        for stage, size in enumerate(stage_sizes):
            for index in range(size):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(torch_mhc.MHCBottleneck(width, features * 2**stage, stride))
                width = 4 * features * 2**stage
        self.fc = nn.Linear(width, num_classes)


def resnet(stage_sizes: Sequence[int], num_classes: int, features: int) -> tuple[nnx.Module, nn.Module]:
    """A ResNet with history, in both frameworks; (3, 4, 6, 3), 1000 and 64 are the sizes of ResNet-50."""
    block = jax_mhc.MHCBottleneck
    ours = jax_models.MHCResNet(stage_sizes, num_classes, features=features, block=block, rngs=nnx.Rngs(0))
    return ours, TorchResNet(stage_sizes, num_classes, features)


def decoder(**sizes: Any) -> tuple[nnx.Module, nn.Module]:
    """A decoder with history, in both frameworks."""
    ours = jax_models.Decoder(jax_models.DecoderConfig(**sizes, tied=True), "history", rngs=nnx.Rngs(0))
    return ours, torch_models.Decoder(torch_models.DecoderConfig(**sizes, tied=True), "history")


def conversion(output: Path, quick: bool) -> None:
    """Both directions, from file to file and from model to model, after checking the way there and back."""
    models = {
        "small ResNet": lambda: resnet((1, 1), 10, 8),
        "small transformer": lambda: decoder(vocabulary=100, features=32, mlp_features=88, depth=2, num_heads=2),
    }
    if not quick:
        models = {
            "ResNet-50": lambda: resnet((3, 4, 6, 3), 1000, 64),
            "transformer": lambda: decoder(vocabulary=32_000, features=1280, mlp_features=3456, depth=10, num_heads=10),
        }
    found = {name: measure(name, *make(), seconds=1 if quick else 10) for name, make in models.items()}
    over_copy, over_goal = ({name: found[name][part] for name in found} for part in (0, 1))
    write_json(output, {"times of a copy": over_copy, "times of the goal": over_goal, **environment("torch", "flax")})


def measure(
    name: str, ours: nnx.Module, theirs: nn.Module, seconds: float
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """How long each conversion takes, over a copy of the file; and over the goal, 1.5 copies and a second."""
    with tempfile.TemporaryDirectory() as folder:
        jax_file, torch_file, back = (Path(folder) / f"{kind}.safetensors" for kind in ("jax", "torch", "back"))
        bridge.save(torch_file, theirs)
        bridge.convert_file(torch_file, jax_file, ours, theirs, "jax")
        bridge.convert_file(jax_file, back, ours, theirs, "torch")
        if back.read_bytes() != torch_file.read_bytes():
            raise AssertionError(f"{name} did not come back bit for bit")

        # A file of its own: to truncate one that a conversion wrote makes the disk discard its blocks meanwhile.
        copied = Path(folder) / "copied"

        def copy() -> None:
            shutil.copyfile(torch_file, copied)
            with copied.open("rb+") as file:
                os.fsync(file.fileno())  # as the conversion does

        candidates: dict[str, Callable[[], object]] = {
            "copy of the file": copy,
            "file, torch to jax": lambda: bridge.convert_file(torch_file, jax_file, ours, theirs, "jax"),
            "file, jax to torch": lambda: bridge.convert_file(jax_file, back, ours, theirs, "torch"),
            "model, torch to jax": lambda: bridge.convert(theirs, ours),
            "model, jax to torch": lambda: bridge.convert(ours, theirs),
        }
        samples = interleaved(candidates, seconds=seconds, warmup=1)
        print(f"{name}: {torch_file.stat().st_size / 1e6:.0f} MB, there and back bit for bit")
    over_copy = {candidate: ratio(samples, candidate, "copy of the file") for candidate in candidates}
    goal = 1.5 * samples["copy of the file"] + 1.0
    over_goal = {candidate: Spread.of(samples[candidate] / goal) for candidate in candidates}
    for candidate, times in samples.items():
        time = f"{Spread.of(times).median:7.3f} s"
        spreads = f"{over_copy[candidate]} times a copy, {over_goal[candidate]} of the goal"
        print(f"  {candidate:20} {time}   {spreads}", flush=True)
    return over_copy, over_goal


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["conversion", "call"], help="default: both")
    parser.add_argument("--quick", action="store_true", help="a second for each measurement, small models only")
    parser.add_argument("--output", type=Path, help="of the part named; default: the recorded result, of a full run")
    arguments = parser.parse_args()
    if arguments.output and not arguments.part:
        parser.error("--output is one file, and both parts write one each: name a part, conversion or call")
    full = not arguments.quick
    call = output_file(arguments.output, "bridge-cpu.json", full=full)
    files = output_file(arguments.output, "bridge_conversion.json", full=full)
    torch.manual_seed(0)
    if arguments.part != "conversion":
        bridge_call.main(call, arguments.quick)
    if arguments.part != "call":
        conversion(files, arguments.quick)


if __name__ == "__main__":
    main()
