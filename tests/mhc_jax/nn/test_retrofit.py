"""Streams and history put around the branches of models that exist: same function, the formula, and all one does."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mhc_jax.history import MHCConfig
from mhc_jax.monitoring.dashboard import dashboard
from mhc_jax.monitoring.diagnostics import diagnose
from mhc_jax.nn import ConnectionParam, register_block, retrofit, unretrofit
from mhc_jax.nn.retrofitting import BLOCKS, ENDS
from mhc_jax.nn.stack import unstacked
from mhc_jax.training import TrainState, checkpoint, make_train_step
from tests import reference, streams_reference
from tests.mhc_jax.nn import families
from tests.mhc_jax.nn.families import BRANCHES, FAMILIES, POST_NORM, WIDTH, inputs, learned

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
KINDS = {
    "streams": {},
    "static": {"dynamic": False, "streams": 2},
    "identity": {"constraint": "identity"},
    "history": {"history": 3},
}
CASES = [
    *((name, "streams", dtype) for name in FAMILIES for dtype in TOLERANCE),
    *((name, "history", "float64") for name in FAMILIES),
    *(("decoder", kind, "float64") for kind in ("static", "identity")),
]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The blocks of the tests are known, for as long as a test runs."""
    for registry in (BLOCKS, ENDS):
        for key in registry:
            monkeypatch.setitem(registry, key, registry[key])
    before = dict(BLOCKS), dict(ENDS)
    register_block(families.Encoder1DBlock, BRANCHES)
    register_block("BertLayer", POST_NORM)
    yield
    for registry, entries in zip((BLOCKS, ENDS), before, strict=True):
        registry.clear()
        registry.update(entries)


def retrofitted(model, name, **options):
    return retrofit(model, **FAMILIES[name][1], **options)


def stir(model, size=0.5):
    """Connections as if they had learned."""
    params = nnx.state(model, ConnectionParam)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [leaf + size * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, moved))
    return model


@nnx.jit
def run(model, x):
    return model(x)


def variables(model):
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_the_function_stays(name, kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        plain, x = learned(name, dtype), inputs(name, dtype)
        expected, before = run(plain, x), variables(plain)
        model = retrofitted(nnx.clone(plain), name, **KINDS[kind])
        found = run(model, x)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[dtype])
        after = variables(model)
        for path, value in before.items():
            assert bool((after[path] == value).all()), path
        assert all("hyper_connections" in path for path in after.keys() - before.keys())
        assert after.keys() - before.keys()


def blocks_of(model):
    """The blocks in turn, of a scan too."""
    layers = (
        model.encoder if hasattr(model, "encoder") else model.stack.layers if hasattr(model, "stack") else model.layers
    )
    return list(layers) if isinstance(layers, nnx.List) else unstacked(layers)


def by_hand(name, model, x):
    """The first state, the branches of all blocks in turn, the norm after each sum, and what follows the last."""
    blocks = blocks_of(model)
    if name == "qwen3":
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape)
        mask = jnp.arange(x.shape[1]) <= positions[..., None]
        branches = [
            branch
            for b in blocks
            for branch in (
                lambda h, b=b: b.attn(b.input_layernorm(h), positions, None, mask)[1],
                lambda h, b=b: b.mlp(b.post_attention_layernorm(h)),
            )
        ]
        return model.embedder.encode(x), branches, None, lambda h: model.embedder.decode(model.final_norm(h))
    if name == "bert":
        branches = [
            branch
            for b in blocks
            for branch in (
                lambda h, b=b: b.value(jnp.tanh(b.query(h)).mean(1, keepdims=True) + jnp.zeros((*h.shape[:2], 8))),
                lambda h, b=b: b.output(nnx.gelu(b.intermediate(h))),
            )
        ]
        return model.embed(x), branches, [norm for b in blocks for norm in (b.norm1, b.norm2)], lambda h: h
    if name == "vit":
        branches = [
            branch
            for b in blocks
            for branch in (
                lambda h, b=b: b.attention(b.layer_norm1(h)),
                lambda h, b=b: b.mlp(b.layer_norm2(h)),
            )
        ]
        return model.patches(x), branches, None, model.norm
    branches = [branch for b in blocks for branch in (b.attend, b.transform)]
    return model.embed_tokens(x), branches, None, lambda h: model.logits(model.norm(h))


def connections_of(model):
    return [
        part
        for block in blocks_of(model)
        for part in map(partial(getattr, block.hyper_connections), block.hyper_connections.branches)
    ]


