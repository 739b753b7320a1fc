"""The decoder against its mathematics written out, its loss and cache against the plain way, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from mhc_jax.history import MHCConfig
from mhc_jax.models import Decoder, DecoderConfig, RopeScaling, cross_entropy
from mhc_jax.models.attention import _splash, attend
from mhc_jax.streams import StreamConfig
from mhc_jax.training import TrainState, make_train_step
from tests.lowering import lowered_for

CONFIG = DecoderConfig(
    13,
    features=12,
    mlp_features=20,
    depth=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qk_norm=True,
    rope_theta=100.0,
    rope_scaling=RopeScaling(factor=4.0, low_frequency=1.0, high_frequency=4.0, length=40),
)
TOKENS = jnp.array([[1, 5, 2, 7, 3, 12], [4, 4, 0, 9, 6, 11]])
POSITIONS = jnp.array([[0, 1, 3, 4, 9, 10], [5, 4, 3, 2, 1, 0]])
OPTIONS = {"residual": {}, "history": {"max_history": 2, "init": "uniform"}, "streams": {"streams": 2}}


def decoder(connection, **options):
    return Decoder(CONFIG, connection, rngs=nnx.Rngs(0), **OPTIONS[connection], **options)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x, positions):
    """Rotary positions as complex numbers: feature i and i + 3 of a head are one number that turns."""
    frequencies = 100.0 ** -(np.arange(3) / 3)
    stretched = []
    for frequency in frequencies:
        turns = 40 * frequency / (2 * np.pi)
        if turns < 1:
            frequency /= 4
        elif turns < 4:
            share = (turns - 1) / 3
            frequency = share * frequency + (1 - share) * frequency / 4
        stretched.append(frequency)
    numbers = (x[:, :3] + 1j * x[:, 3:]) * np.exp(1j * np.outer(positions, stretched))
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def attention(x, p, positions):
    out = []
    for head in range(4):
        part, shared = slice(6 * head, 6 * head + 6), slice(6 * (head // 2), 6 * (head // 2) + 6)
        q = turned(rms(x @ p["q_proj"]["kernel"][:, part], p["q_norm"]["scale"]), positions)
        k = turned(rms(x @ p["k_proj"]["kernel"][:, shared], p["k_norm"]["scale"]), positions)
        v = x @ p["v_proj"]["kernel"][:, shared]
        rows = []
        for t in range(len(x)):
            weights = np.exp(q[t] @ k[: t + 1].T / np.sqrt(6))
            rows.append(weights / weights.sum() @ v[: t + 1])
        out.append(np.stack(rows))
    return np.concatenate(out, axis=-1) @ p["o_proj"]["kernel"]


def mlp(x, p):
    gate = x @ p["gate_proj"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["up_proj"]["kernel"])) @ p["down_proj"]["kernel"]


def expected_logits(model, tokens, positions, mixed):
    """In float64; `mixed(states)` is what a layer adds its output to."""
    values = jax.tree.map(lambda leaf: np.asarray(leaf, float), nnx.to_pure_dict(nnx.state(model)))
    states = [values["embed_tokens"]["embedding"][tokens]]
    for layer in range(3):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], values["stack"]["layers"])
        x = states[-1]
        a = attention(rms(x, p["input_layernorm"]["scale"]), p["self_attn"], positions)
        m = mlp(rms(x + a, p["post_attention_layernorm"]["scale"]), p["mlp"])
        states.append(a + m + mixed(states))
    return rms(states[-1], values["norm"]["scale"]) @ values["lm_head"]["kernel"]


@pytest.mark.parametrize("connection", OPTIONS)
def test_the_model_is_its_mathematics(connection):
    model = decoder(connection)
    for i, (_, leaf) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if leaf.ndim == 2 and leaf.shape[-1] in (6, 12):  # scales that are not all one
            leaf[...] = leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
    # Streams start as the residual network.
    mixed = (lambda states: np.mean(states[-2:], axis=0)) if connection == "history" else lambda states: states[-1]
    given = np.asarray(TOKENS), np.asarray(POSITIONS)
    for logits, tokens, positions in zip(model(TOKENS, positions=POSITIONS), *given, strict=True):
        np.testing.assert_allclose(logits, expected_logits(model, tokens, positions, mixed), atol=2e-5)


@pytest.mark.parametrize("connection", OPTIONS)
def test_the_cache_gives_what_the_whole_sequence_gives(connection):
    model = decoder(connection)
    whole = model(TOKENS, positions=POSITIONS)
    first, cache = model(TOKENS[:, :2], model.init_cache(2, 6), positions=POSITIONS[:, :2])
    rest, cache = model(TOKENS[:, 2:5], cache, positions=POSITIONS[:, 2:5])
    last, full = model(TOKENS[:, 5:], cache, positions=POSITIONS[:, 5:])
    np.testing.assert_allclose(jnp.concatenate([first, rest, last], axis=1), whole, atol=1e-5)
    assert full.length == 6
    assert jnp.isnan(model(TOKENS[:, :1], full)[0]).all()  # there is no seventh place

    generated = model.generate(TOKENS[:, :2], 4)
    np.testing.assert_array_equal(generated[:, :2], TOKENS[:, :2])
    np.testing.assert_array_equal(generated[:, 2:], model(generated)[:, 1:-1].argmax(-1))


@pytest.mark.parametrize("connection", ["history", "streams"])
def test_texts_in_one_row_do_not_see_each_other(connection):
    graphdef, params = nnx.split(decoder(connection))

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens, segments=None):
        return nnx.merge(graphdef, params).loss(tokens, segments=segments)

    found, expected = (
        loss(params, TOKENS, jnp.array([[0, 0, 0, 1, 1, 1], [7, 7, 7, 2, 2, 2]])),
        loss(params, TOKENS.reshape(4, 3)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_streams_are_scanned_over_boundaries_whatever_is_asked():
    options = {"remat": ("attention",), "dtype": jnp.bfloat16, "state_dtype": jnp.float32, "implementation": "xla"}
    model = decoder("streams", **options)
    for options in ({}, {"segments": TOKENS}):
        assert "name=_boundary" in str(jax.make_jaxpr(lambda o=options: model.hidden(TOKENS, **o))())


def test_drawing_follows_the_distribution_and_stays_among_the_likeliest():
    model = decoder("residual")
    model.lm_head.kernel[...] *= 3
    prompt = jnp.repeat(TOKENS[:1, :3], 4000, axis=0)
    likely = np.argsort(model(TOKENS[:1, :3])[0, -1])[::-1][:3]
    drawn = np.asarray(model.generate(prompt, 1, temperature=2.0, top_k=3, key=jax.random.key(0))[:, -1])
    assert set(drawn) <= set(likely.tolist())
    expected = jax.nn.softmax(model(TOKENS[:1, :3])[0, -1, likely] / 2)
    np.testing.assert_allclose([(drawn == token).mean() for token in likely], expected, atol=0.03)


def plain_loss(hidden, kernel, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, jnp.maximum(targets, 0))
    return jnp.sum(losses, where=targets >= 0) / (targets >= 0).sum()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_loss_in_chunks_is_the_loss(chunk):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, kernel = jnp.asarray(rng.normal(size=(2, 7, 5))), jnp.asarray(rng.normal(size=(5, 11)))
        targets = jnp.asarray(rng.integers(-3, 11, (2, 7)))
        both = [
            jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, kernel, targets)
            for function in (lambda *a: 2 * cross_entropy(*a, chunk=chunk), lambda *a: 2 * plain_loss(*a))
        ]
        assert both[0][0].dtype == jnp.float64
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), *both)
        np.testing.assert_allclose(2 * cross_entropy(hidden, kernel, targets, chunk=chunk), both[1][0], rtol=1e-12)


def test_a_target_outside_the_vocabulary_is_not_passed_over():
    hidden, kernel = jnp.ones((1, 3, 4)), jnp.ones((4, 6))
    assert jnp.isnan(cross_entropy(hidden, kernel, jnp.array([[0, 6, 1]])))
    assert cross_entropy(hidden, kernel, jnp.full((1, 3), -1)) == 0


def test_logits_of_all_tokens_are_never_there_and_depth_is_one_scan():
    def program(depth):
        config = DecoderConfig(1009, features=8, mlp_features=12, depth=depth, num_heads=2)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, "streams", streams=2, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((2, 65), jnp.int32)

        def loss(params, tokens):
            return nnx.merge(graphdef, params).loss(tokens, chunk=16)

        return jax.jit(jax.value_and_grad(loss)).lower(params, tokens).as_text()

    shallow, deep = program(2), program(40)
    assert "2x16x1009xf32" in shallow
    assert "64x1009" not in shallow
    assert "128x1009" not in shallow
    assert len(shallow.splitlines()) == len(deep.splitlines())


@pytest.mark.parametrize("connection", ["history", "streams"])
def test_what_is_not_kept_is_computed_again_to_the_same_gradients(connection):
    def gradients(remat):
        model = decoder(connection, remat=remat)
        graphdef, params = nnx.split(model)
        step = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params).loss(TOKENS)))
        compiled = step.lower(params).compile()
        return compiled(params), str(jax.make_jaxpr(step)(params)).count("erf") + compiled.cost_analysis()["flops"]

    (all_kept, cheap), (some, middle), (none, dear) = (gradients(r) for r in (None, ("attention", "mlp_out"), ()))
    for other in (some, none):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), all_kept, other)
    assert cheap < middle < dear


@pytest.mark.parametrize("connection", ["history", "streams"])
def test_it_learns_in_low_precision_with_parameters_of_full(connection):
    model = Decoder(CONFIG, connection, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert model(TOKENS).dtype == jnp.float32
    optimizer = optax.adam(2e-2)
    step = make_train_step(lambda model, tokens: (model.loss(tokens), {}), optimizer)
    state = TrainState.create(model, optimizer)
    for _ in range(60):
        state, metrics = step(state, TOKENS)
    assert metrics["loss"] < 0.2
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(state.model, nnx.Param)))


def test_parameters_can_be_of_low_precision():
    model = decoder("history", param_dtype=jnp.bfloat16)
    kinds = {path[-1]: leaf.dtype for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert kinds["kernel"] == kinds["scale"] == kinds["embedding"] == jnp.bfloat16
    assert kinds["mixing_logits"] == jnp.float32
    assert model.hidden(TOKENS).dtype == jnp.bfloat16


@pytest.mark.parametrize("segments", [None, jnp.repeat(jnp.array([[4, 1, 9]]), jnp.array([50, 60, 18]), axis=1)])
def test_the_fused_kernel_of_a_tpu_computes_the_plain_form(segments):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 128, heads, 64)) for i, heads in enumerate((2, 1, 1)))
    cotangent = jax.random.normal(jax.random.key(3), q.shape)
    plain, pullback = jax.vjp(lambda *a: attend(*a, segments=segments, implementation="plain"), q, k, v)
    with pltpu.force_tpu_interpret_mode():
        fused, fused_pullback = jax.vjp(lambda *a: _splash(*a, segments), q, k, v)
        gradients = fused_pullback(cotangent)
    np.testing.assert_allclose(fused, plain, atol=2e-5)
    for ours, theirs in zip(gradients, pullback(cotangent), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_on_a_tpu_no_scores_of_all_pairs_are_in_memory():
    config = DecoderConfig(32, features=128, mlp_features=128, depth=2, num_heads=2, num_kv_heads=1)

    def program(attention):
        graphdef, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, attention=attention, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((1, 257), jnp.int32)
        return lowered_for("tpu", jax.grad(lambda p, t: nnx.merge(graphdef, p).loss(t)), params, tokens)

    assert "2x256x256xf32" in program("plain")
    fused = program("splash")
    assert "tpu_custom_call" in fused
    assert "256x256x" not in fused


def test_bad_input_is_named():
    for options, text in [
        ({"connection": "highway"}, "connection must be one of .*got 'highway'"),
        ({"connection": "residual", "streams": 2}, "'residual' has no options"),
        ({"connection": "history", "streams": 2}, r"unknown settings \['streams'\]; those of MHCConfig"),
        ({"connection": "streams", "max_history": 2}, r"unknown settings \['max_history'\]; those of StreamConfig"),
        ({"connection": StreamConfig(), "streams": 17}, "streams must be between 1 and 16, got 17"),
        ({"connection": MHCConfig(), "block_length": 2}, "block_length is of use to connection='streams' alone, got 2"),
        ({"connection": "history", "implementation": "pallas"}, "implementation is of use to connection='streams'"),
        ({"remat": ("attention", "mpl_out")}, r"remat must name some of .*got \['mpl_out'\]"),
        ({"connection": "streams", "block_length": 2}, "block_length must divide the depth 3"),
    ]:
        with pytest.raises((ValueError, TypeError), match=text):
            Decoder(CONFIG, **options, rngs=nnx.Rngs(0))(TOKENS)
    model = decoder("residual")
    for call, text in [
        (lambda: model(TOKENS[0]), r"tokens must be integers of shape \(B, T\), got int32\[6\]"),
        (lambda: model(TOKENS.astype(float)), "tokens must be integers"),
        (lambda: model(TOKENS, segments=TOKENS[:, :5]), r"segments must be integers of tokens' shape \[2, 6\]"),
        (lambda: model(TOKENS, positions=TOKENS / 2), r"positions must be .* got float32\[2, 6\]"),
        (lambda: model(TOKENS, model.init_cache(2, 6), segments=TOKENS), "segments: a cache holds one text a row"),
        (lambda: model(TOKENS, model.init_cache(3, 8)), "cache is for a batch of 3, tokens has one of 2"),
        (lambda: model.init_cache(2, 0), "size must be at least 1, got 0"),
        (lambda: model.generate(TOKENS[0], 2), r"tokens must be integers of shape \(B, T\), got int32\[6\]"),
        (lambda: model.generate(TOKENS, 0), "steps must be at least 1, got 0"),
        (lambda: model.generate(TOKENS, 1, temperature=-1.0), "temperature must be finite and not negative"),
        (lambda: model.generate(TOKENS, 1, top_k=14), r"top_k must be in 1\.\.13, got 14"),
        (lambda: model.generate(TOKENS, 1, temperature=1.0), "key must be given"),
        (lambda: model.loss(TOKENS, TOKENS[:, 1:]), r"targets must have the shape \(2, 6\)"),
        (lambda: model.loss(TOKENS, chunk=0), "chunk must be at least 1, got 0"),
        (
            lambda: Decoder(CONFIG, attention="flash", rngs=nnx.Rngs(0))(TOKENS),
            r"must be one of \('plain', 'splash', 'cudnn'\) or",
        ),
        (
            lambda: Decoder(CONFIG, attention="splash", rngs=nnx.Rngs(0))(TOKENS),
            "'splash' takes lengths .* q is float32",
        ),
        (lambda: decoder("residual", attention="cudnn")(TOKENS), "'cudnn' takes heads .* q is float32"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
