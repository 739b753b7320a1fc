"""The torch decoder: its loss and cache against the plain way, compiled, checkpointed, and what it must refuse."""

import pytest
import torch
import torch.nn.functional as F

from mhc_torch.history.config import MHCConfig
from mhc_torch.models import Decoder, DecoderConfig, KVCache, cross_entropy

CONFIG = DecoderConfig(13, features=16, mlp_features=20, depth=3, num_heads=4, num_kv_heads=2, qk_norm=True)
TOKENS = torch.tensor([[1, 5, 2, 7, 3, 12], [4, 4, 0, 9, 6, 11]])
POSITIONS = torch.tensor([[0, 1, 3, 4, 9, 10], [5, 4, 3, 2, 1, 0]])
OPTIONS = {"residual": {}, "history": {"max_history": 2, "init": "uniform"}, "streams": {"streams": 2}}


def decoder(connection, **options):
    torch.manual_seed(0)
    return Decoder(CONFIG, connection, **OPTIONS[connection], **options)


@pytest.mark.parametrize("connection", OPTIONS)
def test_the_cache_gives_what_the_whole_sequence_gives(connection):
    model = decoder(connection)
    whole, cache = model(TOKENS, positions=POSITIONS), KVCache()
    parts = [
        model(TOKENS[:, part], cache, positions=POSITIONS[:, part]) for part in (slice(0, 2), slice(2, 5), slice(5, 6))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert len(cache) == 6
    assert not torch.allclose(whole, model(TOKENS))

    generated = model.generate(TOKENS[:, :2], 4)
    assert torch.equal(generated[:, :2], TOKENS[:, :2])
    assert torch.equal(generated[:, 2:], model(generated)[:, 1:-1].argmax(-1))


@pytest.mark.parametrize("connection", OPTIONS)
def test_texts_in_one_row_do_not_see_each_other(connection):
    model = decoder(connection, use_checkpointing=True)
    packed = model.loss(TOKENS, segments=torch.tensor([[0, 0, 0, 1, 1, 1], [7, 7, 7, 2, 2, 2]]))
    alone = model.loss(TOKENS.reshape(4, 3))
    torch.testing.assert_close(packed, alone)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(torch.autograd.grad(packed, trained), torch.autograd.grad(alone, trained), strict=True):
        torch.testing.assert_close(one, other)


def test_drawing_stays_among_the_likeliest():
    model = decoder("residual")
    likely = model(TOKENS[:1, :3])[0, -1].topk(3).indices
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(TOKENS[:1, :3].expand(200, 3), 1, temperature=2.0, top_k=3, generator=generator)[:, -1]
    assert set(drawn.tolist()) == set(likely.tolist())


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_loss_in_chunks_is_the_loss(chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 5, dtype=torch.double), torch.randn(11, 5, dtype=torch.double)
    targets = torch.randint(-3, 11, (2, 7))
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight)]
    ours = cross_entropy(hidden, weight, targets, chunk=chunk)
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.clamp(min=-1).flatten(), ignore_index=-1)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(
        torch.autograd.grad(2 * ours, leaves), torch.autograd.grad(2 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_target_outside_the_vocabulary_is_not_passed_over():
    hidden, weight = torch.ones(1, 3, 4), torch.ones(6, 4)
    assert cross_entropy(hidden, weight, torch.tensor([[0, 6, 1]])).isnan()
    assert cross_entropy(hidden, weight, torch.full((1, 3), -1)) == 0


@pytest.mark.parametrize("connection", OPTIONS)
def test_checkpointing_changes_no_gradient(connection):
    gradients = []
    for use_checkpointing in (False, True):
        model = decoder(connection, use_checkpointing=use_checkpointing)
        gradients.append(torch.autograd.grad(model.loss(TOKENS), list(model.parameters()), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("connection", ["history", "streams"])
@pytest.mark.usefixtures("unchecked")
def test_it_compiles_as_one_graph(connection):
    model = decoder(connection)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), model(TOKENS))


def test_it_learns_by_heart():
    for connection in ("history", "streams"):
        model = decoder(connection)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        for _ in range(40):
            optimizer.zero_grad()
            loss = model.loss(TOKENS)
            loss.backward()
            optimizer.step()
        assert loss < 0.2


def test_bad_input_is_named():
    for options, text in [
        ({"connection": "highway"}, "connection must be one of .*got 'highway'"),
        ({"connection": "residual", "streams": 2}, "'residual' has no options"),
        ({"connection": "history", "streams": 2}, r"unknown settings \['streams'\]; those of MHCConfig"),
        ({"connection": "streams", "max_history": 2}, r"unknown settings \['max_history'\]; those of StreamConfig"),
        ({"connection": MHCConfig(), "streams": 2}, "unknown settings"),
    ]:
        with pytest.raises((ValueError, TypeError), match=text):
            Decoder(CONFIG, **options)
    model, filled = decoder("residual"), KVCache()
    model(TOKENS, filled)
    for call, text in [
        (lambda: model(TOKENS[0]), r"tokens must be integers of shape \(B, T\), got torch.int64\[6\]"),
        (lambda: model(TOKENS, segments=TOKENS[:, :5]), r"segments must be integers of tokens' shape \[2, 6\]"),
        (lambda: model(TOKENS, positions=TOKENS / 2), r"positions must be .* got torch.float32\[2, 6\]"),
        (lambda: model(TOKENS[:1], filled), "cache is for a batch of 2, tokens has one of 1"),
        (lambda: model(TOKENS, KVCache(), segments=TOKENS), "segments: a cache holds one text a row"),
        (lambda: model.generate(TOKENS, 0), "steps must be at least 1, got 0"),
        (lambda: model.generate(TOKENS, 1, temperature=-1.0), "temperature must be finite and not negative"),
        (lambda: model.generate(TOKENS, 1, top_k=14), r"top_k must be in 1\.\.13, got 14"),
        (lambda: model.loss(TOKENS, TOKENS[:, 1:]), r"targets must have the shape \(2, 6\)"),
        (lambda: model.loss(TOKENS, chunk=0), "chunk must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
