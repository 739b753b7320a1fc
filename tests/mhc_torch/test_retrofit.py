"""Streams put around the branches of models that exist: same function, the formula, and all that one does with them."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.multiprocessing
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from mhc_torch import (
    HyperConnections,
    MHCConfig,
    MHCSequential,
    check_model_stability,
    connection_parameters,
    extract_mixing_weights,
    parameter_groups,
    register_block,
    retrofit,
    unretrofit,
)
from mhc_torch.connected import BranchMaps
from mhc_torch.models import Decoder, DecoderConfig
from mhc_torch.retrofitting import BLOCKS, BlockConnections
from tests import reference, streams_reference
from tests.mhc_torch import retrofitted
from tests.mhc_torch.own_block import BRANCHES, WIDTH, Block, Own, train_in_parallel
from tests.mhc_torch.retrofitted import FORMULAS, GENERATORS, MODELS, TOKENS, inputs, learned

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def known(monkeypatch):
    """`Block` is known, for as long as the test runs."""
    monkeypatch.setattr("mhc_torch.retrofitting.BLOCKS", dict(BLOCKS))
    register_block(Block, BRANCHES)


def stir(model, size=0.5):
    """Maps as if they had learned."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in connection_parameters(model):
            parameter.add_(size * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays(name, dtype):
    plain, x = learned(name, dtype), inputs(name, dtype)
    model = retrofit(copy.deepcopy(plain))
    expected, found = plain(x, output_hidden_states=True), model(x, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=TOLERANCE[dtype])
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=TOLERANCE[dtype])
    as_tuple = model(x, return_dict=False, output_hidden_states=True)
    assert torch.equal(as_tuple[0], found.logits)
    assert all(map(torch.equal, as_tuple[-1], found.hidden_states))
    weights = model.state_dict()
    assert all(torch.equal(weights.pop(key), value) for key, value in plain.state_dict().items())
    assert weights
    assert all(".hyper_connections." in key for key in weights)
    if name in GENERATORS:
        for cache in (True, False):
            options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cache}
            assert torch.equal(model.generate(x, **options), plain.generate(x, **options))


def first_states(plain, blocks, x):
    """What the first block is given: its state, and the rest."""
    caught = []
    hook = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    plain(x)
    hook.remove()
    (state, *args), kwargs = caught[0]
    return state, args, {key: value for key, value in kwargs.items() if key not in ("past_key_values", "use_cache")}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_formula(name):
    """The streams of the last block against the paper's equation, token by token, around branches called by hand."""
    plain, x = learned(name, torch.float64), inputs(name, torch.float64)
    find, branches = FORMULAS[name]
    blocks = find(plain)
    model = stir(retrofit(copy.deepcopy(plain), streams=3))
    state, args, kwargs = first_states(plain, blocks, x)
    streams = np.repeat(state.detach().numpy()[:, :, None], 3, 2)
    for block, with_streams in zip(blocks, find(model), strict=True):
        for (branch, norm), maps in zip(branches, with_streams.hyper_connections.values(), strict=True):
            phi, alpha, bias = (p.detach().numpy() for p in (maps.phi, maps.alpha, maps.bias))
            pre, post, res = (
                np.array(part).reshape(*streams.shape[:2], *np.shape(part[0]))
                for part in zip(
                    *(streams_reference.maps(phi, alpha, bias, t) for t in streams.reshape(-1, 3, WIDTH)), strict=True
                )
            )
            y = branch(block, torch.from_numpy((pre[..., None] * streams).sum(2)), args, kwargs).detach().numpy()
            streams = np.einsum("btij,btjc->btic", res, streams) + post[..., None] * y[:, :, None]
            if norm is not None:
                streams = norm(block)(torch.from_numpy(streams)).detach().numpy()
    found = []
    find(model)[-1].register_forward_hook(lambda _, args, output: found.append(output))
    model(x)
    np.testing.assert_allclose(found[0].detach(), streams.mean(2), rtol=1e-9, atol=1e-11)
    assert abs(found[0].detach().numpy() - first_states_out(plain, blocks, x)).max() > 1e-2


