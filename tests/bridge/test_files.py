"""Files: every bit of every dtype comes back; damage is noticed; an interrupted write leaves the old file whole."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import mhc
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import bridge
import mhc_jax.nn as jax_mhc
import mhc_jax.training.checkpoint
import mhc_torch as torch_mhc
from bridge.weights.arrays import to_jax, to_torch
from bridge.weights.formats import open_file
from tests.bridge.models import JaxModel, TorchModel, equal, randomize

FORMATS = (".safetensors", ".pt", ".orbax")
DTYPES = [
    *(
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    ),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, "complex64", "bool"),
]


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@st.composite
def arrays(draw):
    """Random bits (NaN payloads, infinities, denormals) of any dtype and shape, contiguous or not."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (bits % 2).astype(bool) if dtype.kind == "b" else bits.view(dtype)
    array = array.reshape(shape)
    if draw(st.booleans()):
        array = array.T
    if array.ndim and draw(st.booleans()):
        array = np.repeat(array, 2, axis=0)[::2]
    return array


@pytest.mark.parametrize("suffix", FORMATS[:2])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text("ab.é ", min_size=1, max_size=5), arrays(), max_size=4))
def test_any_arrays_come_back_bit_for_bit(tmp_path, suffix, given_arrays):
    path = tmp_path / f"x{suffix}"
    bridge.save(path, given_arrays)
    loaded = bridge.load(path)
    assert loaded.keys() == given_arrays.keys()
    assert all(same_bits(loaded[name], array) for name, array in given_arrays.items())


@pytest.fixture
def zoo():
    """One array of each dtype, and of each awkward shape."""
    generator = np.random.default_rng(0)
    found = {}
    for dtype in map(np.dtype, DTYPES):
        bits = generator.integers(0, 2 if dtype.kind == "b" else 256, 6 * dtype.itemsize, np.uint8)
        found[f"dtype.{dtype.name}"] = bits.view(dtype).reshape(2, 3)
    found |= {"shape.scalar": np.array(1.5, np.float32), "shape.empty": np.zeros((0, 3), np.int16)}
    return found | {"shape.transposed": np.arange(6.0).reshape(2, 3).T, "shape.strided": np.arange(9)[::2]}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_every_dtype_from_every_framework(tmp_path, suffix, kind, zoo):
    as_kind = {"numpy": lambda x: x, "torch": to_torch, "jax": to_jax}[kind]
    bridge.save(tmp_path / f"x{suffix}", {name: as_kind(array) for name, array in zoo.items()})
    loaded = bridge.load(tmp_path / f"x{suffix}")
    assert loaded.keys() == zoo.keys()
    assert all(same_bits(loaded[name], array) for name, array in zoo.items())


def test_the_libraries_of_the_formats_read_what_is_written(tmp_path, zoo):
    bridge.save(tmp_path / "x.safetensors", zoo)
    bridge.save(tmp_path / "x.pt", zoo)
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    pickled = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, array in zoo.items():
        for tensor in (theirs[name], pickled[name]):
            assert same_bits(bridge.weights.arrays.to_numpy(tensor), array), name


def test_files_that_the_libraries_write_are_read(tmp_path):
    tensors = {"a.b": torch.randn(3, 4, dtype=torch.bfloat16), "c": torch.arange(3)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"any": "metadata"})
    torch.save(tensors, tmp_path / "x.pt")
    torch.save({"state_dict": tensors, "epoch": 3, "loops": {}}, tmp_path / "lightning.ckpt")
    with ocp.StandardCheckpointer() as checkpointer, jax.enable_x64(True):
        tree = {"a": {"b": jnp.ones(3, jnp.float64) / 3}, "list": [jnp.zeros(2), jnp.ones(2)]}
        checkpointer.save(tmp_path / "orbax", tree)
    for name in ("x.safetensors", "x.pt", "lightning.ckpt"):
        loaded = bridge.load(tmp_path / name)
        assert {key: to_torch(x).tolist() for key, x in loaded.items()} == {k: t.tolist() for k, t in tensors.items()}
    loaded = bridge.load(tmp_path / "orbax")  # x64 is off: no bit of a float64 may be lost
    assert same_bits(loaded["a.b"], np.ones(3) / 3)
    assert set(loaded) == {"a.b", "list.0", "list.1"}


