"""Whole Adam steps of 50 layers in PyTorch: MHCSequential and the published package over the plain residual network.

    python -m benchmarks.torch_front [--compiled] [--quick] [--seconds 40] [--output FILE]

The network is the one of the documentation, a stack of linear layers, with H = 4 and gradients through history; the
optimizer is torch.optim.Adam as it comes. Its time is that of the number of parameters, of which each layer's logits
are one more, so forward and backward are timed by themselves, too. All take turns in one run; OMP_NUM_THREADS sets the
threads.
The nodes of MHCSequential are compiled first (`python -m mhc_torch.native`); another network does without. A residual
network with as many parameters as MHCSequential shows what the optimizer alone takes.
`--compiled` compares the residual network and MHCSequential, both under torch.compile(fullgraph=True); the published
package does not compile.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import mhc
import torch
from torch import Tensor, nn

from benchmarks.record import output_file
from benchmarks.timing import Spread, environment, interleaved, ratio, write_json
from mhc_torch import MHCSequential, native

SECONDS = 40.0  # of a full run, for each size
DEPTH, QUICK_DEPTH = 50, 10
SIZES = {"C=64 B=32": (64, 32), "C=256 B=128": (256, 128)}


class Residual(nn.Module):
    """x_{l+1} = x_l + f_l(x_l)."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class ResidualWithLogits(Residual):
    """The residual network with a parameter more for each layer, which has a gradient and no effect.

    No network whose layers have logits of their own, under the same optimizer, can take less time.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.logits = nn.ParameterList(torch.zeros(4) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.stack(list(self.logits)).sum()


class NodesInPython(nn.Module):
    """A network where no compiler has made the nodes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        compiled, native.nodes = native.nodes, lambda: None  # type: ignore[assignment]
        try:
            return self.network(x)
        finally:
            native.nodes = compiled


def candidates(width: int, depth: int) -> dict[str, nn.Module]:
    """The networks, with small branches, so that many of them neither explode nor vanish."""

    def layers() -> list[nn.Module]:
        made: list[nn.Module] = [nn.Linear(width, width) for _ in range(depth)]
        for layer in made:
            nn.init.normal_(layer.weight, std=0.1 / width**0.5)  # type: ignore[arg-type]
        return made

    return {
        "residual": Residual(layers()),
        "residual, with logits": ResidualWithLogits(layers()),
        "mhc_torch": MHCSequential(layers()),
        "mhc_torch, nodes in Python": NodesInPython(MHCSequential(layers())),
        "published": mhc.MHCSequential(layers(), detach_history=False),
    }


def training_steps(
    model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A whole step: gradients cleared, forward, loss, backward, Adam; and one that stops before Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def gradients() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(call(x), y).backward()

    def step() -> None:
        gradients()
        optimizer.step()

    return step, gradients


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that the graph keeps for the backward pass, each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(kept.values())


def measure(width: int, batch: int, depth: int, compiled: bool, seconds: float) -> dict[str, dict[str, Spread | float]]:
    """Ratios of times, of whole steps and without Adam, and of saved bytes over the residual network's."""
    torch.manual_seed(0)
    models = candidates(width, depth)
    if compiled:
        del models["published"], models["mhc_torch, nodes in Python"]
    x, y = torch.randn(batch, width), torch.randn(batch, width)
    kept = {name: saved_bytes(model, x) for name, model in models.items()}
    steps = {}
    for name, model in models.items():
        call = torch.compile(model, fullgraph=True) if compiled else model
        steps[name], steps[f"{name} without Adam"] = training_steps(model, call, x, y)
    samples = interleaved(steps, seconds=seconds)
    found: dict[str, dict[str, Spread | float]] = {
        name: {
            "milliseconds": Spread.of(samples[name] * 1e3),
            "time": ratio(samples, name, "residual"),
            "time without Adam": ratio(samples, f"{name} without Adam", "residual without Adam"),
            "saved": kept[name] / kept["residual"],
        }
        for name in models
    }
    # Of a network whose layers have logits, what the sums themselves cost.
    found["mhc_torch"]["time over as many parameters"] = ratio(samples, "mhc_torch", "residual, with logits")
    if "published" in models:
        found["published"]["time over mhc_torch"] = ratio(samples, "published", "mhc_torch")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a second for the smaller size, with 10 layers")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each size")
    parser.add_argument("--output", type=Path, help="default: the recorded result, of a full run")
    arguments = parser.parse_args()
    depth, seconds = (QUICK_DEPTH, 1.0) if arguments.quick else (DEPTH, arguments.seconds)
    kind = "compiled-cpu" if arguments.compiled else "cpu"
    output = output_file(arguments.output, f"torch_front-{kind}.json", full=seconds >= SECONDS)
    # glibc hands memory back after every step until a program has freed one large block, as those that read data have.
    torch.empty(31 << 20, dtype=torch.uint8)
    native.build()

    sizes = {}
    print(f"{'size':<12} {'network':<26} {'ms a step':>26} {'over residual':>24} {'without Adam':>24} {'saved':>7}")
    for size, (width, batch) in list(SIZES.items())[: 1 if arguments.quick else None]:
        found = measure(width, batch, depth, arguments.compiled, seconds)
        sizes[size] = found
        for name, row in found.items():
            times = f"{row['milliseconds']!s:>26} {row['time']!s:>24} {row['time without Adam']!s:>24}"
            print(f"{size:<12} {name:<26} {times} {row['saved']:>7.3f}")
        print(f"{size:<12} mhc_torch over as many parameters: {found['mhc_torch']['time over as many parameters']}")
        if "published" in found:
            print(f"{size:<12} published over mhc_torch: {found['published']['time over mhc_torch']}")
    record = {
        "environment": environment("torch", "mhc"),
        "threads": torch.get_num_threads(),
        "compiled": arguments.compiled,
        "depth": depth,
        "sizes": sizes,
    }
    write_json(output, record)


if __name__ == "__main__":
    main()