def first_states_out(plain, blocks, x):
    found = []
    hook = blocks[-1].register_forward_hook(lambda _, args, output: found.append(output))
    plain(x)
    hook.remove()
    return found[0].detach().numpy()


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_history_keeps_the_function(name):
    plain, x = learned(name, torch.float64), inputs(name, torch.float64)
    model = retrofit(copy.deepcopy(plain), history=3)
    expected, found = plain(x, output_hidden_states=True), model(x, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if name in GENERATORS:
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(x, **options), plain.generate(x, **options))
    unretrofit(model)
    assert torch.equal(model(x).logits, plain(x).logits)
    stir(retrofit(model, history=3))
    with pytest.raises(ValueError, match="the connections have learned"):
        unretrofit(model)


@pytest.mark.parametrize("constraint", ["simplex", "sparse"])
def test_history_is_the_formula(constraint):
    plain, x = learned("llama", torch.float64), inputs("llama", torch.float64)
    find, branches = FORMULAS["llama"]
    blocks = find(plain)
    model = stir(retrofit(copy.deepcopy(plain), history=3, constraint=constraint))
    state, args, kwargs = first_states(plain, blocks, x)
    states = [state.detach().numpy()]
    for block, connected in zip(blocks, find(model), strict=True):
        for (branch, _), skip in zip(branches, connected.hyper_connections.values(), strict=True):
            window, gain = states[-3:], skip.gain.item()
            weights = reference.mixing_weights(
                skip.mixing_logits.detach().numpy()[-len(window) :], constraint=constraint
            )
            mixed = sum(w * h for w, h in zip(weights, window, strict=True))
            y = branch(block, torch.from_numpy(states[-1]), args, kwargs).detach().numpy()
            states.append(states[-1] + y + gain * mixed)
    found = []
    find(model)[-1].register_forward_hook(lambda _, args, output: found.append(output))
    model(x)
    np.testing.assert_allclose(found[0].detach(), states[-1], rtol=1e-9, atol=1e-11)


def test_history_learns_and_checkpoints():
    model, x = stir(retrofit(learned("gpt2"), history=3, parameters="new")), inputs("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, x)
    assert len(expected) == len(connection_parameters(model)) == 2 * 2 * 2
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "h.0." not in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(model, x), expected, rtol=1e-4, atol=1e-6)
    weights = extract_mixing_weights(model)
    assert [len(row) for row in weights.values()] == [1, 2, 3, 3]
    fresh = stir(retrofit(learned("gpt2"), history=3))
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(fresh)))(x).logits, fresh(x).logits)


@pytest.mark.parametrize("options", [{}, {"constraint": "identity"}, {"history": 3}])
def test_our_own_decoder(options):
    """Whose layers leave the sum to the stack that holds them."""
    sizes = DecoderConfig(TOKENS, features=WIDTH, mlp_features=24, depth=2, num_heads=2)
    plain, x = Decoder(sizes).double(), inputs("llama")
    model = retrofit(copy.deepcopy(plain), **options)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    assert torch.equal(copy.deepcopy(stir(model))(x), model(x))
    assert (model(x) - plain(x)).abs().max() > 1e-3