def wide(leaf):
    return np.asarray(leaf[...], np.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_are_the_formula(name):
    """The paper's equation, token by token, around the branches of the model as it was, called by hand."""
    with jax.enable_x64(True):
        plain, x = learned(name, "float64"), inputs(name, "float64")
        model = stir(retrofitted(nnx.clone(plain), name, streams=3))
        state, branches, norms, head = by_hand(name, plain, x)
        streams = np.repeat(np.asarray(state)[:, :, None], 3, 2)
        for i, (branch, maps) in enumerate(zip(branches, connections_of(model), strict=True)):
            leaves = [wide(leaf) for leaf in (maps.phi, maps.alpha, maps.bias)]
            found = [streams_reference.maps(*leaves, token) for token in streams.reshape(-1, 3, WIDTH)]
            parts = (np.array(part) for part in zip(*found, strict=True))
            pre, post, res = (part.reshape(*streams.shape[:2], *part.shape[1:]) for part in parts)
            y = np.asarray(jax.jit(branch)(jnp.asarray((pre[..., None] * streams).sum(2))))
            streams = np.einsum("btij,btjc->btic", res, streams) + post[..., None] * y[:, :, None]
            streams = streams if norms is None else np.asarray(norms[i](jnp.asarray(streams)))
        found = run(model, x)
        np.testing.assert_allclose(found, head(jnp.asarray(streams.mean(2))), rtol=1e-9, atol=1e-10)
        assert abs(found - run(plain, x)).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "constraint"), [("qwen3", "sparse"), ("vit", "simplex"), ("bert", "simplex"), ("decoder", "identity")]
)
def test_history_is_the_formula(name, constraint):
    with jax.enable_x64(True):
        plain, x = learned(name, "float64"), inputs(name, "float64")
        model = stir(retrofitted(nnx.clone(plain), name, history=3, constraint=constraint))
        state, branches, norms, head = by_hand(name, plain, x)
        states = [np.asarray(state)]
        for i, (branch, skip) in enumerate(zip(branches, connections_of(model), strict=True)):
            window = states[-3:]
            weights = reference.mixing_weights(wide(skip.mixing_logits)[-len(window) :], constraint=constraint)
            mixed = sum(w * h for w, h in zip(weights, window, strict=True))
            following = states[-1] + np.asarray(jax.jit(branch)(jnp.asarray(states[-1]))) + wide(skip.gain) * mixed
            if norms is not None:
                # The norm is that of each state in the window, which is what the block norms.
                following = np.asarray(norms[i](jnp.asarray(following)))
                states = [np.asarray(norms[i](jnp.asarray(h))) for h in states]
            states.append(following)
        found = run(model, x)
        np.testing.assert_allclose(found, head(jnp.asarray(states[-1])), rtol=1e-9, atol=1e-10)
        assert abs(found - run(plain, x)).max() > 1e-2


def test_a_cache_goes_along():
    plain, x = learned("qwen3"), inputs("qwen3")
    for model in (stir(retrofit(nnx.clone(plain))), stir(retrofit(nnx.clone(plain), history=3))):
        cache, pieces = model.init_cache(2, 5), []
        for piece in (x[:, :2], x[:, 2:]):
            logits, cache = nnx.jit(lambda model, piece, cache: model(piece, cache))(model, piece, cache)
            pieces.append(logits)
        np.testing.assert_allclose(jnp.concatenate(pieces, 1), run(model, x), rtol=1e-4, atol=1e-5)
    decoder = learned("decoder")
    tokens = decoder.generate(x, 3)
    np.testing.assert_array_equal(retrofit(decoder).generate(x, 3), tokens)
    found = stir(decoder).generate(x, 3)
    np.testing.assert_array_equal(found[:, 5:], run(decoder, found[:, :-1])[:, 4:].argmax(-1))


