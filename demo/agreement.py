"""The proof: equal weights and equal batches give equal outputs, gradients and optimizer steps in both frameworks."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import bridge
from bridge.proof.metrics import compare
from demo import jax_side, torch_side
from demo.data import Split, epoch_batches
from demo.record import Check
from demo.settings import SEED, VERIFIED_STEPS

# float64: what the demo promises. float32: rounding alone, grown by fifty layers and by Adam's small divisors.
ALLOWED = {
    "float64": {"output": 1e-9, "gradients": 1e-9, "steps": 1e-9},
    "float32": {"output": 1e-5, "gradients": 1e-4, "steps": 1e-2},
}


def check_agreement(train_split: Split) -> tuple[list[Check], list[bridge.Report]]:
    """Compares the two frameworks at both precisions; the full reports stand behind the summary."""
    checks, reports = [], []
    for precision in ALLOWED:
        with jax.enable_x64(precision == "float64"):
            found, report = _check(precision, train_split)
        checks += found
        reports.append(report)
    return checks, reports


def _check(precision: str, train_split: Split) -> tuple[list[Check], bridge.Report]:
    model = jax_side.Classifier(dtype=jnp.dtype(precision), rngs=nnx.Rngs(SEED))
    net = bridge.convert(model, torch_side.Classifier().to(getattr(torch, precision)))
    batches = [
        Split(batch.images.astype(precision), batch.digits)
        for batch in islice(epoch_batches(train_split, epoch=0), VERIFIED_STEPS)
    ]
    digits = batches[0].digits

    report = bridge.verify(
        model,
        net,
        batches[0].images,
        loss=(
            lambda logits: jax_side.cross_entropy(logits, digits),
            lambda logits: torch_side.cross_entropy(logits, digits),
        ),
    )
    by_step_jax = bridge.convert(jax_side.take_steps(model, batches), torch_side.Classifier().to(net.head.weight.dtype))
    by_step_torch = torch_side.take_steps(net, batches)
    after = [
        relative_error(by_step_jax.state_dict()[name].numpy(), leaf.numpy())
        for name, leaf in by_step_torch.state_dict().items()
    ]
    errors = {
        "output": _worst(report, "value"),
        "gradients": _worst(report, "gradient"),
        "steps": max(after),
    }
    what = {
        "output": "output of the network",
        "gradients": "gradients of all parameters",
        "steps": f"parameters after {VERIFIED_STEPS} optimizer steps",
    }
    checks = [Check(f"{what[key]}, {precision}", errors[key], ALLOWED[precision][key]) for key in what]
    verdict = Check(f"layers, gradients and states that differ, {precision}", sum(not row.ok for row in report.rows), 0)
    return [*checks, verdict], report


def _worst(report: bridge.Report, check: str) -> float:
    """The largest relative error among the rows of one kind."""
    return max(10 ** (-row.figures.snr_db / 20) for row in report.rows if row.check == check)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm of the values."""
    return 10 ** (-compare(a, b).snr_db / 20)
