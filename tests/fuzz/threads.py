"""Models of every kind, used by several threads at once, within themselves, and with branches that fail."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mhc_torch import (
    HistoryBuffer,
    HyperConnections,
    MatrixMHCSkip,
    MHCBasicBlock,
    MHCBottleneck,
    MHCConv2d,
    MHCSequential,
    MHCSkip,
    inject_mhc,
    share_history,
)
from mhc_torch.nn.hyper_connections import StreamStack

WIDTH = 4


class Failure(Exception):
    pass


class Probe(nn.Module):
    """A branch that does, in the thread that asked for it, what a forward must survive; else it is a small layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.plans = _Plans()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Probe":
        return self  # nobody copies models here

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # One plan serves one forward, and not those within it.
        plan, self.plans.next = self.plans.next, None
        if plan is not None:
            plan()
        return torch.tanh(self.layer(x))


class _Plans(threading.local):
    next: Callable[[], None] | None = None


class Tower(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ByHand(nn.Module):
    """Skips with a list of states that is the caller's own."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.skips = nn.ModuleList(MatrixMHCSkip(3) if k % 2 else MHCSkip() for k in range(len(branches)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = [x]
        for branch, skip in zip(self.branches, self.skips, strict=True):
            states.append(skip(branch(states[-1]), states))
        return states[-1]


def _model(rng: np.random.Generator) -> nn.Module:
    """Takes and gives (batch, WIDTH), and holds one Probe."""
    depth = int(rng.integers(1, 6))
    branches: list[nn.Module] = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(depth)]
    branches[int(rng.integers(depth))] = Probe()
    settings: dict[str, Any] = {
        "max_history": int(rng.integers(1, 5)),
        "constraint": str(rng.choice(["simplex", "identity", "sparse"])),
        "init": "uniform",
        "detach_history": bool(rng.random() < 0.2),
    }
    kind = rng.choice(["stack", "checkpointed", "injected", "blocks", "shared", "streams", "by hand", "nested"])
    if kind in ("stack", "checkpointed"):
        return MHCSequential(branches, use_gating=True, use_checkpointing=bool(kind == "checkpointed"), **settings)
    if kind == "injected":
        scope = str(rng.choice(["global", "module"]))
        return inject_mhc(Tower(branches), Probe, "Linear", history_scope=scope, **settings)
    if kind in ("blocks", "shared"):
        makers = (
            lambda: MHCConv2d(WIDTH, WIDTH, 1),
            lambda: MHCBasicBlock(WIDTH, WIDTH),
            lambda: MHCBottleneck(WIDTH, 1),
        )
        blocks = [makers[k]() for k in rng.integers(0, 3, size=depth)]
        between = [nn.Flatten(), Probe(), nn.Unflatten(1, (WIDTH, 1, 1))]
        at = int(rng.integers(depth))
        model = Tower([nn.Unflatten(1, (WIDTH, 1, 1)), *blocks[:at], *between, *blocks[at:], nn.Flatten()])
        return share_history(model) if kind == "shared" else model
    if kind == "streams":
        return StreamStack([HyperConnections(branch, WIDTH, layer_index=k) for k, branch in enumerate(branches)])
    if kind == "by hand":
        return ByHand(branches)
    inner = inject_mhc(Tower([nn.Linear(WIDTH, WIDTH), *branches]), nn.Linear)
    return MHCSequential([nn.Linear(WIDTH, WIDTH), inner, nn.Tanh()], **settings)


def trial(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = _model(rng).eval()
    probe = next(part for part in model.modules() if isinstance(part, Probe))
    parameters = [p for p in model.parameters() if p.requires_grad]
    inputs = [torch.randn(int(rng.integers(1, 4)), WIDTH) for _ in range(4)]

    def forward(k: int) -> torch.Tensor:
        return model(inputs[k])  # type: ignore[no-any-return]

    def gradients(k: int, through: Callable[..., torch.Tensor] = model) -> tuple[torch.Tensor, ...]:
        y = through(inputs[k])
        return y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, materialize_grads=True)

    def again(k: int) -> tuple[torch.Tensor, ...]:
        return gradients(k, lambda x: checkpoint(model, x, use_reentrant=False))

    outputs, expected = [forward(k) for k in range(4)], [gradients(k) for k in range(4)]

    @torch.no_grad()
    def same(found: Any, wanted: Any, what: str) -> None:
        for ours, alone in zip(found, wanted, strict=True):
            difference = (ours - alone).abs().max().item() if ours.shape == alone.shape else float("inf")
            assert difference <= 1e-6 * (1 + alone.abs().max().item()), f"{what} of {model}: off by {difference:.3g}"

    def fail() -> None:
        raise Failure

    # What a checkpointed branch computes is computed again, and its plan is not: there it may save nothing.
    checkpointed = getattr(model, "use_checkpointing", False)

    def within(k: int) -> torch.Tensor:
        with torch.set_grad_enabled(not checkpointed):
            return forward(k)

    def job(kind: str, k: int, other: int) -> None:
        if kind == "fail":
            probe.plans.next = fail
            try:
                within(k)
            except Failure:
                return
            raise AssertionError(f"the branch of {model} failed, its forward did not")
        if kind == "nest":
            probe.plans.next = lambda: same([within(other)], [outputs[other]], "a forward within a forward")
        elif kind == "nest and fail":
            probe.plans.next = lambda: job("fail", other, k)
        elif kind == "nest a gradient" and not checkpointed:
            probe.plans.next = lambda: same(gradients(other), expected[other], "gradients within a forward")
        if kind == "again":
            same(again(k), expected[k], "gradients of a checkpoint")
        elif rng.random() < 0.5:
            same(gradients(k), expected[k], f"gradients ({kind})")
        else:
            same([forward(k)], [outputs[k]], f"output ({kind})")

    kinds = ["plain", "fail", "nest", "nest and fail", "nest a gradient", "again"]
    jobs = [(str(rng.choice(kinds)), int(rng.integers(4)), int(rng.integers(4))) for _ in range(16)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(job, *each) for each in jobs]:
                done.result()
    finally:
        sys.setswitchinterval(interval)
    held = [part for part in model.modules() if isinstance(part, HistoryBuffer) and len(part)]
    assert not held, f"{len(held)} histories of {model} hold states after all forwards"