@pytest.mark.parametrize("options", [{}, {"history": 2}])
@pytest.mark.parametrize("name", ["vit", "decoder", "qwen3"])
def test_gradients(name, options):
    """Of the layers of a scan with remat, of one by its own derivative, and of a list; against finite differences."""
    with jax.enable_x64(True):
        model, x = stir(retrofitted(learned(name, "float64"), name, **options)), inputs(name, "float64")
        params = nnx.state(model, ConnectionParam)

        def loss(params, model):
            nnx.update(model, params)
            return jnp.sin(model(x)).sum()

        def gradients():
            graph, rest = nnx.split(model, ...)
            return jax.jit(jax.value_and_grad(lambda params: loss(params, nnx.merge(graph, rest, copy=True))))

        way = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
        found = gradients()
        ahead, behind = (found(jax.tree.map(lambda p, d, s=s: p + s * d, params, way))[0] for s in (1e-6, -1e-6))
        slope = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, found(params)[1], way))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-5)
        if name == "qwen3":
            for layer in model.layers:
                layer.remat = True
            for one, other in zip(*(jax.tree.leaves(f(params)) for f in (found, gradients())), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def mean_square(model, batch):
    return jnp.mean((model(batch) - 1) ** 2), {}


@pytest.mark.parametrize(("name", "options"), [("bert", {}), ("decoder", {}), ("vit", {"history": 3})])
def test_new_parameters_alone_learn(name, options):
    model, x = retrofitted(learned(name), name, **options), inputs(name)
    before = variables(model)
    optimizer = optax.adam(0.02)
    state = TrainState.create(model, optimizer, trained=ConnectionParam)
    assert {path[-1] for path, _ in nnx.to_flat_state(state.params)} <= {
        "phi",
        "alpha",
        "bias",
        "gain",
        "mixing_logits",
    }
    step, losses = make_train_step(mean_square, optimizer, diagnose=diagnose), []
    for _ in range(8):
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.995 * losses[0]
    for path, value in variables(state.model).items():
        assert bool((value == before[path]).all()) or path in nnx.to_flat_state(state.params).paths, path
    shown, weights = dashboard(state.model, metrics["diagnostics"])
    assert all(np.isfinite(list(shown.values())))
    assert any("hyper_connections" in layer for layer in weights)


def test_filters_of_what_is_trained():
    model = retrofit(learned("decoder"))
    lists = [ConnectionParam, nnx.PathContains("norm")]
    state = TrainState.create(model, optax.sgd(0.1), trained=lists)
    assert {path[0] for path, _ in nnx.to_flat_state(state.params)} == {"stack", "norm"}
    assert hash(state.trained) == hash(TrainState.create(model, optax.sgd(0.1), trained=tuple(lists)).trained)
    state, _ = make_train_step(mean_square, optax.sgd(0.1))(state, inputs("decoder"))
    with pytest.raises(TypeError, match=r"trained must be a filter of NNX that can be hashed, got 3"):
        TrainState.create(model, optax.sgd(0.1), trained=3)
    with pytest.raises(TypeError, match="trained must be a filter of NNX that can be hashed"):
        TrainState.create(model, optax.sgd(0.1), trained=Unhashable())
    with pytest.raises(ValueError, match=r"trained must find parameters of the Qwen3, .*ConnectionParam'> finds none"):
        TrainState.create(learned("qwen3"), optax.sgd(0.1), trained=ConnectionParam)


class Unhashable:
    __hash__ = None

    def __call__(self, path, value):
        return True


def test_a_checkpoint(tmp_path):
    model, optimizer = retrofit(learned("decoder")), optax.adam(0.1)
    state = TrainState.create(model, optimizer, trained=ConnectionParam)
    state, _ = make_train_step(mean_square, optimizer)(state, inputs("decoder"))
    checkpoint.save(tmp_path / "one", state)
    back = checkpoint.restore(
        tmp_path / "one", like=TrainState.create(retrofit(learned("decoder")), optimizer, trained=ConnectionParam)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(back), jax.tree.leaves(state))


@pytest.mark.parametrize("options", [{}, {"history": 3}])
def test_explicit_meshes(options):
    model, x = stir(retrofitted(learned("vit"), "vit", **options)), jnp.tile(inputs("vit"), (4, 1, 1))
    expected = run(model, x)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        whole = NamedSharding(mesh, PartitionSpec())
        nnx.update(model, jax.device_put(nnx.state(model), whole))
        found = run(model, placed)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert "data" in found.sharding.spec


def test_copies():
    model, x = stir(retrofitted(learned("vit"), "vit")), inputs("vit")
    expected = run(model, x)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nnx.clone(model),
        nnx.merge(*nnx.split(model)),
    ):
        np.testing.assert_array_equal(run(twin, x), expected)
        with pytest.raises(ValueError, match="retrofitted already: 'layers'"):
            retrofitted(twin, "vit")
    fresh = retrofitted(learned("vit"), "vit")
    twin = unretrofit(pickle.loads(pickle.dumps(copy.deepcopy(fresh))))
    np.testing.assert_array_equal(run(twin, x), run(learned("vit"), x))


