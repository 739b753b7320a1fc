"""What is read from a compiled program, what a search tries, and what is refused."""

import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from mhc_jax.models import DecoderConfig
from mhc_jax.training import plan
from mhc_jax.training.assembly import assemble
from mhc_jax.training.config import DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from mhc_jax.training.sharding import data_mesh

PROGRAM = """
%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %e = f32[8]{0} exponential(%p), backend_config={"estimated_cycles":"1000"}
}
%layer (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]) parameter(0)
  %g = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), dimensions={0}, backend_config={"estimated_cycles":"3"}
  %d = bf16[16,8]{1,0} all-gather-done(%g)
  %f = f32[8]{0:T(8,128)S(1)} fusion(%d), kind=kLoop, calls=%inner, backend_config={"a":{"estimated_cycles":"20"}}
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %d)
}
%until (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %c = pred[] compare(%i, %limit), direction=LT
}
%summed (p: f32[64]) -> f32[16] {
  %r = f32[64]{0} all-reduce(%p), to_apply=%add
  ROOT %s = f32[16]{0} dynamic-slice(%r)
}
ENTRY %main (x: bf16[4,8]) -> f32[16] {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = (s32[], bf16[4,8]) while(%x), condition=%until, body=%layer
  ROOT %u = f32[16]{0} fusion(%w), kind=kCustom, calls=%summed, backend_config={"estimated_cycles":"5"}
}
"""


def test_loops_count_as_often_as_they_run_and_what_is_fused_counts_once():
    cycles, collectives = plan.read(PROGRAM)
    assert cycles == 6 * (3 + 20) + 5
    assert collectives == {"all-gather": (6, 6 * 16 * 8 * 2), "all-reduce": (1, 64 * 4)}


def test_a_search_changes_what_is_kept_and_where_and_not_the_function():
    sizes = DecoderConfig(256, features=8, mlp_features=8, depth=6, num_heads=4)
    given = TrainingConfig(model=ModelConfig(sizes))
    configs = [config for _, config in plan.search(given)]
    assert {config.model.block_length for config in configs} == {1, 2}
    placed = {(config.placement, config.tensor, config.sequence) for config in configs}
    assert placed == set(plan.PLACED)
    assert len({(c.model.remat, c.model.block_length, c.placement, c.tensor, c.sequence) for c in configs}) == 40
    assert len(configs) == 40
    assert all((c.model.sizes, c.model.streams, c.data) == (sizes, given.model.streams, given.data) for c in configs)
    # Three heads are not shared by four devices.
    odd = TrainingConfig(model=ModelConfig(replace(sizes, num_heads=3, head_dim=2)))
    assert {config.tensor for _, config in plan.search(odd)} == {1}


@pytest.mark.parametrize("connection", ["residual", "streams"])
def test_what_is_kept_for_the_backward_pass_is_the_states_and_what_remat_names(connection):
    sizes = DecoderConfig(44, features=32, mlp_features=56, depth=4, num_heads=4, head_dim=6)
    length, batch = 16, 8
    state = batch * length * sizes.features * 4 // jax.device_count()

    def kept(remat, accumulate=1):
        model = ModelConfig(sizes, connection=connection, remat=remat)
        optimizer = OptimizerConfig(accumulate=accumulate)
        data = DataConfig(length=length, batch=batch * accumulate)
        assembly = assemble(TrainingConfig(model=model, data=data, optimizer=optimizer), data_mesh())
        tokens = jax.ShapeDtypeStruct((batch * accumulate, length + 1), np.int32)
        return plan.kept_for_backward(assembly, {"tokens": tokens, "segments": tokens})

    least = kept(())
    streams = 1 if connection == "residual" else 4
    assert 4 * streams * state <= least < 4 * (streams + 5) * state
    assert kept(("attention_out",)) == least + sizes.depth * state
    assert kept(None) > 2 * least
    assert kept((), accumulate=2) == pytest.approx(least, rel=1e-2)


def test_without_libtpu_it_is_one_line(tmp_path, monkeypatch, capsys):
    file = tmp_path / "config.py"
    file.write_text("from mhc_jax.training.config import TrainingConfig\nconfig = TrainingConfig()\n")
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["plan", str(file), "--target", "v5p:2x2x1"])
    assert plan.main() == 1
    assert capsys.readouterr().err == "error: the plan needs the compiler of TPUs: pip install libtpu\n"


def test_a_plan_says_whether_it_fits():
    memory = {"parameters": 2**30, "kept for backward": 2**31}
    said = str(plan.Plan("", memory, 0.25, 1e12, 0.5, {"all-reduce": (3, 2**20)}))
    for part in (
        "fits: 3.00 GiB",
        "parameters             1.00 GiB",
        "kept for backward      2.00 GiB",
        "0.25 s",
        "50.0% of the peak",
        "all-reduce: 3 a step, 1.0",
    ):
        assert part in said
    assert str(plan.Plan("Used 110G of 95G hbm")) == "does not fit: Used 110G of 95G hbm"


@pytest.mark.skipif(plan.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_topology_needs_libtpu():
    with pytest.raises(ModuleNotFoundError, match="pip install libtpu"):
        plan.plan(TrainingConfig(), "v5p:2x2x1")