# ---- what others save ------------------------------------------------------------------------------------------------


def trained():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


def steps_of(model):
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "saved",
    [
        lambda model: {"model": model.state_dict(), "optimizer": steps_of(model)},
        lambda model: {"state_dict": model.state_dict()},
        lambda model: {"epoch": 3, "model_state_dict": model.state_dict()},
        lambda model: {"params": dict(model.state_dict())},
        lambda model: torch.nn.DataParallel(model).state_dict(),
        lambda model: torch.compile(model).state_dict(),
        lambda model: {"steps": 3, "model": torch.nn.DataParallel(torch.compile(model)).state_dict()},
        lambda model: {f"{i}._orig_mod.{k}": x for i in "01" for k, x in model[int(i)].state_dict().items()},
    ],
)
def test_names_that_programs_put_around_a_model(tmp_path, saved):
    model = trained()
    torch.save(saved(model), tmp_path / "x.pt")
    fresh = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    loaded = bridge.load(tmp_path / "x.pt", fresh).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


def test_no_name_is_lost_on_the_way(tmp_path):
    state = dict(trained().state_dict())
    torch.save(state | {"module.0.bias": torch.zeros(2)}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"module\.0\.bias.* is in the file only"):
        bridge.load(tmp_path / "twice.pt", trained())
    torch.save({f"model.{name}": x for name, x in state.items() if name != "0.bias"}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"0\.bias.* is not in the file"):
        bridge.load(tmp_path / "less.pt", trained())
    torch.save({"model.0.bias": state["0.bias"], "model.module.0.bias": state["0.bias"] + 1}, tmp_path / "both.pt")
    with pytest.raises(ValueError, match=r"module\.0\.bias.* is in the file only"):
        bridge.load(tmp_path / "both.pt", trained())


def test_folders_of_a_checkpoint_manager(tmp_path):
    linear = lambda seed: nnx.Linear(3, 2, rngs=nnx.Rngs(seed))  # noqa: E731
    model = linear(0)
    with ocp.CheckpointManager(tmp_path / "default") as manager:
        for step in (9, 10):
            model.bias.set_value(jnp.full(2, float(step)))
            manager.save(step, args=ocp.args.StandardSave(nnx.to_pure_dict(nnx.state(model))))
    assert bridge.load(tmp_path / "default", linear(1)).bias[...].tolist() == [10, 10]
    with ocp.CheckpointManager(tmp_path / "named") as manager:
        tree = {"params": {"kernel": {"value": model.kernel[...]}, "bias": {"value": model.bias[...]}}}
        items = {"state": ocp.args.StandardSave(tree | {"step": jnp.arange(3)}), "data": ocp.args.StandardSave(tree)}
        manager.save(1, args=ocp.args.Composite(state=items["state"]))
        manager.save(2, args=ocp.args.Composite(**items))
    loaded = bridge.load(tmp_path / "named" / "1", linear(1))  # of older Flax, and beside a count of steps
    assert equal(loaded, model)
    with pytest.raises(ValueError, match=r"path: .*2 holds several checkpoints \(data, state\)"):
        bridge.load(tmp_path / "named", linear(1))


@pytest.mark.parametrize("shards", ["1GB", "1KB"])
def test_folders_of_transformers(tmp_path, shards):
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = bridge.load(tmp_path)
    assert all(np.array_equal(loaded[name], x) for name, x in model.state_dict().items())


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_models_come_back(tmp_path, suffix):
    source, model = bridge.convert(randomize(TorchModel()), JaxModel()), randomize(TorchModel())
    bridge.save(tmp_path / f"jax{suffix}", source)
    bridge.save(tmp_path / f"torch{suffix}", model)
    assert equal(bridge.load(tmp_path / f"jax{suffix}", JaxModel(seed=1)), source)
    loaded = bridge.load(tmp_path / f"torch{suffix}", TorchModel())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_checkpoint_of_mhc_jax_is_read_and_written(tmp_path):
    source = bridge.convert(randomize(TorchModel()), JaxModel())
    mhc_jax.training.checkpoint.save(tmp_path / "theirs", source)  # keeps the random streams, too
    assert equal(bridge.load(tmp_path / "theirs", JaxModel(seed=1)), source)
    plain = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    bridge.save(tmp_path / "ours", plain)
    assert equal(mhc_jax.training.checkpoint.restore(tmp_path / "ours", nnx.Linear(3, 2, rngs=nnx.Rngs(1))), plain)