def test_shapes_alone():
    """An abstract model, as restoring a checkpoint begins with."""
    shapes = nnx.eval_shape(lambda: retrofit(families.Qwen3(rngs=nnx.Rngs(0)), streams=2))
    assert shapes.layers[1].hyper_connections.mlp.phi.shape == (2 * WIDTH, 8)


def test_two_threads_have_their_own_streams():
    model, first = stir(retrofit(families.Qwen3(1, rngs=nnx.Rngs(0)))), inputs("qwen3")
    second = first[::-1, :3]
    expected = [run(model, x) for x in (first, second)]

    def call(x, logits):
        for _ in range(2):
            np.testing.assert_allclose(model(x), logits, rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(call, (first, second), expected))


def test_half_precision():
    model = learned("decoder", jnp.bfloat16)
    expected = run(model, inputs("decoder"))
    for options in ({}, {"history": 3}):
        half = retrofit(nnx.clone(model), **options)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, ConnectionParam))} == {np.dtype("float32")}
        np.testing.assert_allclose(run(half, inputs("decoder")), expected, rtol=0.1, atol=0.15)


def test_dropout_meets_the_branch_alone():
    plain, x = families.Encoder1DBlock(rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 4, WIDTH))
    holder = Holder(plain)
    model = stir(retrofit(nnx.clone(holder)))
    model.block.dropout.rate = holder.block.dropout.rate = 1.0
    streams, attended = 4, x + holder.block.attention(holder.block.layer_norm1(x))
    assert streams == model.block.hyper_connections.kind.states
    # Nothing is left of the second branch; after the first, streams that differ.
    assert abs(model(x) - attended).max() > 1e-2
    model.block.hyper_connections.mlp.bias[...] *= 0
    np.testing.assert_allclose(holder(x), attended, rtol=1e-6)


class Holder(nnx.Module):
    def __init__(self, *blocks):
        if len(blocks) == 1:
            (self.block,) = blocks
        else:
            self.blocks = nnx.List(blocks)

    def __call__(self, x):
        for block in self.blocks if hasattr(self, "blocks") else [self.block]:
            x = block(x)
        return x


def test_unretrofit():
    for name, options in (("bert", {}), ("vit", {}), ("decoder", {"history": 3})):
        plain, x = learned(name), inputs(name)
        model = retrofitted(nnx.clone(plain), name, **options)
        assert unretrofit(model) is model
        assert nnx.graphdef(model) == nnx.graphdef(plain)
        np.testing.assert_array_equal(run(model, x), run(plain, x))
        retrofitted(model, name, **options)
        branch = blocks_of(model)[0].hyper_connections.branches[1]
        held = model.encoder[1] if name == "bert" else model.layers if name == "vit" else model.stack.layers
        leaf = getattr(held.hyper_connections, branch)
        leaf = leaf.gain if options else leaf.bias
        leaf[...] = leaf[...].at[..., 0].add(1e-3)
        with pytest.raises(ValueError, match=rf"the connections have learned.*hyper_connections\.{branch}'\]"):
            unretrofit(model)
        assert hasattr(held, "hyper_connections")
        with pytest.raises(ValueError, match="is not retrofitted"):
            unretrofit(plain)