def test_the_state_is_found_by_the_signature(known):
    plain, x, factor = Block().eval(), torch.randn(2, WIDTH), torch.rand(2, 1)
    model = retrofit(of(copy.deepcopy(plain)))
    expected = plain(x, factor)[0]
    torch.testing.assert_close(model[0](factor=factor, note=None, state=x)[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="must be called with a tensor, its state"):
        model[0](3.0, 2.0)


def test_cross_attention():
    torch.manual_seed(0)
    for plain in (
        retrofitted.gpt2(add_cross_attention=True),
        transformers.BertLMHeadModel(
            transformers.BertConfig(**retrofitted._TEXT, is_decoder=True, add_cross_attention=True)
        ),
    ):
        plain = plain.eval().double()
        model = retrofit(copy.deepcopy(plain))
        x, encoded = inputs("gpt2"), torch.randn(2, 4, WIDTH, dtype=torch.float64)
        expected = plain(x, encoder_hidden_states=encoded)
        torch.testing.assert_close(model(x, encoder_hidden_states=encoded).logits, expected.logits, rtol=0, atol=1e-12)
        maps = [key for key in model.state_dict() if "hyper_connections.cross_attention" in key]
        assert len(maps) == 2 * 3


def gradients(model, x):
    model.zero_grad()
    model.train()
    model(x, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("parameters", ["all", "new"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(name, parameters, reentrant):
    model, x = stir(retrofit(learned(name), parameters=parameters)), inputs(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = gradients(model, x)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, x), expected, rtol=1e-4, atol=1e-6)
    new = {id(p) for p in connection_parameters(model)}
    assert {id(p) for n, p in model.named_parameters() if n in expected} >= new
    assert (len(expected) == len(new)) == (parameters == "new")


class HyperLlama(transformers.LlamaForCausalLM):
    """A class of its own, which transformers can load."""

    def __init__(self, config):
        super().__init__(config)
        retrofit(self, streams=2)


def test_saving_and_loading_in_both_orders(tmp_path):
    plain, x = learned("llama"), inputs("llama")
    plain.save_pretrained(tmp_path / "base")
    expected = plain(x).logits
    # Memory that nobody initialized shows as NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        first = HyperLlama.from_pretrained(tmp_path / "base")
    finally:
        torch.use_deterministic_algorithms(False)
    then = retrofit(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), streams=2)
    for model in (first, then):
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
        stir(model).save_pretrained(tmp_path / "trained")
        back = HyperLlama.from_pretrained(tmp_path / "trained")
        assert torch.equal(back(x).logits, model(x).logits)
    # What a checkpoint lacks of a module is as it starts, and the rest is kept.
    weights = load_file(tmp_path / "trained" / "model.safetensors")
    del weights["model.layers.0.hyper_connections.mlp.alpha"]
    save_file(weights, tmp_path / "trained" / "model.safetensors", {"format": "pt"})
    partly = HyperLlama.from_pretrained(tmp_path / "trained").model.layers[0].hyper_connections.mlp
    assert torch.equal(partly.alpha, torch.ones(3))
    assert torch.equal(partly.bias, back.model.layers[0].hyper_connections.mlp.bias)


def test_copies():
    model, x = stir(retrofit(learned("gpt2"))), inputs("gpt2")
    expected = model(x).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(twin(x).logits, expected)
        stir(twin)  # its own parameters
        assert not torch.equal(twin(x).logits, expected)
        assert torch.equal(model(x).logits, expected)
        with pytest.raises(ValueError, match="retrofitted already"):
            retrofit(twin)
    fresh = retrofit(learned("gpt2"))
    twin = unretrofit(pickle.loads(pickle.dumps(copy.deepcopy(fresh))))
    assert torch.equal(twin(x).logits, learned("gpt2")(x).logits)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at all attributes of a state
def test_compiles_whole():
    model, x = stir(retrofit(learned("llama"), streams=2, iterations=2)), inputs("llama")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).logits, model(x).logits)


def test_two_threads_have_their_own_streams():
    model, first = stir(retrofit(learned("llama"))), inputs("llama")
    second = first.flip(0, 1)[:, :3]
    expected = [model(x).logits for x in (first, second)]

    def run(x, logits):
        for _ in range(20):
            torch.testing.assert_close(model(x).logits, logits)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, (first, second), expected))


def test_autocast():
    plain, x = learned("llama"), inputs("llama")
    model = retrofit(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=0.05, atol=0.05)
    half = retrofit(copy.deepcopy(plain).bfloat16())
    assert all(p.dtype == torch.float32 for p in connection_parameters(half))
    torch.testing.assert_close(half(x).logits.float(), plain(x).logits, rtol=0.1, atol=0.1)


def test_a_block_of_a_user(known):
    torch.manual_seed(0)
    plain, x = Own().double(), torch.randn(2, WIDTH, dtype=torch.float64)
    model = retrofit(copy.deepcopy(plain))
    torch.testing.assert_close(model.eval()(x, 0.3), plain.eval()(x, 0.3), rtol=0, atol=1e-12)
    torch.manual_seed(3)
    expected = plain.train()(x, 0.3)
    torch.manual_seed(3)
    # Dropout meets the output of the branch, and never what the maps do to the streams.
    torch.testing.assert_close(model.train()(x, 0.3), expected, rtol=0, atol=1e-12)
    stir(model)
    same = copy.deepcopy(model)
    for block in same.blocks:
        block.dropout.p = 1.0  # all that is left are the residual maps, and equal streams stay what they are
    torch.testing.assert_close(same(x, 0.3), x, rtol=0, atol=1e-12)


