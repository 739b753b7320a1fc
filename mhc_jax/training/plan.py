"""What a training costs on a TPU that is not here: `python -m mhc_jax.training.plan CONFIG.py --target v5p:2x2x4`.

libtpu compiles the whole training step for the topology, and says what memory it takes and how long its parts run.
"""

import argparse
import dataclasses
import itertools
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import Var
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from mhc_jax.models.decoder import REMAT_NAMES
from mhc_jax.placement import BATCH
from mhc_jax.training.assembly import Assembly, assemble, language_loss
from mhc_jax.training.config import TrainingConfig, load_config
from mhc_jax.training.sharding import data_mesh
from mhc_jax.training.step import TrainState
from mhc_jax.training.throughput import flops_per_token, peak

REMATS = (None, REMAT_NAMES, ("attention", "attention_out", "mlp_out"), ())
BLOCK_LENGTHS = (1, 2, 4)
# Of four devices, as a host of TPUs has: placement, tensor, sequence.
PLACED: tuple[tuple[Literal["replicated", "fully_sharded"], int, int], ...] = (
    ("replicated", 1, 1),
    ("fully_sharded", 1, 1),
    ("replicated", 4, 1),
    ("fully_sharded", 4, 1),
    ("fully_sharded", 1, 4),
)
# Cycles a second of the matrix units, by the start of `device_kind`: published peaks, and what a unit does in a cycle.
_CLOCKS = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6": 1.75e9, "TPU7x": 2.2e9}
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Plan:
    """What the compiler makes of a training step, for one device.

    Attributes:
        complaint: why it does not fit; "" if it does, and then there is the rest.
        memory: bytes of parameters and optimizer, of what the forward pass keeps for the backward pass, and of the
            rest: gradients, gathered parameters, the arrays at hand.
        seconds: of a step, by the compiler's cycles of each instruction; waiting for other devices is not in it, and
            what kernels of Pallas take is not.
        fraction: of the peak, of the decoder's own operations in that time; None where cycles or peak are not known.
        flops: the decoder's own operations of a step, of this device.
        collectives: by kind, how many run in a step and the bytes of their results.
    """

    complaint: str = ""
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    flops: float = 0.0
    fraction: float | None = None
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if self.complaint:
            return f"does not fit: {self.complaint}"
        lines = [f"fits: {sum(self.memory.values()) / 2**30:.2f} GiB a device"]
        lines += [f"  {name:<18} {size / 2**30:8.2f} GiB" for name, size in self.memory.items()]
        if self.seconds is not None:
            lines.append(
                f"  a step takes {self.seconds:.4g} s by the compiler's cycles, without collectives and kernels"
            )
        if self.fraction is not None:
            lines.append(f"  {self.flops:.4g} operations, {self.fraction:.1%} of the peak")
        lines += [
            f"  {kind}: {count} a step, {size / 2**20:.1f} MiB" for kind, (count, size) in self.collectives.items()
        ]
        return "\n".join(lines)


def plan(config: TrainingConfig, target: str) -> Plan:
    """Compiles the training step of `config` for a topology of TPUs.

    Args:
        target: as libtpu knows it, such as "v5e:2x2", "v5p:2x2x4" or "v6e:2x4".

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        ValueError: it does not know the topology, or the batch does not divide over it.
    """
    devices = _devices(target)
    mesh = data_mesh(config.tensor, config.sequence, devices)
    if config.model.attention is None:
        config = _changed(config, attention="splash")
    if config.model.connection == "streams" and config.model.implementation is None:
        config = _changed(config, implementation="xla")  # None is what this machine, without a TPU, would choose
    assembly = assemble(config, mesh)
    rows = (config.data.batch, config.data.length + 1)
    tokens = jax.ShapeDtypeStruct(rows, np.int32, sharding=NamedSharding(mesh, PartitionSpec(BATCH)))
    batch = {"tokens": tokens, "segments": tokens}
    traced = assembly.make_step().trace(assembly.shapes, batch)
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ \w+", str(error))
        return Plan(used.group(0) if used else str(error).splitlines()[0])
    kind = devices[0].device_kind
    cycles, collectives = read(compiled.as_text())
    clock = next((clock for name, clock in _CLOCKS.items() if kind.startswith(name)), None)
    seconds = None if clock is None else cycles / clock
    flops = flops_per_token(config.model.sizes, config.data.length) * config.data.batch * config.data.length / mesh.size
    most = peak(kind)
    state = assembly.shapes
    analysis = compiled.memory_analysis()
    whole = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    whole += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state)}
    left = whole - sum(memory.values())
    kept = min(kept_for_backward(assembly, batch), left)
    memory |= {"kept for backward": kept, "the rest": left - kept}
    fraction = None if seconds is None or most is None else flops / seconds / most
    return Plan("", memory, seconds, flops, fraction, collectives)


def kept_for_backward(assembly: Assembly, batch: Any) -> int:
    """Bytes, of one device, that derivatives of the loss need of its forward pass beside the parameters.

    As JAX parts the two passes, and `mhc_jax.placement` the arrays: evenly.
    """

    def pullback(state: TrainState, batch: Any) -> Any:
        def loss(params: Any) -> Array:
            return language_loss(replace(state, params=params).model, batch)[0]

        return jax.vjp(loss, state.params)[1]

    state = assembly.shapes
    mesh = jax.tree.leaves(assembly.shardings)[0].mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.make_jaxpr(pullback)(state, batch).jaxpr
    # Nothing that is there anyway, and no parameter in another dtype, or of blocks of layers.
    sizes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    kept = {var for var in program.outvars if isinstance(var, Var)} - set(program.invars)
    arrays: list[Any] = [var.aval for var in kept]
    parts = mesh.size * assembly.config.optimizer.accumulate
    return sum(prod(one.shape) * one.dtype.itemsize for one in arrays if not _forms(one.shape) & sizes) // parts


