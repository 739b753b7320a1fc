"""Whole models: mHC modules, stacks, lists, ties; nothing is lost in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import bridge
import mhc_jax.nn as jax_mhc
import mhc_torch as torch_mhc
from benchmarks import bridge as benchmark
from mhc_jax.nn import hyper_connections as jax_streams
from mhc_torch.nn import hyper_connections as torch_streams
from tests.bridge.models import JaxModel, TorchModel, equal, randomize, to64

X = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_gating": True, "init": "uniform"},
        {"constraint": "identity", "epsilon": 0.3, "temperature": 0.7},
        {"constraint": "sparse", "prune_threshold": 0.2},
        {"mode": "hc"},
        {"mode": "residual"},
    ],
    ids=str,
)
def test_models_with_history_compute_the_same(stacked, options):
    with jax.enable_x64(True):
        source = randomize(TorchModel(**options).double())
        target = bridge.convert(source, to64(JaxModel(stacked, **options)))
        np.testing.assert_allclose(
            target(X.astype(np.float64)), source(torch.tensor(X, dtype=torch.float64)).detach(), rtol=1e-12
        )
        back = bridge.convert(target, TorchModel(**options).double())
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_a_layer_of_the_stack_is_the_layer_of_that_index():
    source = randomize(TorchModel())
    target = bridge.convert(source, JaxModel())
    for layer in range(3):
        ours, theirs = target.body.layers.linear.kernel[layer], source.body.wrapped_modules[layer].linear.weight
        np.testing.assert_array_equal(ours.T, theirs.detach())
        logits = source.body.skip_layers[layer].mixing_logits
        np.testing.assert_array_equal(target.body.mixing_logits[layer], logits.detach())


@pytest.mark.parametrize("doubly_stochastic", [True, False])
def test_matrix_skip(doubly_stochastic):
    source = randomize(torch_mhc.MatrixMHCSkip(3, doubly_stochastic, iterations=4))
    target = jax_mhc.MatrixMHCSkip(3, doubly_stochastic, iterations=4, rngs=nnx.Rngs(0))
    bridge.convert(source, target)
    states = [X + i for i in range(3)]
    theirs = source(torch.tensor(X), [torch.tensor(x) for x in states]).detach()
    np.testing.assert_allclose(target(jnp.asarray(X), [jnp.asarray(x) for x in states]), theirs, rtol=1e-5)


@pytest.mark.parametrize("image", [True, False])
def test_projection_of_the_history(image):
    """auto_project: a matrix in JAX, a matrix or a 1x1 convolution in torch."""
    source = torch_mhc.MHCSkip(max_history=2, auto_project=True, init="uniform")
    shape, other = ((2, 4, 3, 3), (2, 6, 3, 3)) if image else ((2, 4), (2, 6))
    x, state = torch.ones(shape), torch.rand(other)
    theirs = source(x, [state])  # makes the projection
    target = jax_mhc.MHCSkip(2, auto_project=True, init="uniform", history_features=6, features=4, rngs=nnx.Rngs(0))
    bridge.convert(source, target)
    ours = target(*(jnp.asarray(a.movedim(1, -1).numpy()) for a in (x,)), [jnp.asarray(state.movedim(1, -1).numpy())])
    np.testing.assert_allclose(np.moveaxis(np.asarray(ours), -1, 1), theirs.detach(), rtol=1e-5)


IMAGE = np.random.default_rng(1).standard_normal((2, 6, 6, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("make_jax", "make_torch"),
    [
        (
            lambda r: jax_mhc.MHCConv(4, 6, (3, 3), 2, 3, padding=1, rngs=r),
            lambda: torch_mhc.MHCConv2d(4, 6, 3, 2, padding=1, max_history=3),
        ),
        (lambda r: jax_mhc.MHCBasicBlock(4, 6, 2, 3, rngs=r), lambda: torch_mhc.MHCBasicBlock(4, 6, 2, 3)),
        (lambda r: jax_mhc.MHCBasicBlock(4, 4, 1, 3, rngs=r), lambda: torch_mhc.MHCBasicBlock(4, 4, 1, 3)),
        (lambda r: jax_mhc.MHCBottleneck(4, 3, 2, 3, rngs=r), lambda: torch_mhc.MHCBottleneck(4, 3, 2, 3)),
    ],
    ids=["conv", "basic, strided", "basic", "bottleneck"],
)
def test_blocks_of_image_networks(make_jax, make_torch):
    source, target = randomize(make_torch()).eval(), make_jax(nnx.Rngs(0))
    bridge.convert(source, target)
    target.eval()
    theirs = source(torch.tensor(np.moveaxis(IMAGE, -1, 1))).detach().movedim(1, -1)
    np.testing.assert_allclose(target(jnp.asarray(IMAGE)), theirs, rtol=1e-4, atol=1e-4)
    back = bridge.convert(target, make_torch())
    assert all(torch.equal(x, back.state_dict()[name]) for name, x in source.state_dict().items())


@pytest.mark.parametrize("dynamic", [True, False])
def test_streams(dynamic):
    """HyperConnections one by one, stacked into one module, and the learned head."""

    def layer(rngs, index):
        return jax_streams.HyperConnections(
            nnx.Linear(4, 4, rngs=rngs), 4, streams=3, dynamic=dynamic, layer_index=index
        )

    stack = jax_streams.StreamStack(layer, 3, 3, rngs=nnx.Rngs(0))
    layers = [torch_streams.HyperConnections(nn.Linear(4, 4), 4, streams=3, dynamic=dynamic) for _ in range(3)]
    source = randomize(torch_streams.StreamStack(layers, 3))
    x = X[:, :4]
    np.testing.assert_allclose(
        bridge.convert(source, stack)(jnp.asarray(x)), source(torch.tensor(x)).detach(), rtol=1e-4
    )

    head = randomize(torch_streams.StreamHead(4, streams=3))
    wide = np.stack([x, 2 * x, -x], axis=-2)
    ours = bridge.convert(head, jax_streams.StreamHead(4, streams=3))
    np.testing.assert_allclose(ours(jnp.asarray(wide)), head(torch.tensor(wide)).detach(), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match=r"streams: .*'iterations': 20.*'iterations': 5"):
        bridge.convert(
            stack,
            torch_streams.StreamStack(
                [
                    torch_streams.HyperConnections(nn.Linear(4, 4), 4, streams=3, dynamic=dynamic, iterations=5)
                    for _ in range(3)
                ]
            ),
        )


def test_a_resnet_and_a_transformer_there_and_back(tmp_path):
    """The models of the benchmark, small: between models, and from file to file, whose bytes must be the same again."""
    tokens = np.arange(12).reshape(2, 6)
    for name, pair in (
        ("resnet", lambda: benchmark.resnet((1, 1), 5, 4)),
        ("transformer", lambda: benchmark.decoder(vocabulary=13, features=8, mlp_features=12, depth=2, num_heads=2)),
    ):
        ours, theirs = pair()
        bridge.convert(randomize(theirs), ours)
        back = bridge.convert(ours, pair()[1])
        assert all(torch.equal(x, back.state_dict()[key]) for key, x in theirs.state_dict().items())
        paths = [tmp_path / f"{name}.{step}.safetensors" for step in ("torch", "jax", "back")]
        bridge.save(paths[0], theirs)
        bridge.convert_file(paths[0], paths[1], ours, theirs, "jax")
        bridge.convert_file(paths[1], paths[2], ours, theirs, "torch")
        assert paths[0].read_bytes() == paths[2].read_bytes()
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), theirs(torch.tensor(tokens)).detach(), rtol=1e-4, atol=1e-4)


def test_lists_pair_in_order_and_parameterless_entries_are_passed_over():
    source = randomize(nn.Sequential(nn.Flatten(), nn.Linear(5, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 5)))
    rngs = nnx.Rngs(0)
    target = nnx.Sequential(
        nnx.Linear(5, 5, rngs=rngs), nnx.relu, nnx.Dropout(0.5, rngs=rngs), nnx.Linear(5, 5, rngs=rngs)
    )
    target.eval()
    np.testing.assert_allclose(bridge.convert(source, target)(X), source.eval()(torch.tensor(X)).detach(), rtol=1e-5)

    short = nnx.List([nnx.Linear(5, 5, rngs=rngs)])
    with pytest.raises(ValueError, match=r"jax model has 1 entries with parameters, torch model has 2"):
        bridge.convert(source, short)


def test_everything_that_does_not_fit_is_listed_and_nothing_is_written():
    class Ours(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.same = nnx.Linear(2, 2, rngs=rngs)
            self.shape = nnx.Linear(2, 3, rngs=rngs)
            self.dtype = nnx.Linear(2, 2, param_dtype=jnp.bfloat16, rngs=rngs)
            self.ours = nnx.Linear(2, 2, rngs=rngs)
            self.table = jnp.zeros(3)

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Linear(2, 2, bias=False)
            self.shape = nn.Linear(3, 2)
            self.dtype = nn.Linear(2, 2)
            self.theirs = nn.Linear(2, 2)

    source, target = Ours(), randomize(Theirs())
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match="10 problems") as raised:
        bridge.convert(source, target)
    assert str(raised.value).splitlines()[1:] == [
        "  jax shape.kernel has shape (2, 3) in layout 'in out -> out in', torch shape.weight has shape (2, 3)",
        "  jax shape.bias has shape (3,) in layout '... -> ...', torch shape.bias has shape (2,)",
        "  jax dtype.kernel has dtype bfloat16, torch dtype.weight has dtype float32",
        "  jax dtype.bias has dtype bfloat16, torch dtype.bias has dtype float32",
        "  jax same.bias, float32(2,), has no counterpart; it would be torch same.bias",
        "  jax ours.kernel, float32(2, 2), has no counterpart",
        "  jax ours.bias, float32(2,), has no counterpart",
        "  jax table, float32(3,), has no counterpart; it would be torch table",
        "  torch theirs.weight, float32(2, 2), has no counterpart",
        "  torch theirs.bias, float32(2,), has no counterpart",
        "  bridge.suggest(jax_model, torch_model) prints the rules that would pair what belongs together",
    ]
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("depth", [2, 4])
def test_a_stack_of_another_depth_is_refused(depth):
    rngs = nnx.Rngs(0)
    stack = jax_mhc.MHCStack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), depth, rngs=rngs)
    with pytest.raises(ValueError, match=r"jax layers.kernel, .* has \d+ elements, and its counterparts 27"):
        bridge.convert(stack, torch_mhc.MHCSequential([nn.Linear(3, 3) for _ in range(3)]))


def test_options_of_the_mixing_that_differ_are_told():
    with pytest.warns(UserWarning, match=r"mixing: .*'mhc'.*'hc'"):
        bridge.convert(JaxModel(), TorchModel(mode="hc"))
    with pytest.warns(UserWarning, match=r"detach_history: .*False.*True"):
        bridge.convert(JaxModel(), TorchModel(detach_history=True))


def test_two_models_of_one_framework_are_a_type_error():
    with pytest.raises(TypeError, match="Linear and Linear"):
        bridge.convert(nn.Linear(2, 2), nn.Linear(2, 2))


# ---- tied parameters -------------------------------------------------------------------------------------------------


class JaxTied(nnx.Module):
    """The embedding used again as the head: by its own method, or as the parameter of a second module."""

    def __init__(self, tied: bool, attend: bool = False) -> None:
        self.embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
        if not attend:
            self.head = nnx.Embed(7, 4, rngs=nnx.Rngs(1))
            if tied:
                self.head.embedding = self.embed.embedding


class TorchTied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Embedding(7, 4)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("attend", [True, False])
def test_tied_parameters_stay_tied(attend):
    source, target = randomize(TorchTied(True)), JaxTied(True, attend)
    bridge.convert(source, target)
    np.testing.assert_array_equal(target.embed.embedding.get_value(), source.embed.weight.detach())
    assert attend or target.head.embedding is target.embed.embedding
    back = bridge.convert(target, TorchTied(True))
    assert back.head.weight is back.embed.weight
    assert torch.equal(back.embed.weight, source.embed.weight)


def test_parameters_tied_on_one_side_only_are_refused():
    with pytest.raises(ValueError, match=r"torch embed.weight and head.weight are tied, but jax .* are not"):
        bridge.convert(JaxTied(False), TorchTied(True))
    with pytest.raises(ValueError, match=r"jax embed.embedding and head.embedding are tied, but torch .* are not"):
        bridge.convert(TorchTied(False), JaxTied(True))


# ---- traps -----------------------------------------------------------------------------------------------------------


def test_the_two_models_never_share_memory():
    source, target = randomize(nn.Linear(64, 64)), nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    bridge.convert(source, target)
    kept = np.array(target.kernel.get_value())
    with torch.no_grad():
        source.weight.zero_()
    np.testing.assert_array_equal(target.kernel.get_value(), kept)

    bridge.convert(target, source)
    with torch.no_grad():
        source.weight.zero_()
    np.testing.assert_array_equal(target.kernel.get_value(), kept)


def test_64_bit_weights_are_whole_even_where_x64_is_off():
    source = randomize(nn.Linear(3, 2).double())
    with jax.enable_x64(True):
        target = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    bridge.convert(source, target)  # x64 is off here
    assert target.kernel.get_value().dtype == np.float64
    assert np.asarray(target.kernel.get_value()).T.tobytes() == source.weight.detach().numpy().tobytes()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (jnp.bfloat16, torch.bfloat16),
        (jnp.float16, torch.float16),
        (jnp.float8_e4m3fn, torch.float8_e4m3fn),
        (jnp.float8_e5m2, torch.float8_e5m2),
    ],
)
def test_every_bit_pattern_of_the_narrow_dtypes_survives(ours, theirs):
    """NaN with a payload, denormals, negative zero: conversion copies bits, not numbers."""
    size = 256 if torch.finfo(theirs).bits == 8 else 65536
    bits = np.arange(size, dtype=np.uint8 if size == 256 else np.uint16).reshape(16, -1)
    source = nn.Linear(bits.shape[1], 16, bias=False, dtype=torch.float32)
    source.weight = nn.Parameter(torch.from_numpy(bits).view(theirs), requires_grad=False)
    target = nnx.Linear(bits.shape[1], 16, use_bias=False, rngs=nnx.Rngs(0))
    target.kernel.set_value(jnp.zeros((bits.shape[1], 16), ours))
    bridge.convert(source, target)
    np.testing.assert_array_equal(np.asarray(target.kernel.get_value()).view(bits.dtype).T, bits)
    with torch.no_grad():
        source.weight.view(torch.uint8).zero_()
    bridge.convert(target, source)
    np.testing.assert_array_equal(source.weight.view(torch.from_numpy(bits).dtype), bits)


def test_bare_arrays_are_replaced_wherever_they_hang(tmp_path):
    class Ours(nnx.Module):
        def __init__(self) -> None:
            table = jnp.zeros((3, 2))
            self.table, self.again = table, table
            self.parts = nnx.data({("a", "b"): jnp.zeros(2)})
            self.row = nnx.data([jnp.zeros(2), jnp.zeros(2)])

    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, shape in {"table": (3, 2), "part": (2,), "one": (2,), "two": (2,)}.items():
                self.register_buffer(name, torch.zeros(shape))

    names = {"parts.('a', 'b')": "part", "row.0": "one", "row.1": "two"}
    bridge.register(Ours, Theirs, *(bridge.Leaf(*names) for names in names.items()))
    source = randomize(Theirs())
    target = bridge.convert(source, Ours())
    np.testing.assert_array_equal(target.table, source.table)
    np.testing.assert_array_equal(target.again, source.table)
    np.testing.assert_array_equal(target.parts["a", "b"], source.part)
    np.testing.assert_array_equal(target.row[1], source.two)
    bridge.save(tmp_path / "x.pt", target)
    assert equal(bridge.load(tmp_path / "x.pt", Ours()), target)


def test_weights_keep_their_sharding():
    mesh = jax.make_mesh((2,), ("model",))
    sharding = jax.NamedSharding(mesh, jax.P(None, "model"))
    target = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    target.kernel.set_value(jax.device_put(target.kernel.get_value(), sharding))
    source = randomize(nn.Linear(4, 6))
    bridge.convert(source, target)
    assert target.kernel.get_value().sharding == sharding
    assert torch.equal(bridge.convert(target, nn.Linear(4, 6)).weight, source.weight)


def test_an_abstract_model_is_filled():
    source = randomize(TorchModel())
    abstract = nnx.eval_shape(lambda: JaxModel())
    bridge.convert(source, abstract)
    assert equal(abstract, bridge.convert(source, JaxModel()))
