"""`python -m demo`: train on real digits in both frameworks, prove that they agree, write runs/demo/report.html."""

import argparse
import shutil
import sys
import time
from pathlib import Path

from flax import nnx

import bridge
from demo import jax_side, torch_side
from demo.agreement import check_agreement
from demo.data import load_splits
from demo.reload import check_reloads
from demo.report import write_report
from demo.settings import DEPTH, SEED

RUN = Path("runs/demo")
REQUIRED_ACCURACY = 0.95


def main() -> int:
    """Returns the exit status: 0 if the networks learned and the frameworks agree."""
    started = time.perf_counter()
    shutil.rmtree(
        RUN, ignore_errors=True
    )  # a run stands alone; TensorBoard would draw an older one into the same chart
    train_split, test_split = load_splits()
    print(
        f"{len(train_split.digits)} images of handwritten digits to learn from, {len(test_split.digits)} held out; "
        f"{DEPTH} layers"
    )

    print("\nThe same weights and batches in both frameworks, layer by layer and over the first optimizer steps ...")
    agreement, reports = check_agreement(train_split)
    for check in agreement:
        print(f"  {check}")

    print("\nTraining ...")
    start = jax_side.Classifier(rngs=nnx.Rngs(SEED))
    net = bridge.convert(start, torch_side.Classifier())
    jax_run, model = jax_side.train("mHC (JAX)", start, train_split, test_split)
    torch_run = torch_side.train("mHC (PyTorch)", net, train_split, test_split, RUN / "tensorboard")
    others = [
        jax_side.train(f"{name} (JAX)", jax_side.Classifier(name, rngs=nnx.Rngs(SEED)), train_split, test_split)[0]
        for name in ("residual", "plain")
    ]
    reloads = check_reloads(model, net, test_split, RUN / "checkpoints")
    for check in reloads:
        print(f"  {check}")

    page = RUN / "report.html"
    write_report(page, [jax_run, torch_run, *others], agreement, reloads)
    for report, precision in zip(reports, ("float64", "float32"), strict=True):
        report.to_html(RUN / f"verification-{precision}.html")
    learned = min(jax_run.accuracies[-1], torch_run.accuracies[-1]) >= REQUIRED_ACCURACY
    agrees = all(check.passed for check in agreement)
    survives = all(check.passed for check in reloads)
    holds = learned and agrees and survives
    accuracies = ", ".join(f"{run.name} {run.accuracies[-1]:.1%}" for run in [jax_run, torch_run, *others])
    print(f"""
accuracy   {accuracies}
agreement  {agreement[0]}; {agreement[2]}
reloaded   Orbax and safetensors checkpoints predict {"the same" if survives else "SOMETHING ELSE"}
verdict    {"PASS" if holds else "FAIL"} in {time.perf_counter() - started:.0f} s: {_verdict(learned, agrees)}
report     {page.resolve()}""")
    return 0 if holds else 1


def _verdict(learned: bool, agrees: bool) -> str:
    learning = "both networks learned" if learned else f"a network stays below {REQUIRED_ACCURACY:.0%}"
    return f"{learning}, and the frameworks {'compute the same function' if agrees else 'DIFFER'}"


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m demo", description=__doc__).parse_args()
    sys.exit(main())