class Unknown(nnx.Module):
    def __init__(self):
        self.norm, self.branch = nnx.LayerNorm(4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class DecoderLayer(nnx.Module):
    """Nothing but the name."""

    def __init__(self):
        self.input_layernorm, self.mlp = nnx.LayerNorm(4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class Block(nnx.Module):
    def __init__(self, width=WIDTH, **norm):
        self.norm, self.linear = (
            nnx.LayerNorm(width, **norm, rngs=nnx.Rngs(0)),
            nnx.Linear(width, width, rngs=nnx.Rngs(0)),
        )

    def __call__(self, x):
        return x + self.linear(self.norm(x))


class Taken(Block):
    def __init__(self):
        super().__init__()
        self.hyper_connections = 3


def of(*blocks):
    return Holder(*blocks)


def twice():
    block = Block()
    return of(block, block)


def tied():
    first, second = Block(), Block()
    second.norm = first.norm
    return of(first, second)


def scanned():
    return of(nnx.vmap(lambda i: Block(), axis_size=3)(jnp.arange(3)))


BARE = {"use_scale": False, "use_bias": False}


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: of(Unknown(), Unknown()), {}, ValueError, r"no block of a class that is known.*Unknown \(2\)"),
        (
            lambda: of(Block(), Block()),
            {"block": "GPT2Block"},
            ValueError,
            r"no block GPT2Block; it holds .*Block \(2\)",
        ),
        (
            lambda: of(Unknown()),
            {"block": Unknown},
            ValueError,
            r"of 'block', a Unknown, are not known.*'norm', 'branch'",
        ),
        (lambda: of(DecoderLayer()), {}, ValueError, r"it holds no \['self_attn', 'post_attention_layernorm'\]"),
        (lambda: of(Block(), Block(8)), {}, ValueError, r"one width, got \{'blocks.0': 16, 'blocks.1': 8"),
        (
            lambda: of(Block(), nnx.Linear(16, 16, rngs=nnx.Rngs(0)), Block()),
            {},
            ValueError,
            "'blocks.1', a Linear, stands",
        ),
        (twice, {}, ValueError, "'blocks.0' is held several times"),
        (lambda: of(Block(**BARE)), {}, ValueError, "block.norm, which begins a branch, has no parameter"),
        (Block, {}, ValueError, "Block is a block itself"),
        (lambda: of(Taken()), {}, ValueError, "'block', a Taken, has an attribute hyper_connections of its own"),
        (scanned, {}, ValueError, "'block', a Block, have a leading axis of depth: give ends"),
        (scanned, {"ends": ("embed", "norm")}, ValueError, r"ends must be two paths .* Holder.*'embed', 'norm'"),
        (scanned, {"ends": ("block", "block", "block")}, ValueError, "ends must be two paths of modules in Holder"),
        (lambda: retrofit(of(Block())), {}, ValueError, "retrofitted already: 'block'"),
        (lambda: of(Block()), {"streams": 1}, ValueError, "streams must be at least 2, got 1"),
        (lambda: of(Block()), {"streams": 17}, ValueError, "streams must be between 1 and 16"),
        (lambda: of(Block()), {"epsilon": 1e-6}, ValueError, "epsilon must be 0"),
        (lambda: of(Block()), {"pre_epsilon": 1e-6}, ValueError, "pre_epsilon must be 0"),
        (lambda: of(Block()), {"post_epsilon": 1e-6}, ValueError, "post_epsilon must be 0"),
        (lambda: of(Block()), {"post_scale": 1.0}, ValueError, "post_scale must be above 1"),
        (lambda: of(Block()), {"single_pass": True}, ValueError, "single_pass must be False"),
        (lambda: of(Block()), {"parameters": "new"}, TypeError, "trained=ConnectionParam"),
        (lambda: of(Block()), {"max_history": 3}, TypeError, "max_history"),
        (
            lambda: of(Block()),
            {"history": 3, "streams": 2},
            ValueError,
            "streams must not be given with history, got 2",
        ),
        (lambda: of(Block()), {"history": 1}, ValueError, "history must be at least 2, got 1"),
        (lambda: of(Block()), {"history": 3, "iterations": 2}, TypeError, "iterations"),
        (lambda: of(Block()), {"history": 3, "mode": "residual"}, ValueError, "mode must be 'mhc' or 'hc'"),
        (lambda: of(Block()), {"history": 3, "auto_project": True}, ValueError, "auto_project must be False"),
        (lambda: of(Block()), {"config": MHCConfig(use_gating=True)}, ValueError, "use_gating must be False"),
        (lambda: of(Block()), {"config": MHCConfig(stochastic=True)}, ValueError, "stochastic must be False"),
        (lambda: of(Block()), {"config": 3}, TypeError, "config must be of type StreamConfig"),
        (lambda: of(Block()), {"block": 3}, TypeError, "block must be a class"),
        (lambda: of(Block()), {"block": Block()}, TypeError, "block must be a class or the name of one, got a Block$"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(make, options, error, message):
    register_block(Block, {"mlp": ("norm", "linear")})
    register_block(Taken, {"mlp": ("norm", "linear")})
    model = make()
    before, graph = variables(model), nnx.graphdef(model)
    with pytest.raises(error, match=message):
        retrofit(model, **options)
    assert nnx.graphdef(model) == graph
    assert variables(model).keys() == before.keys()


def test_bad_calls_are_named():
    with pytest.raises(TypeError, match=r"model must be a flax\.nnx\.Module, got str"):
        retrofit("model")
    with pytest.raises(TypeError, match="block must be a subclass"):
        register_block(int, BRANCHES)
    with pytest.raises(ValueError, match="branches must name the residual branches of Block"):
        register_block(Block, {})
    for branches in ({"mlp": "norm"}, {"mlp": ("norm", "linear", "drop")}, [("norm", "linear")]):
        with pytest.raises(TypeError, match="branches must give, by the name of each, the paths of its first and"):
            register_block(Block, branches)
    register_block(Block, {"one": ("norm", "linear"), "two": ("norm", "linear")})
    with pytest.raises(ValueError, match=r"block\.norm, a LayerNorm, begins or ends several branches"):
        retrofit(of(Block()))


def test_a_block_that_is_no_sum_is_named():
    """What only a call shows."""
    register_block(Block, {"mlp": ("norm", "linear")})

    class Half(Block):
        def __call__(self, x):
            return self.norm(x)

    class Ended(Block):
        def __call__(self, x):
            return self.linear(x)

    class Nothing(Block):
        def __call__(self, x):
            return x + self.linear(self.norm(x))[..., :1]

    x = jnp.ones((2, WIDTH))
    with pytest.raises(RuntimeError, match="branch 'mlp' of a Half has begun, and not ended"):
        retrofit(of(Half()))(x)
    with pytest.raises(RuntimeError, match="a branch has ended, in a Linear, that has not begun"):
        retrofit(of(Ended()))(x)
    model = retrofit(of(Block()))
    model.block.linear.kernel = nnx.Param(jnp.ones((WIDTH, 3)))
    model.block.linear.bias = nnx.Param(jnp.ones(3))
    with pytest.raises(TypeError, match=r"Linear must put out an array of shape \(2, 16\).* got float32\[2,3\]$"):
        model(x)
    with pytest.raises(TypeError, match="Block must be called with an array, its state"):
        model.block(3)
    # By themselves, modules are what they were.
    np.testing.assert_array_equal(model.block.norm(x), nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0))(x))


