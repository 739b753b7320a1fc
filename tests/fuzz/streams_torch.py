"""HyperConnections of mhc_torch against tests/streams_reference.py: any config, dtype and transform of torch.func."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from mhc_torch.nn.hyper_connections import HyperConnections
from mhc_torch.streams import StreamConfig
from tests import streams_reference as reference

ERRORS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}
# The powers of ten that streams are multiplied with; the reference squares them in float64.
SCALES = {torch.float64: (-6, 140), torch.float32: (-6, 34), torch.float16: (-1, 2), torch.bfloat16: (-6, 34)}


class Branch(nn.Module):
    """x times a number of each feature: a function of every scale."""

    def __init__(self, factors: np.ndarray) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.from_numpy(factors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors


def trial(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    dtype = list(ERRORS)[rng.choice(4, p=[0.5, 0.3, 0.1, 0.1])]
    config = StreamConfig(
        streams=int(rng.integers(1, 5)),
        constraint=str(rng.choice(["sinkhorn", "sinkhorn", "permutations", "kronecker", "identity", "none"])),  # type: ignore[arg-type]
        iterations=int(rng.integers(1, 12)),
        dynamic=bool(rng.random() < 0.85),
        epsilon=float(rng.choice([0.0, 0.0, 1e-3])),
        norm_epsilon=float(rng.choice([1e-6, 1e-6, 0.1])),
        pre_epsilon=None if rng.random() < 0.7 else 0.05,
        post_scale=float(rng.choice([2.0, 2.0, 0.7])),
        order=str(rng.choice(["columns", "columns", "rows"])),
        norm=str(rng.choice(["rms", "rms", "rms_outside", "streams"])),
    )
    width = int(rng.integers(1, 6))
    # Coefficients are numbers that float32 has, whatever the streams are.
    wide = torch.promote_types(dtype, torch.float32)
    layer = HyperConnections(Branch(rng.normal(size=width)), width, config=config).to(wide)
    for parameter in (layer.phi, layer.alpha, layer.bias):
        if parameter is not None:
            nn.init.normal_(parameter, std=0.7)
    layer.branch.to(dtype)
    tokens = tuple(rng.integers(0, 3, size=int(rng.integers(0, 3))))
    scale = 10.0 ** rng.uniform(*SCALES[dtype]) if rng.random() < 0.5 else 1.0
    # Rows of very different size, of which each needs its own scale.
    rows = np.where(rng.random((*tokens, 1, 1)) < 0.5, 1.0, scale)
    x = torch.from_numpy(rng.normal(size=(*tokens, config.streams, width)) * rows).to(dtype)
    rows = np.maximum(np.broadcast_to(rows, x.shape), 1e-6)

    names = ("phi", "alpha", "bias", "branch.factors")
    leaves = {"x": x, **{name: p.detach() for name, p in layer.named_parameters() if name in names}}
    values = {name: leaf.double().numpy() for name, leaf in leaves.items()}
    options = reference.options(config)

    def expected(values: dict[str, np.ndarray]) -> np.ndarray:
        flat = values["x"].reshape(-1, config.streams, width)
        factors = values["branch.factors"]
        coefficients = (values.get("phi"), values.get("alpha"), values["bias"])
        return reference.layer(*coefficients, flat, lambda h: h * factors, **options).reshape(x.shape)

    def call(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        parameters = {name: leaf for name, leaf in leaves.items() if name != "x"}
        return torch.func.functional_call(layer, parameters, leaves["x"])

    # Every row is looked at in its own size.
    wanted, cotangent = expected(values) / rows, rng.normal(size=x.shape)
    kind = str(rng.choice(["plain", "vmap", "grad", "jvp", "vmap of grad", "second"]))
    what = f"{config}, {dtype}, x {tuple(x.shape)} times {scale:.3g}, {kind}"
    output = call(leaves)
    if kind == "vmap" and tokens:
        output = torch.func.vmap(lambda row: call({**leaves, "x": row}))(x)
    _close(output.double().numpy() / rows, wanted, 30 * ERRORS[dtype], f"output of {what}")

    direction = {name: rng.normal(size=value.shape) * (rows if name == "x" else 1) for name, value in values.items()}

    def along(t: float) -> float:
        moved = {name: value + t * direction[name] for name, value in values.items()}
        return float((cotangent * expected(moved) / rows).sum())

    weights = torch.from_numpy(cotangent / rows)

    def loss(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        return (call(leaves).double() * weights).sum()

    tangents = {name: torch.from_numpy(value).to(leaves[name].dtype) for name, value in direction.items()}
    size = np.abs(cotangent).sum() + 1
    if kind == "second" and dtype == torch.float64 and scale == 1.0:
        step = 1e-4
        _, second = torch.func.jvp(
            lambda leaves: _along(torch.func.grad(loss)(leaves), direction), (leaves,), (tangents,)
        )
        difference = (along(step) - 2 * along(0) + along(-step)) / step**2
        assert abs(float(second) - difference) <= 1e-3 * (size + abs(difference)), f"{what}: {second} for {difference}"
        return
    if kind == "jvp":
        found = float(torch.func.jvp(loss, (leaves,), (tangents,))[1])
    else:
        found = float(_along(_gradient(kind, loss, leaves, weights, call), direction))
    step = 1e-6
    difference = (along(step) - along(-step)) / (2 * step)
    assert abs(found - difference) <= (30 * ERRORS[dtype] + 1e-6) * (size * 10 + abs(difference)), (
        f"derivative of {what}: {found:.6g} along a direction, the reference has {difference:.6g}"
    )


def _gradient(
    kind: str,
    loss: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    leaves: dict[str, torch.Tensor],
    weights: torch.Tensor,
    call: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> dict[str, torch.Tensor]:
    if kind == "grad":
        return torch.func.grad(loss)(leaves)
    # Over no rows, vmap itself fails in the derivatives of some operators of torch.
    if kind == "vmap of grad" and leaves["x"].ndim > 2 and len(leaves["x"]):

        def of_row(row: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
            return torch.func.grad(lambda leaves: (call(leaves).double() * weight).sum())({**leaves, "x": row})

        rows = torch.func.vmap(of_row)(leaves["x"], weights)
        return {name: value if name == "x" else value.sum(0) for name, value in rows.items()}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    gradients = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def _along(gradients: dict[str, torch.Tensor], direction: dict[str, np.ndarray]) -> torch.Tensor:
    return sum((gradients[name].double() * torch.from_numpy(value)).sum() for name, value in direction.items())  # type: ignore[return-value]


def _close(found: np.ndarray, wanted: np.ndarray, error: float, what: str) -> None:
    difference = np.abs(found - wanted).max(initial=0)
    assert difference <= error * (1 + np.abs(wanted).max(initial=0)), f"{what}: off by {difference:.3g}"