@pytest.mark.parametrize("source_suffix", FORMATS)
@pytest.mark.parametrize("target_suffix", FORMATS)
@pytest.mark.parametrize("to", ["jax", "torch"])
def test_files_are_converted_as_models_are(tmp_path, source_suffix, target_suffix, to):
    torch_model = randomize(TorchModel(use_gating=True))
    jax_model = bridge.convert(torch_model, JaxModel(use_gating=True))
    source, target, make = (torch_model, jax_model, JaxModel) if to == "jax" else (jax_model, torch_model, TorchModel)
    bridge.save(tmp_path / f"source{source_suffix}", source)
    abstract = nnx.eval_shape(lambda: JaxModel(use_gating=True))
    with torch.device("meta"):
        meta = TorchModel(use_gating=True)
    counts = []
    path = tmp_path / f"target{target_suffix}"
    bridge.convert_file(
        tmp_path / f"source{source_suffix}", path, abstract, meta, to, lambda done, total: counts.append((done, total))
    )
    found = bridge.load(path, make(use_gating=True))
    if to == "jax":
        assert equal(found, target)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), target.parameters(), strict=True))
    assert counts[-1][0] == counts[-1][1] == sum(p.nbytes for p in torch_model.parameters())


def test_attention_ties_and_batch_counters_in_files(tmp_path):
    class Ours(nnx.Module):
        def __init__(self, seed):
            rngs = nnx.Rngs(seed)
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

    theirs = randomize(Theirs())
    ours = bridge.convert(theirs, Ours(0))
    bridge.save(tmp_path / "torch.safetensors", theirs)
    bridge.convert_file(tmp_path / "torch.safetensors", tmp_path / "jax.safetensors", Ours(1), Theirs(), "jax")
    assert equal(bridge.load(tmp_path / "jax.safetensors", Ours(1)), ours)
    bridge.convert_file(tmp_path / "jax.safetensors", tmp_path / "back.safetensors", Ours(1), Theirs(), "torch")
    back = bridge.load(tmp_path / "back.safetensors", Theirs())
    assert back.head.weight is back.embed.weight
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in theirs.state_dict().items())

    with torch.device("meta"):
        abstract = Theirs()
    with pytest.raises(ValueError, match="num_batches_tracked has no counterpart in the source"):
        bridge.convert_file(tmp_path / "jax.safetensors", tmp_path / "none.safetensors", Ours(1), abstract, "torch")
    assert not (tmp_path / "none.safetensors").exists()

    # A file may leave out the second name of a tied parameter, but must not give it other values.
    state = theirs.state_dict()
    torch.save({name: x for name, x in state.items() if name != "head.weight"}, tmp_path / "one.pt")
    assert torch.equal(bridge.load(tmp_path / "one.pt", Theirs()).head.weight, theirs.head.weight)
    torch.save(state | {"head.weight": state["head.weight"] + 1}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"embed.weight, head.weight are one array in the model, and differ"):
        bridge.load(tmp_path / "two.pt", Theirs())


