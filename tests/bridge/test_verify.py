"""What a verification of healthy models says, and what it refuses."""

import json
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
from bridge.proof.metrics import compare
from bridge.proof.report import Row
from tests.bridge import pairs


@pytest.mark.parametrize("make", [pairs.chain, pairs.mixed, pairs.image, pairs.tokens], ids=lambda make: make.__name__)
def test_healthy_models_are_equal_also_after_training_steps(make: Callable) -> None:
    jax_model, torch_model = make()
    before = {name: leaf.clone() for name, leaf in torch_model.state_dict().items()}
    report = bridge.verify(jax_model, torch_model, **pairs.inputs(make), steps=3)
    assert report.ok, str(report)
    assert report.exit_status == 0
    checks = {row.check for row in report.rows}
    assert {"weights", "layer value", "layer alone: value", "value", "loss", "gradient", "after 3 steps"} <= checks
    layers = {path for path, m in torch_model.named_modules() if isinstance(m, nn.Linear) and "proj" not in path}
    assert layers <= {row.path for row in report.rows if row.check == "layer value"}
    # The models are as they were.
    assert all(torch.equal(leaf, before[name]) for name, leaf in torch_model.state_dict().items())
    assert torch_model.training


def batch_norm(rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, rngs=rngs)


def sequence(*layers: Callable[[nnx.Rngs], object]) -> Callable[[nnx.Rngs], nnx.Sequential]:
    return lambda rngs: nnx.Sequential(*(layer(rngs) for layer in layers))


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(4, 4, rngs=rngs)


def layer_norm(rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs)


# JAX model, torch model, shape of the input in the JAX layout
SMALL = {
    "linear": (linear, lambda: nn.Linear(4, 4), (5, 4)),
    "layer norm": (layer_norm, lambda: nn.LayerNorm(4), (5, 4)),
    "RMS norm": (lambda rngs: nnx.RMSNorm(4, rngs=rngs), lambda: nn.RMSNorm(4, eps=1e-6), (5, 4)),
    "batch norm": (batch_norm, lambda: nn.BatchNorm1d(4), (6, 4)),
    "convolution": (
        lambda rngs: nnx.Conv(2, 3, (3,), padding="VALID", rngs=rngs),
        lambda: nn.Conv1d(2, 3, 3),
        (2, 6, 2),
    ),
    "perceptron": (
        sequence(linear, lambda rngs: jax.nn.relu, linear),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        (5, 4),
    ),
    "normalized": (sequence(linear, layer_norm), lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (5, 4)),
    "batch-normalized": (
        sequence(linear, batch_norm),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        (6, 4),
    ),
}


@pytest.mark.parametrize("kind", SMALL)
def test_no_false_alarm_on_random_healthy_pairs(kind: str) -> None:
    make_jax, make_torch, shape = SMALL[kind]
    rng = np.random.default_rng(list(SMALL).index(kind))
    alarms = []
    for number in range(15):  # of each of eight kinds; tests/fuzz has more
        jax_model, torch_model = pairs.randomized(make_jax(nnx.Rngs(0)), make_torch(), number)
        scale, offset = 10 ** rng.uniform(-3, 3), rng.choice([0, 3])
        x = (scale * (offset + rng.standard_normal(shape))).astype(np.float32)
        other = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim > 2 else x
        report = bridge.verify(jax_model, torch_model, x, torch_inputs=other, steps=number % 3, seed=number)
        if not report.ok:
            alarms.append((number, report.faults))
    assert not alarms


def test_bfloat16_models_are_judged_by_the_precision_of_bfloat16() -> None:
    jax_model = nnx.Linear(64, 4, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    torch_model = bridge.convert(jax_model, nn.Linear(64, 4, dtype=torch.bfloat16))
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(jnp.bfloat16)
    report = bridge.verify(jax_model, torch_model, x)
    assert report.ok, str(report)
    (row,) = (row for row in report.rows if row.check == "value")
    assert row.dtype == "bfloat16"
    assert row.tolerance > 2**-8
    torch_model.weight.data[0, 0] += 0.25
    assert not bridge.verify(jax_model, torch_model, x)


def test_numbers_that_xla_flushes_to_zero_are_no_difference() -> None:
    torch_model = nn.Linear(3, 2, bias=False)
    torch_model.weight.data.fill_(1e-20)
    jax_model = bridge.convert(torch_model, nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)))
    x = np.full((4, 3), 1e-20, np.float32)
    assert (torch_model(torch.tensor(x)) > 0).all()  # 3e-40, a subnormal number
    report = bridge.verify(jax_model, torch_model, x)
    assert report.ok, str(report)
    torch_model.weight.data[0, 0] = 1.1e-20
    assert not bridge.verify(jax_model, torch_model, x)