def test_stacks_of_two_widths(known):
    torch.manual_seed(0)
    narrow, wide = nn.ModuleList([Block(8), Block(8)]), nn.ModuleList([Block(12)])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide, self.up = narrow, wide, nn.Linear(8, 12)

        def forward(self, x):
            for block in self.narrow:
                x, _ = block(x, 1.0)
            x = self.up(x)
            for block in self.wide:
                x, _ = block(x, 1.0)
            return x

    model, x = Two().eval(), torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(retrofit(model, Block)(x), expected, rtol=0, atol=1e-5)
    maps = [part for part in model.modules() if isinstance(part, BranchMaps)]
    assert [part.phi.shape[0] for part in maps] == [32] * 4 + [48] * 2
    # Each branch reads another stream most, counted anew in each stack.
    assert [part.resting_maps().pre.argmax().item() for part in maps] == [0, 1, 2, 3, 0, 1]


class Lora(nn.Module):
    """An adapter as PEFT adds them."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_beside_it(order):
    plain, x = learned("llama"), inputs("llama")
    expected = plain(x).logits
    model = retrofit(plain, parameters="new") if order == "after" else plain
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    if order == "before":
        retrofit(model)
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-5)
    model(x).logits.square().mean().backward()
    assert model.model.layers[0].self_attn.q_proj.up.weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in connection_parameters(model))


def test_new_parameters_alone_learn():
    model, x = retrofit(learned("llama"), parameters="new"), inputs("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=1.0, connection_lr=0.02, weight_decay=0.5)
    assert len(groups) == 1
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(8):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    new = {id(p) for p in connection_parameters(model)}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in new), name


def test_groups_part_all_parameters():
    model = retrofit(learned("gpt2"))
    model.transformer.wpe.weight.requires_grad_(False)
    weights, maps = parameter_groups(model, lr=1e-3, connection_lr=1e-2, weight_decay=0.1)
    assert (weights["lr"], weights["weight_decay"]) == (1e-3, 0.1)
    assert (maps["lr"], maps["weight_decay"]) == (1e-2, 0.0)
    assert len(maps["params"]) == 2 * 2 * 3
    assert {*weights["params"], *maps["params"]} == {p for p in model.parameters() if p.requires_grad}
    others = nn.ModuleList([HyperConnections(nn.Linear(2, 2), 2), MHCSequential([nn.Linear(2, 2)], use_gating=True)])
    assert len(connection_parameters(others)) == 3 + 2


def test_the_dashboard_knows_the_maps():
    model = retrofit(learned("llama"), streams=2)
    assert "model.layers.1.hyper_connections.mlp.res.1" in extract_mixing_weights(model)
    model.forward = lambda x, call=model.forward: call(x).logits
    report = check_model_stability(model, inputs("llama"))
    assert {check.name: check.holds for check in report.checks} == dict.fromkeys(
        ("buffer growth", "gradient path", "spectral drift"), True
    ), report
    model.model.layers[0].mlp.down_proj.weight.data *= 1e6
    (failed,) = (check for check in check_model_stability(model, inputs("llama")).checks if not check.holds)
    assert (failed.name, failed.layer) == ("spectral drift", "model.layers.1.hyper_connections.attention")


def test_unretrofit():
    plain, x = learned("vit"), inputs("vit")
    model = retrofit(copy.deepcopy(plain))
    model(x)
    assert unretrofit(model) is model
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(x).logits, plain(x).logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "_init_weights" not in vars(model.vit)
    retrofit(model)
    with torch.no_grad():
        model.vit.layers[1].hyper_connections.mlp.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"the connections have learned.*vit\.layers\.1\.hyper_connections\.mlp'\]"):
        unretrofit(model)
    assert sum(isinstance(m, BlockConnections) for m in model.modules()) == 2
    with pytest.raises(ValueError, match="is not retrofitted"):
        unretrofit(plain)


def of(*blocks):
    return nn.Sequential(*blocks)


class LlamaDecoderLayer(nn.Module):
    """Nothing but the name."""

    def __init__(self):
        super().__init__()
        self.input_layernorm, self.mlp = nn.LayerNorm(4), nn.Linear(4, 4)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(4), nn.Linear(4, 4)


class Bare(Block):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)


class Shared(Block):
    """A norm whose output two branches read."""

    def __init__(self):
        super().__init__()
        self.norm2 = self.norm1


class Taken(Block):
    def __init__(self):
        super().__init__()
        self.hyper_connections = 3


def twice():
    block = Block()
    return of(block, block)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: of(Unknown(), Unknown()), {}, ValueError, r"no block of a class that is known.*Unknown \(2\)"),
        (lambda: of(Block()), {"block": "GPT2Block"}, ValueError, r"no block GPT2Block; it holds .*Block \(1\)"),
        (lambda: of(Unknown()), {"block": Unknown}, ValueError, r"of '0', a Unknown, are not known.*'norm', 'branch'"),
        (lambda: of(LlamaDecoderLayer()), {}, ValueError, r"it holds no \['self_attn', 'post_attention_layernorm'\]"),
        (lambda: of(Block(), Block(8)), {}, ValueError, r"one width, got \{'0.mix': 16.*'1.mlp': 8"),
        (lambda: of(Block(), nn.Linear(16, 16), Block()), {}, ValueError, "'1', a Linear, stands between blocks"),
        (twice, {}, ValueError, "several times"),
        (lambda: of(Bare()), {}, ValueError, "0.norm1, which begins a branch, holds no parameter"),
        (Block, {}, ValueError, "Block holds no block"),
        (lambda: retrofit(of(Block())), {}, ValueError, "retrofitted already: '0'"),
        (lambda: of(Block()), {"streams": 1}, ValueError, "streams must be at least 2, got 1"),
        (lambda: of(Block()), {"streams": 17}, ValueError, "streams must be between 1 and 16"),
        (lambda: of(Block()), {"epsilon": 1e-6}, ValueError, "epsilon must be 0"),
        (lambda: of(Block()), {"pre_epsilon": 1e-6}, ValueError, "pre_epsilon must be 0"),
        (lambda: of(Block()), {"post_epsilon": 1e-6}, ValueError, "post_epsilon must be 0"),
        (lambda: of(Block()), {"post_scale": 1.0}, ValueError, "post_scale must be above 1"),
        (lambda: of(Block()), {"single_pass": True}, ValueError, "single_pass must be False"),
        (lambda: of(Block()), {"parameters": "old"}, ValueError, "parameters must be one of 'all', 'new'"),
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
        (lambda: of(Block()), {"history": 3, "history_scope": "module"}, ValueError, "history_scope 'global'"),
        (lambda: of(Taken()), {}, ValueError, "'0', a Taken, has an attribute hyper_connections of its own"),
        (lambda: of(Block()), {"block": 3}, TypeError, "block must be a class"),
        (lambda: of(Block()), {"block": Block()}, TypeError, "block must be a class or the name of one, got a Block$"),
        (lambda: of(Shared()), {}, ValueError, "0.norm1, a LayerNorm, begins several branches"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(known, make, options, error, message):
    model = make()
    before = copy.deepcopy(model).state_dict()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(error, match=message):
        retrofit(model, parameters=options.pop("parameters", "new"), **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.requires_grad for p in model.parameters())


def test_bad_calls_are_named(known):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        retrofit("model")
    with pytest.raises(TypeError, match="block must be a subclass"):
        register_block(int, BRANCHES)
    with pytest.raises(ValueError, match="branches must name the residual branches of Block"):
        register_block(Block, {})
    for branches in ({"mlp": "norm"}, {"mlp": ("norm", "linear", "drop")}, [("norm", "linear")]):
        with pytest.raises(TypeError, match="branches must give, by the name of each, the paths of its first and"):
            register_block(Block, branches)
    model = retrofit(Own())
    with pytest.raises(RuntimeError, match="a branch has ended, in a Dropout, that has not begun"):
        model.blocks[0].dropout(torch.ones(2, WIDTH))


def test_two_processes(tmp_path):
    """DistributedDataParallel and fully_shard (FSDP2), with one block of a module by itself."""
    torch.multiprocessing.spawn(train_in_parallel, (tmp_path / "init",), nprocs=2)