def test_a_file_that_does_not_fit_is_refused_with_all_reasons(tmp_path):
    arrays = {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(2, np.float64), "more": np.zeros(1)}
    bridge.save(tmp_path / "x.safetensors", arrays)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kept = nnx.clone(model)
    with pytest.raises(ValueError, match="does not fit") as raised:
        bridge.load(tmp_path / "x.safetensors", model)
    assert str(raised.value).splitlines()[1:] == [
        "  kernel is float32[2, 3] in the file, float32[3, 2] in the model",
        "  bias is float64[2] in the file, float32[2] in the model",
        "  more, float64[1], is in the file only",
    ]
    assert equal(model, kept)
    bridge.save(tmp_path / "y.safetensors", {"kernel": np.zeros((3, 2), np.float32)})
    with pytest.raises(ValueError, match=r"bias, float32\[2\], is not in the file"):
        bridge.load(tmp_path / "y.safetensors", model)


@pytest.mark.parametrize("options", [{}, {"use_gating": True, "constraint": "identity"}, {"mode": "hc"}], ids=str)
def test_weights_of_the_published_package(tmp_path, options):
    torch.manual_seed(0)
    published = mhc.MHCSequential([nn.Linear(6, 6) for _ in range(4)], max_history=3, **options).double()
    for skip in published.skip_layers:
        nn.init.normal_(skip.mixing_logits)
    torch.save(published.state_dict(), tmp_path / "published.pt")

    ours = torch_mhc.MHCSequential([nn.Linear(6, 6) for _ in range(4)], max_history=3, **options).double()
    bridge.load(tmp_path / "published.pt", ours)
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = published(x).detach()
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=0)
    with jax.enable_x64(True):
        make = lambda rngs: nnx.Linear(6, 6, param_dtype=jnp.float64, rngs=rngs)  # noqa: E731
        stack = jax_mhc.MHCStack(make, 4, 3, rngs=nnx.Rngs(0), **options)
        params = nnx.state(stack, nnx.Param)
        nnx.update(stack, jax.tree.map(lambda p: p.astype(jnp.float64), params))
        np.testing.assert_allclose(bridge.convert(ours, stack)(jnp.asarray(x.numpy())), expected, rtol=1e-12)


def test_the_lazy_projection_of_the_published_package(tmp_path):
    published = mhc.MHCSkip(max_history=2, auto_project=True)
    x, state = torch.randn(2, 4), torch.randn(2, 6)
    expected = published(x, [state]).detach()
    torch.save(published.state_dict(), tmp_path / "x.pt")
    ours = bridge.load(tmp_path / "x.pt", torch_mhc.MHCSkip(max_history=2, auto_project=True))
    torch.testing.assert_close(ours(x, [state]), expected)

    unused = torch_mhc.MHCSkip(max_history=2, auto_project=True)  # no projection yet, in the module or in its file
    nn.init.normal_(unused.mixing_logits)
    bridge.save(tmp_path / "unused.pt", unused)
    loaded = bridge.load(tmp_path / "unused.pt", torch_mhc.MHCSkip(max_history=2, auto_project=True))
    assert torch.equal(loaded.mixing_logits, unused.mixing_logits)


# ---- damage ----------------------------------------------------------------------------------------------------------


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # threads of Orbax, when it fails
@pytest.mark.parametrize("suffix", FORMATS)
def test_no_flipped_bit_goes_unnoticed(tmp_path, suffix):
    arrays = {"a": np.arange(300, dtype=np.float32), "b": np.ones((3, 5), np.int16)}
    path = tmp_path / f"x{suffix}"
    bridge.save(path, arrays)
    generator = np.random.default_rng(0)
    noticed = 0
    for file in files_of(path):
        whole = file.read_bytes()
        for place in generator.choice(len(whole), min(12 if suffix == ".orbax" else 150, len(whole)), replace=False):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(generator.integers(8))
            file.write_bytes(damaged)
            try:
                loaded = bridge.load(path)
            except ValueError as error:
                assert "path:" in str(error)  # noqa: PT017 - either outcome is fine, silence is not
                noticed += 1
            else:  # padding, time stamps: the values are unharmed
                assert loaded.keys() == arrays.keys()
                assert all(same_bits(loaded[name], array) for name, array in arrays.items())
        file.write_bytes(whole)
    assert noticed > 10


@pytest.mark.parametrize("suffix", FORMATS[:2])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    bridge.save(path, {"a": np.arange(100, dtype=np.float32)})
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="path: "):
            bridge.load(path)