def test_short_matrix_products_are_set_aside_and_come_back() -> None:
    class Probe(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().forward(x)

    seen: set[tuple[str, bool]] = set()
    jax_model = nnx.Linear(256, 4, rngs=nnx.Rngs(0))
    torch_model = bridge.convert(jax_model, nn.Linear(256, 4))
    torch_model.__class__ = Probe
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    try:
        with jax.default_matmul_precision("bfloat16"):
            report = bridge.verify(jax_model, torch_model, x)
            assert jax.config.jax_default_matmul_precision == "bfloat16"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert report.ok, str(report)
    assert seen == {("highest", False)}
    assert torch.backends.cudnn.allow_tf32 == before[1]
    assert "jax bfloat16, torch medium" in str(report)


def test_own_loss_and_optimizer_decide_the_trajectory() -> None:
    jax_model, torch_model = pairs.chain()
    labels = np.array([0, 1, 2, 3])
    losses = (
        lambda y: optax.softmax_cross_entropy_with_integer_labels(y, jnp.asarray(labels)).mean(),
        lambda y: nn.functional.cross_entropy(y, torch.tensor(labels)),
    )
    given = {**pairs.inputs(pairs.chain), "loss": losses, "steps": 2}
    same = (optax.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    report = bridge.verify(jax_model, torch_model, **given, optimizer=same)
    assert report.ok, str(report)
    expected = nn.functional.cross_entropy(torch_model(torch.tensor(given["inputs"])), torch.tensor(labels)).item()
    (first,) = (row for row in report.rows if row.path == "after 0 steps")
    assert first.figures.b == pytest.approx(expected, rel=1e-6)
    # torch's and optax's default weight decay of AdamW.
    other = (optax.adamw(1e-3), torch.optim.AdamW)
    report = bridge.verify(jax_model, torch_model, **given, optimizer=other)
    assert not report.ok
    assert list(report.faults) == [""]
    assert {row.check for row in report.rows if not row.ok} <= {"loss", "after 2 steps"}


def test_report_as_table_json_and_page(tmp_path) -> None:
    jax_model, torch_model = pairs.chain()
    torch_model.blocks[1].fc1.weight.data[0, 0] = torch.nan
    report = bridge.verify(jax_model, torch_model, **pairs.inputs(pairs.chain))
    assert not report
    assert report.exit_status == 1
    assert "FAULT in blocks.1.fc1" in str(report)
    stored = json.loads(report.to_json(tmp_path / "report.json"), parse_constant=pytest.fail)
    assert stored == json.loads((tmp_path / "report.json").read_text())
    assert stored["ok"] is False
    assert list(stored["faults"]) == ["blocks.1.fc1"]
    assert len(stored["rows"]) == len(report.rows)
    assert {"python", "versions", "devices", "matmul precision", "x64 in jax", "threads", "seed"} <= set(
        stored["header"]
    )
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    assert page.count("<tr") == len(report.rows) + 1
    assert page.count('class="bad"') == sum(not row.ok for row in report.rows)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["report.html", "report.json"]
    assert "SNR dB" not in str(report)
    assert len(report.table(full=True).splitlines()) == len(report.rows) + 2
    assert "SNR dB" in report.table(full=True)


def test_a_report_of_fifty_layers_reads_in_a_terminal() -> None:
    figures = compare(np.zeros(2), np.ones(2))
    rows = [
        Row("layer value", f"blocks.{i}", f"blocks.{i}", (2,), "float32", figures, i < 10, f"wrong {i}; tolerance 8·x")
        for i in range(50)
    ]
    faults = {f"blocks.{i}": "wrong" for i in (10, 11)}
    text = str(bridge.Report({"seed": 0}, rows, faults)).splitlines()
    assert text[:4] == ["seed: 0", "", "FAULT in blocks.10: wrong", "FAULT in blocks.11: wrong"]
    assert text[-1] == "DIFFERENT: 40 of 50 comparisons fail"
    assert len(text) < 40
    assert text[5].split()[-1] == "why"
    assert text[7].endswith("DIFFERENT  wrong 10")
    assert "and 20 more that fail" in text[-3]


def test_outputs_that_are_nan_in_both_are_no_proof():
    jax_model, torch_model = pairs.chain()
    torch_model.head.bias.data[0] = torch.nan
    bridge.convert(torch_model, jax_model)
    report = bridge.verify(jax_model, torch_model, **pairs.inputs(pairs.chain))
    assert "output 0 holds NaN in both models: of those elements nothing is proved" in str(report)
    assert not report.ok


def test_logits_are_compared_as_distributions() -> None:
    jax_model, torch_model = pairs.chain()
    torch_model.head.bias.data[2] += 100
    report = bridge.verify(jax_model, torch_model, **pairs.inputs(pairs.chain))
    figures = {name.rpartition(": ")[2]: value for name, value in report.logits.items()}
    assert figures["KL divergence in nats"] > 10
    assert figures["top-1 agreement"] < 1
    assert figures["top-5 agreement"] == 1
    assert all(math.isfinite(value) for value in figures.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"torch_model": nnx.Linear(1, 1, rngs=nnx.Rngs(0))}, TypeError, "torch_model"),
        ({"torch_model": nn.Linear(8, 5)}, ValueError, "do not correspond"),
        ({"inputs": [1.0]}, ValueError, "inputs"),
        ({"inputs": np.full((4, 8), np.nan, np.float32)}, ValueError, r"inputs\[0\] holds NaN"),
        ({"inputs": np.ones((4, 8))}, ValueError, r"inputs\[0\] is float64"),
        ({"steps": -1}, ValueError, "steps"),
    ],
)
def test_bad_arguments(change: dict, error: type, message: str) -> None:
    jax_model, torch_model = pairs.chain()
    given = {"jax_model": jax_model, "torch_model": torch_model, **pairs.inputs(pairs.chain), **change}
    with pytest.raises(error, match=message):
        bridge.verify(**given)


