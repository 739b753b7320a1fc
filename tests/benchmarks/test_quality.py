"""The quality study: a run is what a plain loop gives, what is recorded is not run again, a report follows from it."""

import json
import time

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from benchmarks.quality import protocol, report, study, train, watch
from benchmarks.quality.arms import ARMS, network
from benchmarks.quality.record import Key, Record, key, trains, tuned
from mhc_jax.nn import ConnectionParam

SIZES = protocol.QUICK.main.sizes


def plain_loop(arm, sizes, seed, rate):
    """The last loss of held-out text, step by step with optax's Adam."""
    model = network(arm, sizes, seed)
    schedule = jnp.array([rate * min((i + 1) / sizes.warmup, 1) * (1 - i / sizes.steps) for i in range(sizes.steps)])

    def adam(factor):
        return optax.adam(lambda count: factor * schedule[count])

    def is_variable(leaf):
        return isinstance(leaf, nnx.Variable)

    of_maps = jax.tree.map(
        lambda leaf: isinstance(leaf, ConnectionParam), nnx.state(model, nnx.Param), is_leaf=is_variable
    )
    kinds = {True: adam(arm.maps_rate), False: adam(1.0)}
    optimizer = nnx.Optimizer(model, optax.multi_transform(kinds, of_maps), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        optimizer.update(model, nnx.grad(lambda model: model.loss(tokens))(model))

    for tokens in protocol.windows(protocol.TRAINED, seed, sizes.length, sizes.steps, sizes.batch):
        step(model, optimizer, tokens)
    held_out = protocol.windows(protocol.HELD_OUT, 0, sizes.length, sizes.held_out)
    return nnx.jit(lambda model: model.loss(held_out))(model) / np.log(2)


def test_a_run_is_the_one_of_a_plain_loop():
    arm = ARMS["mHC, maps at 10 times the rate"]
    run = train.train(arm, SIZES, 3, 0.01)
    np.testing.assert_allclose(run["loss"], plain_loop(arm, SIZES, 3, 0.01), rtol=1e-5)
    assert run["loss"] != train.train(arm, SIZES, 4, 0.01)["loss"]
    assert json.loads(json.dumps(run)) == run
    assert train.train(arm, SIZES, 3, 0.01) == run


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_makes_a_network_of_whole_heads_and_stretches(name):
    sizes = ARMS[name].sized(protocol.FULL.main.sizes)
    assert sizes.steps % sizes.every == 0
    model = nnx.eval_shape(lambda: network(ARMS[name], sizes, 0))
    assert model.embed_tokens.embedding.shape == (256, sizes.width)


def run_of(part, arm, seed, rate, loss):
    return {**Key(part, arm, seed, rate)._asdict(), "loss": loss}


@pytest.fixture
def trained(monkeypatch):
    """Keys of the runs that were made, by a training whose best rate is 0.04."""
    made = []

    def one(arm, sizes, seed, rate):
        made.append((arm, seed, rate))
        return {"loss": 3 + abs(np.log2(rate / 0.04)), "patterns": {}}

    monkeypatch.setattr(study, "train", one)
    return made


def test_what_is_recorded_is_not_run_again(tmp_path, trained):
    path = tmp_path / "record.json"
    study.study(Record(path), protocol.FULL, ["fewer"], until=np.inf)
    first = list(trained)
    content = json.loads(path.read_text())
    assert len(content["runs"]) == len(first)
    # The best of 0.005, 0.01 and 0.02 is the largest, so is then 0.04, and 0.08 ends the search.
    assert {run["rate"] for run in content["runs"] if run["part"] == "tuning"} == {0.005, 0.01, 0.02, 0.04, 0.08}
    assert {run["rate"] for run in content["runs"] if run["part"] == "arms"} == {0.04}
    assert ["patterns" in run for run in content["runs"] if run["arm"] == "HC, n = 2" and run["part"] == "arms"] == [
        True,
        *[False] * 4,
    ]
    study.study(Record(path), protocol.FULL, ["fewer"], until=np.inf)
    assert trained == first
    # A record that was cut off goes on where it ends.
    content["runs"] = content["runs"][:-5]
    path.write_text(json.dumps(content))
    study.study(Record(path), protocol.FULL, ["fewer"], until=np.inf)
    assert trained[len(first) :] == first[-5:]


def test_no_run_begins_when_the_time_is_over(tmp_path, trained, capsys):
    study.study(Record(tmp_path / "record.json"), protocol.FULL, ["fewer"], until=time.monotonic() - 1)
    assert not trained
    assert "out of time" in capsys.readouterr().out


def test_the_largest_rate_is_the_last_that_trains(tmp_path, monkeypatch):
    record = Record(tmp_path / "record.json")
    chance = record.content["bits of byte frequencies"]
    limits = {"residual": 0.05, "HC": 0.006}

    def one(arm, sizes, seed, rate):
        limit = next((limits[name] for name in limits if ARMS[name] == arm), 0.02)
        return {"loss": chance - 1 if rate <= limit else None}

    monkeypatch.setattr(study, "train", one)
    study.study(record, protocol.FULL, ["depth 100"], until=np.inf)
    assert report.largest_rates(record.content, "100 branches", "residual") == [0.032] * 3
    assert report.largest_rates(record.content, "100 branches", "HC") == [0.004] * 3
    assert report.largest_rates(record.content, "100 branches", "mHC") == [0.016] * 3
    assert not trains(record.content, {"loss": chance})


def test_the_mean_of_largest_rates_is_over_those_that_train():
    rates = [0.02, 0.02, 0.04, 0.04, 0.08]
    low, high = np.exp(stats.ttest_1samp(np.log(rates), 0).confidence_interval())
    assert report.geometric([*rates, 0.0]) == f"0.035 ({low:.2g} to {high:.2g})"
    assert report.geometric([0.02, 0.0, 0.04]) == "0.028"
    assert report.geometric([0.0, 0.0]) == "—"


def test_a_record_of_another_text_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"text": "another", "runs": []}))
    with pytest.raises(ValueError, match="another text"):
        Record(path)