def test_a_torn_orbax_directory_is_refused(tmp_path):
    bridge.save(tmp_path / "x", {"a": np.arange(100, dtype=np.float32)})
    for file in files_of(tmp_path / "x"):
        shutil.copytree(tmp_path / "x", tmp_path / "y")
        (tmp_path / "y" / file.relative_to(tmp_path / "x")).unlink()
        try:
            assert same_bits(bridge.load(tmp_path / "y")["a"], np.arange(100, dtype=np.float32))
        except ValueError as error:
            assert "Orbax" in str(error)  # noqa: PT017
        shutil.rmtree(tmp_path / "y")
    with pytest.raises(FileExistsError, match="never written over"):
        bridge.save(tmp_path / "x", {})


def hostile_header(entries: dict) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


@pytest.mark.parametrize("metadata", [None, {"crc32": "1234abcd"}, {"crc32": "12345678"}, {"crc32": '{"a": 3}'}])
def test_metadata_of_others_is_theirs(tmp_path, metadata):
    entries = {"__metadata__": metadata, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    (tmp_path / "x.safetensors").write_bytes(hostile_header(entries))
    assert same_bits(bridge.load(tmp_path / "x.safetensors")["a"], np.zeros(2, np.float32))
    assert safetensors.torch.load_file(tmp_path / "x.safetensors").keys() == {"a"}


def test_names_that_a_format_cannot_hold_are_refused(tmp_path):
    with pytest.raises(TypeError, match="names must be strings"):
        bridge.save(tmp_path / "x.safetensors", {1: np.ones(1), "1": np.zeros(1)})
    with pytest.raises(ValueError, match="another use for this name"):
        bridge.save(tmp_path / "x.safetensors", {"__metadata__": np.ones(1)})
    with pytest.raises(ValueError, match="no value in any array"):
        bridge.save(tmp_path / "x", {"a": np.ones(0)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]},
        {"dtype": "U8", "shape": [True, 8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
        3,
    ],
)
def test_hostile_safetensors_headers_are_refused(tmp_path, entry):
    (tmp_path / "x.safetensors").write_bytes(hostile_header({"a": entry}))
    with pytest.raises(ValueError, match="damaged header"):
        bridge.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [[0, 1 << 70], [0] * 70])
def test_empty_tensors_that_numpy_cannot_have_are_refused(tmp_path, shape):
    header = hostile_header({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})[:-8]
    (tmp_path / "x.safetensors").write_bytes(header)
    with pytest.raises(ValueError, match="damaged header"):
        bridge.load(tmp_path / "x.safetensors")


def test_overlapping_and_repeated_tensors_are_refused(tmp_path):
    half = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    (tmp_path / "x.safetensors").write_bytes(hostile_header({"a": half, "b": half}))
    with pytest.raises(ValueError, match="damaged header"):
        bridge.load(tmp_path / "x.safetensors")
    text = b'{"a": %b, "a": %b}' % ((json.dumps(half).encode(),) * 2)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match="a name appears twice"):
        bridge.load(tmp_path / "x.safetensors")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(2), "b": Hostile()}, "x.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Hostile(), protocol=2))  # the one that torch writes
    for name in ("x.pt", "y.pt"):
        with pytest.raises(ValueError, match="damaged or holds more than tensors"):
            bridge.load(name)
    assert not (tmp_path / "pwned").exists()