@pytest.mark.parametrize("depth", [None, 3])
def test_the_width_is_told_by_what_is_in_the_first_module(depth):
    class Post(nnx.Module):
        def __init__(self):
            self.attn = nnx.MultiHeadAttention(2, WIDTH, qkv_features=8, decode=False, rngs=nnx.Rngs(0))
            self.norm = nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x + self.attn(x))

    register_block(Post, {"attention": ("attn", "attn")})
    block = Post() if depth is None else nnx.vmap(lambda i: Post(), axis_size=depth)(jnp.arange(depth))
    model = Holder(block)
    if depth is None:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, WIDTH)), jnp.float32)
        before = model(x)
        np.testing.assert_allclose(retrofit(model)(x), before, atol=1e-5)
    else:
        retrofit(model, ends=("block", "block"))
    assert model.block.hyper_connections.attention.phi.shape == (*([depth] if depth else []), 4 * WIDTH, 24)
    # What disagrees tells nothing.
    register_block(Block, {"mlp": ("mlp", "linear")})
    other = Block()
    other.mlp = nnx.Sequential(nnx.Linear(WIDTH, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, WIDTH, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="begins a branch, has no parameter that would tell the width"):
        retrofit(of(other))


def test_norms_that_blocks_share():
    register_block(Block, {"mlp": ("norm", "linear")})
    plain, x = tied(), jax.random.normal(jax.random.key(0), (2, WIDTH))
    expected = plain(x)
    np.testing.assert_allclose(retrofit(plain)(x), expected, rtol=1e-5, atol=1e-5)


def test_one_stack_between_the_same_ends():
    """Two scans, as models have them whose first layers are of another kind."""

    class Two(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed, self.norm = nnx.Linear(3, WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
            self.dense, self.others = (nnx.vmap(lambda i: Block(), axis_size=n)(jnp.arange(n)) for n in (2, 3))

        def __call__(self, x):
            scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return self.norm(scan(scan(self.embed(x), self.dense), self.others))

    register_block(Block, {"mlp": ("norm", "linear")}, ends=("embed", "norm"))
    plain, x = Two(), jax.random.normal(jax.random.key(0), (2, 3))
    model = retrofit(nnx.clone(plain))
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-5, atol=1e-5)
    read = [jax.nn.sigmoid(part.hyper_connections.mlp.bias[..., :4]).argmax(-1) for part in (model.dense, model.others)]
    np.testing.assert_array_equal(jnp.concatenate(read), [0, 1, 2, 3, 0])