class JaxCalled(nnx.Module):
    """Takes keywords, gives a dict, and holds a configuration that cannot be hashed."""

    def __init__(self) -> None:
        self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.config = nnx.static({"sizes": [1, 2]})

    def __call__(self, x: jax.Array, *, mask: jax.Array, doubled: bool = False) -> dict[str, jax.Array]:
        y = self.fc(x) * mask * (1 + doubled)
        return {"logits": y, "score": y.sum(-1)}


class TorchCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, pair: dict[str, torch.Tensor], doubled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(pair["x"]) * pair["mask"] * (1 + doubled)
        return y.sum(-1), y


CHOSEN = {"logits": "1", "score": "0"}


def called(**change: object) -> bridge.Report:
    jax_model = JaxCalled()
    torch_model = bridge.convert(jax_model, TorchCalled())
    x, mask = np.ones((2, 4), np.float32), np.array([True, False, True, True])
    given = {"inputs": bridge.Inputs(x, mask=mask, doubled=True), "outputs": CHOSEN}
    pair = {"pair": {"x": x, "mask": mask}, "doubled": change.pop("doubled", True)}
    return bridge.verify(jax_model, torch_model, **{**given, "torch_inputs": pair, **change})


def test_models_are_called_each_in_its_own_way() -> None:
    report = called(steps=1)
    assert report.ok, str(report)
    assert {row.path for row in report.rows if row.check == "value"} == {"output 0", "output 1"}
    assert not called(doubled=False)


def test_without_training_there_are_no_gradients_of_the_whole_model() -> None:
    checks = {row.check for row in called(training=False).rows}
    assert "layer alone: value" in checks
    assert not {"loss", "gradient"} & checks


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outputs": None}, ValueError, "outputs="),
        ({"outputs": {"logits": "7"}}, ValueError, "torch_model gives no floating-point result '7', but '0', '1'"),
        ({"training": False, "steps": 2}, ValueError, "steps=2 needs training=True"),
        ({"inputs": bridge.Inputs(flag=True)}, ValueError, "inputs must hold an array"),
        ({"inputs": {"x": np.full(4, np.nan, np.float32)}}, ValueError, r"inputs\['x'\] holds NaN"),
    ],
)
def test_calls_that_make_no_sense(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        called(**change)


def test_an_error_says_which_side_was_called_with_what() -> None:
    with pytest.raises(TypeError) as caught:
        called(inputs=bridge.Inputs(np.ones((2, 4), np.float32), wrong=1))
    assert caught.value.__notes__ == ["jax_model was called with [0] float32[2, 4], ['wrong'] 1"]
    with pytest.raises(RuntimeError) as caught:
        called(torch_inputs={"pair": {"x": np.ones((2, 3), np.float32), "mask": np.ones(4, bool)}})
    (note,) = caught.value.__notes__
    assert note.startswith("torch_model was called with ['pair.x'] float32[2, 3]")
    assert note.endswith(", and failed in fc (Linear)")


class _Unpullable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way back")


def test_an_error_on_the_way_back_says_which_layer() -> None:
    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y if y.dtype == torch.float64 else _Unpullable.apply(y)

    jax_model, torch_model = pairs.chain()
    torch_model.blocks[1].fc1.__class__ = Linear
    with pytest.raises(RuntimeError, match="no way back") as caught:
        bridge.verify(jax_model, torch_model, **pairs.inputs(pairs.chain), training=False)
    assert "torch blocks.1.fc1 or jax blocks.1.fc1 was run alone" in caught.value.__notes__[-1]