def test_wrong_formats_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"PK" + bytes(100))
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a", "b")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(2), "epoch": 3}, tmp_path / "more.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    for name, message in (
        ("x.safetensors", "not a safetensors file"),
        ("x.pt", "not a torch file"),
        ("list.pt", "holds a list"),
        ("more.pt", "more than a state dict: {'epoch': 'int'}"),
        ("model.pt", "Linear.* save the state dict alone"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge.load(tmp_path / name)
    (tmp_path / "x.npz").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no known format"):
        bridge.load(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="not an Orbax checkpoint"):
        bridge.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nothing"):
        bridge.load(tmp_path / "nothing.pt")


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    for name in ("x.safetensors", "x.pt", "x.orbax"):
        with pytest.raises(FileNotFoundError, match=r"there is no directory .*/missing to write"):
            bridge.save(tmp_path / "missing" / name, {"x": np.ones(3)})


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    for suffix in FORMATS[:2]:
        bridge.save(tmp_path / f"x{suffix}", {"a": np.zeros(3)})
    bad = {"a": np.ones(3), "b": np.ones(3, np.complex128)}
    with pytest.raises(ValueError, match="safetensors has no complex128"):
        bridge.save(tmp_path / "x.safetensors", bad)
    with pytest.raises(TypeError, match="has no counterpart"):
        bridge.save(tmp_path / "x.pt", {"a": np.array(["text"])})
    assert sorted(os.listdir(tmp_path)) == ["x.pt", "x.safetensors"]
    assert all(same_bits(bridge.load(tmp_path / f"x{suffix}")["a"], np.zeros(3)) for suffix in FORMATS[:2])


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    bridge.save(tmp_path / "x.safetensors", {"a": np.zeros(3)})
    program = """
import sys, time, numpy as np
from bridge.weights.formats import Piece, Spec, write
def pieces():
    yield Piece("a", 0, np.ones(3))
    print("half", flush=True)
    time.sleep(60)
write(sys.argv[1], {"a": Spec("float64", (6,))}, pieces())
"""
    command = [sys.executable, "-c", program, str(tmp_path / "x.safetensors")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert same_bits(bridge.load(tmp_path / "x.safetensors")["a"], np.zeros(3))


def test_what_a_killed_writer_left_goes_with_the_next_save_and_living_writers_stay(tmp_path):
    program = """
import sys, time, numpy as np
from bridge.weights.formats import Piece, Spec, write
def pieces():
    print("half", flush=True)
    sys.stdin.readline()
    yield Piece("a", 0, np.ones(3))
write(sys.argv[1], {"a": Spec("float64", (3,))}, pieces())
"""
    path = tmp_path / "x.safetensors"
    bridge.save(tmp_path / "y.safetensors", {"a": np.zeros(3)})
    command = [sys.executable, "-c", program, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parents[2]}
    with subprocess.Popen(command, **pipes) as killed, subprocess.Popen(command, **pipes) as living:
        assert killed.stdout.readline() == living.stdout.readline() == b"half\n"
        killed.kill()
        killed.wait()
        assert len(os.listdir(tmp_path)) == 3
        bridge.save(tmp_path / "y.safetensors", {"a": np.zeros(3)})  # of another path: none of its business
        assert len(os.listdir(tmp_path)) == 3
        bridge.save(path, {"a": np.zeros(3)})
        assert len(os.listdir(tmp_path)) == 3, "the dead one's is gone, that of the living one is not"
        assert same_bits(bridge.load(path)["a"], np.zeros(3))
        living.communicate(b"\n")
        assert living.returncode == 0
    assert same_bits(bridge.load(path)["a"], np.ones(3))
    assert sorted(os.listdir(tmp_path)) == ["x.safetensors", "y.safetensors"]


@pytest.mark.parametrize("suffix", FORMATS[:2])
def test_threads_that_save_one_path_write_whole_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    bridge.save(path, {"a": np.zeros(50_000)})

    def save(number):
        for _ in range(5):
            bridge.save(path, {"a": np.full(50_000, float(number))})
            assert len(np.unique(bridge.load(path)["a"])) == 1

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(save, range(4)))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", FORMATS[:2])
def test_links_modes_and_long_names(tmp_path, suffix):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / ("n" * 240 + suffix), tmp_path / f"link{suffix}"
    link.symlink_to(target)
    bridge.save(link, {"a": np.zeros(3)})  # the file that the link leads to need not be there yet
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask
    target.chmod(0o604)
    bridge.save(link, {"a": np.ones(3)})
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o604
    assert same_bits(bridge.load(target)["a"], np.ones(3))
    assert os.listdir(target.parent) == [target.name]

    circle = tmp_path / f"circle{suffix}"
    circle.symlink_to(circle.name)
    with pytest.raises(OSError, match="symbolic links"):
        bridge.save(circle, {"a": np.ones(3)})
    assert circle.is_symlink()


def test_of_writers_of_one_orbax_directory_one_wins_and_the_others_are_told(tmp_path):
    (tmp_path / "link").symlink_to("x")

    def save(number):
        try:
            bridge.save(tmp_path / "link", {"a": np.full(1000, number)})
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(3) as threads:
        won = [number for number in threads.map(save, range(3)) if number is not None]
    assert len(won) == 1
    assert same_bits(bridge.load(tmp_path / "x")["a"], np.full(1000, won[0]))
    assert sorted(os.listdir(tmp_path)) == ["link", "x"]


# ---- replaced while they are read ------------------------------------------------------------------------------------


def save_as_the_libraries_do(path, arrays):
    """Without our checksums, and by a rename: what downloads do."""
    if path.suffix == ".pt":
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path.with_name("new"))
    else:
        safetensors.numpy.save_file(arrays, path.with_name("new"))
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("suffix", FORMATS[:2])
@pytest.mark.parametrize("save", [bridge.save, save_as_the_libraries_do])
def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(tmp_path, suffix, save):
    path = tmp_path / f"x{suffix}"
    old, new = ({name: np.full(1000, number) for name in "ab"} for number in (1, 2))
    save(path, old)
    with open_file(path) as reader:
        found = {"a": reader.read("a")}
        save(path, new)
        found["b"] = reader.read("b")
        assert all(same_bits(found[name], old[name]) for name in old)
    assert all(same_bits(x, new[name]) for name, x in bridge.load(path).items())


def test_shards_that_are_replaced_while_they_are_read_are_read_as_they_were(tmp_path):
    index = write_shards(tmp_path, [{"a": np.zeros(2)}, {"b": np.zeros(2)}])
    with open_file(index) as reader:
        assert same_bits(reader.read("a"), np.zeros(2))
        write_shards(tmp_path, [{"a": np.ones(2)}, {"b": np.ones(2)}])
        assert same_bits(reader.read("b"), np.zeros(2))


def test_arrays_do_not_change_with_the_file_that_they_came_from(tmp_path):
    torch.save({"kernel": torch.ones(300, 70)}, tmp_path / "x.pt")
    arrays = bridge.load(tmp_path / "x.pt")
    model = bridge.load(tmp_path / "x.pt", nnx.Linear(300, 70, use_bias=False, rngs=nnx.Rngs(0)))
    content = (tmp_path / "x.pt").read_bytes()
    with (tmp_path / "x.pt").open("rb+") as file:  # into the same file, as torch.save does
        file.write(bytes(len(content)))
    assert same_bits(arrays["kernel"], np.ones((300, 70), np.float32))
    assert same_bits(model.kernel[...], np.ones((300, 70), np.float32))


# ---- odd files of torch ----------------------------------------------------------------------------------------------


def test_a_compressed_torch_file_is_read_right(tmp_path):
    torch.save({"a": torch.arange(1000)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert same_bits(bridge.load(tmp_path / "y.pt")["a"], np.arange(1000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a": {1: torch.ones(1), "1": torch.zeros(1)}},
            r"\['a'\]\[1\] and \['a'\]\['1'\] are two arrays with one name",
        ),
        (
            {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}},
            r"\['a.b'\] and \['a'\]\['b'\] are two arrays with one name",
        ),
        ({None: torch.ones(1)}, "a key of type NoneType"),
        ({"a": torch.ones(1).to_sparse()}, "more than a state dict: {'a': 'Tensor'}"),
        ({"a": torch.ones(1, device="meta")}, "more than a state dict"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "cannot hold a"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        bridge.load(tmp_path / "x.pt")


@pytest.mark.parametrize("leaves", [[], [torch.ones(1)]])
def test_lists_in_one_another_are_refused_however_many_names_they_make(tmp_path, leaves):
    node = leaves
    for _ in range(60):
        node = [node, node]
    circle = []
    circle.append(circle)
    for i, content in enumerate((node, circle)):
        torch.save({"a": content}, tmp_path / f"{i}.pt")
        with pytest.raises(ValueError, match="no end of names"):
            bridge.load(tmp_path / f"{i}.pt")


# ---- shards ----------------------------------------------------------------------------------------------------------


def write_shards(folder: Path, shards: list[dict]) -> Path:
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, arrays in zip(names, shards, strict=True):
        bridge.save(folder / name, arrays)
    weight_map = {key: name for name, arrays in zip(names, shards, strict=True) for key in arrays}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def test_sharded_checkpoints(tmp_path):
    model = randomize(TorchModel())
    state = model.state_dict()
    names = list(state)
    index = write_shards(tmp_path, [{name: state[name] for name in names[i::3]} for i in range(3)])
    loaded = bridge.load(index, TorchModel())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    bridge.convert_file(index, tmp_path / "jax.safetensors", JaxModel(), TorchModel(), "jax")
    assert equal(bridge.load(tmp_path / "jax.safetensors", JaxModel(seed=1)), bridge.convert(model, JaxModel()))


def test_an_index_may_not_leave_its_folder_or_lie(tmp_path):
    index = write_shards(tmp_path, [{"a": np.zeros(2)}, {"b": np.zeros(2)}])
    content = json.loads(index.read_text())
    for change, message in (
        ({"a": "../model.safetensors"}, "not a file beside it"),
        ({"a": ".."}, "not a file beside it"),
        ({"a": "folder\\\\model.safetensors"}, "not a file beside it"),
        ({"a": str(tmp_path / "model.safetensors")}, "not a file beside it"),
        ({"a": 3}, "not a file beside it"),
        ({"a": None}, "not a file beside it"),
        ({"a": ""}, "not a file beside it"),
        ({"a": index.name}, "no known format"),
        ({"c": content["weight_map"]["a"]}, "disagree about \\['c'\\]"),
        ({"b": content["weight_map"]["a"]}, "disagree about \\['b'\\]"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | change}))
        with pytest.raises(ValueError, match=message):
            bridge.load(index)
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("folder.safetensors", "missing.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(FileNotFoundError, match=name):
            bridge.load(index)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not an index of shards"):
        bridge.load(index)


_PEAK = """
import resource, sys
import torch
from flax import nnx
import bridge
from bridge.weights.formats import Reader
width, depth, index, target = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
class Ours(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(width, width, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(depth)])
class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width, bias=False) for _ in range(depth)])
ours = nnx.eval_shape(Ours)
with torch.device("meta"):
    theirs = Theirs()
torch.zeros(4).add_(1)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
convert = bridge.convert_file  # and all that it imports
before = peak()
convert(index, target, ours, theirs, "jax")
print((peak() - before) * 1024)
"""


def test_memory_is_bounded_by_the_largest_shard(tmp_path):
    width, depth = 2048, 8  # 16 MiB a layer: two in a shard of 32 MiB, 128 MiB in all
    names = [f"layers.{i}.weight" for i in range(depth)]
    generator = np.random.default_rng(0)
    layers = {name: generator.standard_normal((width, width), np.float32) for name in names}
    index = write_shards(tmp_path, [{name: layers[name] for name in names[i : i + 2]} for i in range(0, depth, 2)])
    command = [sys.executable, "-c", _PEAK, str(width), str(depth), str(index), str(tmp_path / "jax.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(run.stdout) < 1.5 * 2 * 4 * width**2
    loaded = bridge.load(tmp_path / "jax.safetensors")
    assert all(same_bits(loaded[f"layers.{i}.kernel"], layers[name].T) for i, name in enumerate(names))


def test_the_bytes_of_a_file_do_not_depend_on_the_order_of_its_arrays(tmp_path):
    arrays = {"b": np.arange(6.0), "a": np.arange(4.0).reshape(2, 2).T, "empty": np.zeros((0, 3))}
    bridge.save(tmp_path / "one.safetensors", arrays)
    bridge.save(tmp_path / "other.safetensors", dict(reversed(arrays.items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