def test_a_check_finds_what_differs(tmp_path, monkeypatch):
    record = Record(tmp_path / "record.json")
    arm = "residual"
    run = {"threads": study.threads()} | train.train(ARMS[arm], SIZES, 0, 0.01)
    record.add([Key(part, arm, 0, 0.01)._asdict() | run for part in ("arms", "long")])
    for part in ("arms", "long"):
        assert study.differences(record, arm, 0, part, protocol.QUICK) == []
    record.content["runs"][0]["loss"] += 1e-5
    (found,) = study.differences(record, arm, 0, protocol=protocol.QUICK)
    assert found.startswith("loss: recorded")
    record.content["runs"][0]["threads"] += 1
    with pytest.raises(ValueError, match="set NPROC="):
        study.differences(record, arm, 0, protocol=protocol.QUICK)
    with pytest.raises(ValueError, match="no run of 'residual' from seed 1"):
        study.differences(record, arm, 1, protocol=protocol.QUICK)


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, 5)
    gain = rng.normal(-0.1, 0.01, 5)
    runs = [run_of("arms", "residual", seed, 0.01, base[seed]) for seed in range(5)]
    runs += [run_of("arms", "mHC", seed, 0.02, base[seed] + gain[seed]) for seed in reversed(range(5))]
    mean, half = report.paired({"runs": runs}, "mHC", "residual", "arms")
    low, high = stats.ttest_1samp(gain, 0).confidence_interval()
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert report.shown((mean, half)).startswith("**-0.")
    assert report.shown((0.1, 0.2)) == "+0.100 ± 0.200"
    runs[0]["loss"] = None
    assert report.shown(report.paired({"runs": runs}, "mHC", "residual", "arms")) == "-inf ± inf"


def test_what_is_gained_is_worth_steps():
    runs = [
        run_of("arms", arm, seed, 0.01, loss) for seed in range(3) for arm, loss in (("residual", 3.0), ("HC", 2.9))
    ]
    assert report.steps_worth({"runs": runs}, "HC") is None
    runs += [run_of("arms", "residual, longer", seed, 0.01, 2.8) for seed in range(3)]
    np.testing.assert_allclose(report.steps_worth({"runs": runs}, "HC"), 1.7**0.5)


def test_tuning_takes_the_best_rate_and_knows_an_edge():
    losses = {0.005: (3.0, None), 0.01: (3.2, 3.2), 0.02: (3.1, 3.4)}
    runs = [run_of("tuning", "HC", seed, rate, loss) for rate, pair in losses.items() for seed, loss in enumerate(pair)]
    assert tuned({"runs": runs}, "HC") == (0.01, True)
    assert tuned({"runs": runs[2:]}, "HC") == (0.01, False)
    assert key(runs[0]) == ("tuning", "HC", 0, 0.005)


def test_rank_and_similarity_of_streams():
    equal = jnp.ones((1, 4, 8))
    apart = jnp.eye(4, 8)[None]
    np.testing.assert_allclose(watch.rank(jnp.concatenate([equal, apart])), [1, 4], rtol=1e-4)
    np.testing.assert_allclose(watch.similarity(jnp.concatenate([equal, apart, equal * -1])), [1, 0, 1], atol=1e-6)


def test_a_quick_study_is_reported(tmp_path):
    record = Record(tmp_path / "record.json")
    study.study(record, protocol.QUICK, study.PARTS, until=np.inf)
    records = {report.RESULT.name: json.loads(record.path.read_text())}
    assert [line.split(" | ")[0] for line in report.arms_table(records).splitlines()[2:]] == [
        f"| {n}" for n in protocol.QUICK.arms
    ]
    assert len(report.maps_table(records).splitlines()) == 3
    assert len(report.depth_table(records).splitlines()) == 2 + 2 * len(protocol.FULL.deep)
    assert len(report.TABLES["long"](records).splitlines()) == 2 + 1
    assert len(report.TABLES["deep"](records).splitlines()) == 2 + 2
    for draw, result, figure in report.figures(records):
        draw(records[result.name], tmp_path / figure.name)
        assert matplotlib.image.imread(tmp_path / figure.name).ndim == 3


def test_nothing_recorded_is_said_to_be():
    assert not report.figures({})
    assert {table({}) for table in report.TABLES.values()} == {"Not recorded yet.\n"}
