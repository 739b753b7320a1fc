"""Checkpoints: bit for bit, onto another mesh, and whole whatever happens."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mhc_jax.models import Decoder, DecoderConfig
from mhc_jax.nn import MHCStack
from mhc_jax.training import TrainState, make_train_step
from mhc_jax.training.checkpoint import (
    discard,
    latest,
    numbered,
    read_metadata,
    restore,
    restore_part,
    save,
    start_saving,
)
from mhc_jax.training.sharding import data_mesh, fully_sharded, replicated


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(16, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.tanh(self.linear(x)))


OPTIMIZER = optax.adam(1e-2)


def new_state(seed):
    return TrainState.create(MHCStack(Block, 3, use_gating=True, rngs=nnx.Rngs(seed)), OPTIMIZER)


def loss_fn(model, x):
    return jnp.mean(model(x) ** 2), {}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    x = jax.random.normal(jax.random.key(0), (4, 16))
    step = make_train_step(loss_fn, OPTIMIZER)
    state = new_state(0)
    for _ in range(2):
        state, _ = step(state, x)
    save(tmp_path / "2", state)
    for _ in range(2):
        state, metrics = step(state, x)

    resumed = restore(tmp_path / "2", like=new_state(1))
    for _ in range(2):
        resumed, resumed_metrics = step(resumed, x)
    assert_equal(resumed, state)
    assert_equal(resumed_metrics, metrics)


def test_a_module_comes_back_and_the_one_given_stays(tmp_path):
    saved, like = (MHCStack(Block, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    before = jnp.array(like.layers.linear.kernel[...])
    save(tmp_path / "model", saved)
    restored = restore(tmp_path / "model", like)
    assert_equal(nnx.state(restored), nnx.state(saved))
    np.testing.assert_array_equal(like.layers.linear.kernel[...], before)


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    state = new_state(0)
    sharded = jax.device_put(state, fully_sharded(state, data_mesh()))
    save(tmp_path / "1", sharded)
    small = Mesh(np.array(jax.devices()[:2]), ("data",))
    for like in (
        new_state(1),
        jax.device_put(new_state(1), fully_sharded(state, small)),
        jax.device_put(new_state(1), replicated(state, data_mesh())),
    ):
        restored = restore(tmp_path / "1", like)
        assert_equal(restored, state)
        for new, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert new.sharding.is_equivalent_to(wanted.sharding, new.ndim)


def test_shapes_alone_say_what_to_restore(tmp_path):
    sharding = NamedSharding(data_mesh(), PartitionSpec("data"))
    save(tmp_path / "1", {"a": jnp.arange(8.0)})
    restored = restore(tmp_path / "1", {"a": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)})
    assert restored["a"].sharding == sharding
    np.testing.assert_array_equal(restored["a"], np.arange(8.0))


def test_the_files_are_plain_orbax_with_the_names_of_the_tree(tmp_path):
    save(
        tmp_path / "1",
        {"bf16": jnp.ones(3, jnp.bfloat16), "numpy": np.arange(3), "model": MHCStack(Block, 2, rngs=nnx.Rngs(0))},
    )
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "1")
    assert tree["bf16"].dtype == jnp.bfloat16
    assert tree["numpy"].dtype == np.int64
    assert tree["model"]["layers"]["linear"]["kernel"].shape == (2, 16, 16)


def test_the_latest_is_the_highest_number_that_is_complete(tmp_path):
    for step in (9, 10):
        save(tmp_path / str(step), {"step": jnp.int32(step)})
    (tmp_path / "11").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) == tmp_path / "10"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        latest(tmp_path / "notes")


def process_that_saves(path):
    """A process in the middle of a save of 400 MB."""
    script = (
        "import sys, jax.numpy as jnp\n"
        "from mhc_jax.training.checkpoint import save\n"
        "tree = {str(i): jnp.full((1024, 1024), float(i)) for i in range(100)}\n"
        "save(sys.argv[1], tree)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=subprocess.DEVNULL)
    while not list(path.parent.glob("2*/*")):  # its folder is locked by then
        assert process.poll() is None, "the save ended before it could be interrupted"
        time.sleep(0.001)
    return process


def test_an_interrupted_save_leaves_the_earlier_checkpoint_whole(tmp_path):
    save(tmp_path / "1", {"a": jnp.arange(4.0)})
    process = process_that_saves(tmp_path / "2")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.glob("2*")) != [tmp_path / "2"], "the save ended before it could be interrupted"

    assert latest(tmp_path) == tmp_path / "1"
    np.testing.assert_array_equal(restore(tmp_path / "1", {"a": jnp.zeros(4)})["a"], np.arange(4.0))
    save(tmp_path / "2", {"a": jnp.arange(5.0)})
    np.testing.assert_array_equal(restore(latest(tmp_path), {"a": jnp.zeros(5)})["a"], np.arange(5.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"], "what the killed save left is still there"


def test_a_save_that_goes_on_is_not_taken_for_a_dead_one(tmp_path):
    process = process_that_saves(tmp_path / "2")
    os.kill(process.pid, signal.SIGSTOP)
    save(tmp_path / "1", {"a": jnp.arange(4.0)})
    assert len(list(tmp_path.iterdir())) == 2
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_of_several_that_save_one_path_at_once_one_succeeds(tmp_path):
    script = (
        "import sys, threading, jax.numpy as jnp\n"
        "from mhc_jax.training.checkpoint import save\n"
        "def attempt(path, value):\n"
        "    try:\n"
        "        save(path, {str(i): jnp.full(100_000, value) for i in range(20)})\n"
        "        print('saved', path[-1], value, flush=True)\n"
        "    except FileExistsError:\n"
        "        pass\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for path in '0123':\n"
        "    threads = [threading.Thread(target=attempt, args=(f'{sys.argv[1]}/{path}', float(sys.argv[2]) + i))\n"
        "               for i in range(2)]\n"
        "    for thread in threads: thread.start()\n"
        "    for thread in threads: thread.join()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    savers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path), value], **pipes) for value in ("10", "20")]
    assert [saver.stdout.readline() for saver in savers] == ["ready\n"] * 2
    for saver in savers:
        saver.stdin.write("go\n")
        saver.stdin.flush()
    saved = [line.split()[1:] for saver in savers for line in saver.communicate(timeout=120)[0].splitlines()]
    assert sorted(path for path, _ in saved) == ["0", "1", "2", "3"], "one of them must win, and only one"
    for path, value in saved:
        restored = restore(tmp_path / path, {str(i): jnp.zeros(100_000) for i in range(20)})
        for array in restored.values():
            np.testing.assert_array_equal(array, float(value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]


def test_whatever_does_not_match_is_listed(tmp_path):
    save(tmp_path / "1", {"a": jnp.zeros(3), "b": {"c": jnp.zeros(2)}})
    like = {"a": jnp.zeros(4, jnp.bfloat16), "d": jnp.zeros(1)}
    with pytest.raises(
        ValueError, match=r"a was saved as float32.3., and like has bfloat16.4.; b/c .*only; d is not in"
    ):
        restore(tmp_path / "1", like)
    with pytest.raises(FileExistsError, match="never written over"):
        save(tmp_path / "1", {"a": jnp.zeros(3)})
    np.testing.assert_array_equal(
        restore(tmp_path / "1", {"a": jnp.ones(3), "b": {"c": jnp.ones(2)}})["a"], np.zeros(3)
    )
    with pytest.raises(TypeError, match="'step' is 3 of type int"):
        save(tmp_path / "2", {"step": 3})
    with pytest.raises(ValueError, match=r"'e' of shape \(0,\) is empty"):
        save(tmp_path / "2", {"e": jnp.zeros(0)})
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        restore(tmp_path / "2", {})


def test_without_x64_double_precision_is_refused_and_not_truncated(tmp_path):
    with jax.enable_x64(True):
        tree = {"a": jnp.arange(3.0) / 3}
        save(tmp_path / "1", tree)
        assert_equal(restore(tmp_path / "1", tree), tree)
    with pytest.raises(ValueError, match="a was saved as float64"):
        restore(tmp_path / "1", tree)


def test_a_save_in_the_background_has_what_was_given_to_it(tmp_path):
    step = make_train_step(loss_fn, OPTIMIZER)
    state = new_state(0)
    before = jax.tree.map(np.asarray, state.params)
    saving = start_saving(tmp_path / "0", state, metadata={"position": 3})
    state, _ = step(state, jnp.ones((4, 16)))  # which donates it
    saving.wait()
    assert_equal(restore(tmp_path / "0", state).params, before)
    assert read_metadata(tmp_path / "0") == {"position": 3}
    with pytest.raises(FileExistsError, match="never written over"):
        start_saving(tmp_path / "0", state)
    save(tmp_path / "1", state)  # nothing is locked
    assert read_metadata(tmp_path / "1") == {}


def test_a_full_disk_is_one_error_and_leaves_the_earlier_checkpoint(tmp_path):
    script = (
        "import resource, sys, jax, jax.numpy as jnp\n"
        "from mhc_jax.training.checkpoint import save\n"
        "save(f'{sys.argv[1]}/1', {'a': jnp.arange(4.0)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n"
        "    save(f'{sys.argv[1]}/2', {'a': jax.random.normal(jax.random.key(0), (1_000_000,))})\n"
        "except OSError as error:\n"
        "    print(error)\n"
        "save(f'{sys.argv[1]}/3', {'a': jnp.arange(5.0)})\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert f"path: {tmp_path}/2 could not be written: File too large" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    np.testing.assert_array_equal(restore(tmp_path / "1", {"a": jnp.zeros(4)})["a"], np.arange(4.0))


def test_a_residual_checkpoint_goes_on_as_streams(tmp_path):
    sizes = DecoderConfig(8, features=4, mlp_features=4, depth=2, num_heads=1)
    residual = Decoder(sizes, rngs=nnx.Rngs(0))
    save(tmp_path / "0", {"params": residual, "step": jnp.int32(3)})
    like = Decoder(sizes, "streams", streams=2, rngs=nnx.Rngs(1))
    part = restore_part(tmp_path / "0", {"params": nnx.state(like, nnx.Param)})
    names = ("alpha", "bias", "phi")
    assert part.new == tuple(
        f"params/stack/layers/{hc}/{name}/value" for hc in ("attn_hc", "ffn_hc") for name in names
    ) or part.new == tuple(f"params/stack/layers/{hc}/{name}" for hc in ("attn_hc", "ffn_hc") for name in names)
    assert part.unused == ("params/stack/mixing_logits", "step") or part.unused == ("step",)
    nnx.update(like, part.tree["params"])
    tokens = jnp.arange(6)[None]
    np.testing.assert_allclose(like(tokens), residual(tokens), atol=2e-3)
    other = Decoder(DecoderConfig(8, features=6, mlp_features=4, depth=2, num_heads=1), rngs=nnx.Rngs(1))
    with pytest.raises(
        ValueError, match=r"embed_tokens/embedding was saved as float32.8, 4., and like has float32.8, 6"
    ):
        restore_part(tmp_path / "0", {"params": other})
    with pytest.raises(ValueError, match="no name in common"):
        restore_part(tmp_path / "0", {"other": jnp.zeros(1)})


def test_what_is_discarded_is_gone(tmp_path):
    for number in (1, 2):
        save(tmp_path / str(number), {"a": jnp.zeros(1)})
    discard(tmp_path / "2")
    assert numbered(tmp_path) == [tmp_path / "1"]
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        discard(tmp_path / "2")