def _forms(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The shape, and that of its first two axes in one."""
    return {shape, (prod(shape[:2]), *shape[2:])}


def search(config: TrainingConfig) -> Iterator[tuple[str, TrainingConfig]]:
    """Configs of the same function that keep more or less for the backward pass, and are placed in other ways.

    Example:
        >>> len(list(search(TrainingConfig())))
        24
    """
    blocks = BLOCK_LENGTHS if config.model.connection == "streams" else (1,)
    for (placement, tensor, sequence), remat, block in itertools.product(PLACED, REMATS, blocks):
        try:
            placed = replace(config, placement=placement, tensor=tensor, sequence=sequence)
        except ValueError:  # sizes that they do not divide
            continue
        if config.model.sizes.depth % block == 0:
            name = f"placement={placement} tensor={tensor} sequence={sequence} remat={remat} block_length={block}"
            yield name, _changed(placed, remat=remat, block_length=block)


def read(program: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """Cycles of an optimized program for TPUs, and its collectives by kind: how many run, and bytes of their results.

    Loops count as often as they run; a loop that does not say how often counts once.

    Example:
        >>> program = '''
        ... %body (p: f32[8]) -> f32[8] {
        ...   %p = f32[8]{0} parameter(0)
        ...   %f = f32[8]{0} fusion(%p), calls=%c, backend_config={"estimated_cycles":"7"}
        ...   ROOT %g = f32[16]{0} all-gather(%f), dimensions={0}
        ... }
        ... %condition (p: f32[8]) -> pred[] {
        ...   %n = s32[] constant(5)
        ... }
        ... ENTRY %main (x: f32[8]) -> f32[8] {
        ...   ROOT %w = f32[8]{0} while(%x), condition=%condition, body=%body
        ... }'''
        >>> read(program)
        (35, {'all-gather': (5, 320)})
    """
    computations: dict[str, list[str]] = defaultdict(list)
    name = entry = ""
    for line in program.splitlines():
        if begin := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = begin.group(2)
            entry = name if begin.group(1) else entry
        elif " = " in line:
            computations[name].append(line)
    cycles = 0
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def walk(name: str, times: int, fused: bool) -> None:
        nonlocal cycles
        for line in computations[name]:
            operation = re.search(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(", line)
            if operation is None:
                continue
            kind = operation.group(2).removesuffix("-start")
            if kind in _COLLECTIVES:
                found[kind][0] += times
                found[kind][1] += times * max(map(_array_bytes, re.findall(r"(\w+)\[([\d,]*)\]", operation.group(1))))
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            cycles += times * int(estimate.group(1)) if estimate and not fused else 0
            runs = times * (_trips(computations, line) if kind == "while" else 1)
            for called in re.findall(r"\b(?:body|calls)=%?([\w.\-]+)", line):
                walk(called, runs, fused or kind == "fusion")
            for listed in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for branch in listed.split(","):
                    walk(branch.strip().lstrip("%"), times, fused)

    walk(entry, 1, fused=False)
    return cycles, {kind: (count, size) for kind, (count, size) in found.items()}


def _trips(computations: dict[str, list[str]], line: str) -> int:
    # JAX counts from 0, and compares with the one integer of the condition.
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations[condition.group(1)] if condition else []
    numbers = {number for each in lines for number in re.findall(r"= s32\[\]\S* constant\((\d+)\)", each)}
    return int(numbers.pop()) if len(numbers) == 1 else 1


def _array_bytes(shape: tuple[str, str]) -> int:
    return _SIZES.get(shape[0], 4) * prod(int(length) for length in shape[1].split(",") if length)


def _bytes(tree: Any) -> int:
    """Of what one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _changed(config: TrainingConfig, **model: Any) -> TrainingConfig:
    return replace(config, model=replace(config.model, **model))


def _devices(target: str) -> Any:
    if find_spec("libtpu") is None:
        raise ModuleNotFoundError("the plan needs the compiler of TPUs: pip install libtpu")
    # There is no TPU, whose metadata to ask for, and which one process alone could use.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--target: libtpu knows no topology {target!r}: {str(error).splitlines()[0]}") from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mhc_jax.training.plan", description=__doc__)
    parser.add_argument("config", type=Path, help="a Python file that says config = TrainingConfig(...)")
    parser.add_argument("--target", required=True, help="a topology, such as v5p:2x2x4 or v5e:2x2")
    parser.add_argument("--batch", type=int, help="in place of data.batch")
    parser.add_argument("--search", action="store_true", help="try remat, block lengths and placements")
    given = parser.parse_args()
    try:
        config = load_config(given.config)
        if given.batch is not None:
            config = replace(config, data=replace(config.data, batch=given.batch))
        if not given.search:
            made = plan(config, given.target)
            print(made)
            return int(bool(made.complaint))
        _devices(given.target)
        tried = []
        for name, changed in search(config):
            try:
                made = plan(changed, given.target)
            except ValueError as error:  # this placement's parts do not divide the batch
                made = Plan(str(error))
            print(f"{name}\n{made}", flush=True)
            if not made.complaint:
                tried.append((made.seconds or 0.0, name))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"the least time that fits: {min(tried)[1]}" if tried else "none of them fits")
    return int(not tried)


if __name__ == "__main__":
    sys.exit(main())
