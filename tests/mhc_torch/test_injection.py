"""Injection into models that were not written for it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

from mhc_torch import MHCSequential, MHCSkip, inject_mhc, inject_mhc_default, mhc_compatible


def bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return BertModel(config), {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": mask}


def resnet():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[3, 3], layer_type="bottleneck")
    return ResNetModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), {"src": torch.randn(2, 5, 16)}


ARCHITECTURES = {
    "bert": (bert, {"target_class_name": "BertLayer"}, [1, 2, 3]),
    "resnet": (resnet, {"target_class_name": "ResNetBottleNeckLayer"}, [0, 1, 2, 0, 1, 2]),
    "encoder": (encoder, {"target_types": nn.Linear}, [0, 0, 1, 1, 2, 2]),
}


def run(model, inputs):
    output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    torch.manual_seed(0)
    make, target, live = ARCHITECTURES[request.param]
    model, inputs = make()
    return model.eval(), inputs, target, live


def test_trains_saves_loads_copies_and_pickles(architecture):
    plain, inputs, target, live = architecture
    model = inject_mhc(copy.deepcopy(plain), init="uniform", **target)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    goal, losses = torch.randn_like(run(model, inputs)), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (run(model, inputs) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    skips = [part for part in model.modules() if isinstance(part, MHCSkip)]
    assert [skip.live for skip in skips] == live
    # One state has weight 1 whatever its logit says; from two on the logits matter.
    assert [bool(skip.mixing_logits.grad.abs().max() > 0) for skip in skips] == [k > 1 for k in live]

    output = run(model, inputs)
    assert torch.equal(run(model, inputs), output)
    assert torch.equal(run(copy.deepcopy(model), inputs), output)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), inputs), output)
    other = inject_mhc(plain, init="uniform", **target)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(other, inputs), output)
    with torch.no_grad():  # torch's fused inference path must not pass the hooks by
        torch.testing.assert_close(run(model, inputs), output)


@pytest.mark.usefixtures("unchecked")
def test_compiles_and_exports_whole(architecture):
    model, inputs, target, _ = architecture
    inject_mhc(model, **target)
    expected = run(model, inputs)
    torch.testing.assert_close(run(torch.export.export(model, (), inputs).module(), inputs), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, inputs), expected, rtol=1e-4, atol=1e-4)


def test_preserve_function_starts_from_the_same_function(architecture):
    plain, inputs, target, _ = architecture
    with torch.no_grad():
        expected = run(plain, inputs)
        kept = run(inject_mhc(copy.deepcopy(plain), preserve_function=True, **target), inputs)
        changed = run(inject_mhc(copy.deepcopy(plain), **target), inputs)
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)
    assert (changed - expected).abs().max() > 0.1


def test_preserved_functions_learn_to_mix():
    torch.manual_seed(0)
    model = inject_mhc(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), nn.Linear, preserve_function=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert model[2].mhc_skip.gain.item() != 0
    assert model[2].mhc_skip.mixing_logits.grad.abs().max() > 0


def test_global_history_is_the_formula():
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    x = torch.randn(2, 4)
    states = [x]
    for layer in plain:
        states.append(layer(states[-1]) + sum(states) / len(states))
    expected = states[-1]
    model = inject_mhc(plain, nn.Linear, max_history=4, init="uniform")
    torch.testing.assert_close(model(x), expected)


def test_states_of_two_widths_each_have_their_history():
    torch.manual_seed(0)
    up, down = nn.Linear(3, 5), nn.Linear(5, 3)
    x = torch.randn(2, 3)
    a = up(x)
    b = down(a)
    c = up(b) + a
    expected = down(c) + b
    model = inject_mhc(nn.Sequential(up, down, up, down), nn.Linear)
    torch.testing.assert_close(model(x), expected)


def test_tied_modules_mix_at_every_call():
    layer = nn.Linear(4, 4)
    model = inject_mhc(nn.Sequential(layer, layer), nn.Linear, init="uniform")
    assert model[0] is model[1]
    x = torch.randn(2, 4)
    bare = nn.functional.linear
    y = bare(x, layer.weight, layer.bias) + x
    torch.testing.assert_close(model(x), bare(y, layer.weight, layer.bias) + (x + y) / 2)


def test_history_can_be_kept_and_cleared_by_hand():
    model = inject_mhc(nn.Sequential(nn.Linear(4, 4)), nn.Linear, clear_on_forward=False, init="uniform")
    x = torch.randn(2, 4)
    first = model(x)
    assert not torch.allclose(model(x), first)
    model.clear_history()
    torch.testing.assert_close(model(x), first)


def test_module_scope_and_detached_history():
    model = inject_mhc(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear, history_scope="module")
    model(torch.randn(2, 4))
    assert [part.mhc_skip.live for part in model] == [1, 1]
    model = inject_mhc(nn.Sequential(nn.Linear(4, 4)), nn.Linear, detach_history=True)
    x = torch.randn(2, 4, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], model[0].weight.sum(0).expand(2, 4))


def test_compatible_modules_and_attention_weights_are_left_alone():
    @mhc_compatible
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

    model = nn.ModuleList([Own(), MHCSequential([nn.Linear(4, 4)]), nn.MultiheadAttention(4, 2), nn.Linear(4, 4)])
    inject_mhc_default(model=model)
    assert [name for name, part in model.named_modules() if name.endswith("mhc_skip")] == ["3.mhc_skip"]


def test_injected_parts_follow_device_and_precision():
    model = inject_mhc(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), (nn.Linear,))
    assert model[0].mhc_skip.mixing_logits.dtype == torch.float64
    half = inject_mhc(nn.Linear(4, 4).bfloat16(), [nn.Linear])
    assert half.mhc_skip.mixing_logits.dtype == torch.float32
    assert half(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


class Dictionary(nn.Module):
    def forward(self, x):
        return {"x": x}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inject_mhc(nn.ReLU(), nn.Linear), ValueError, "ReLU holds no module of"),
        (lambda: inject_mhc(nn.ReLU()), ValueError, "target_types, target_class_name"),
        (lambda: inject_mhc(None, nn.Linear), TypeError, "module must be one"),
        (lambda: inject_mhc(nn.Linear(2, 2), "Linear"), TypeError, "a name goes to target_class_name"),
        (lambda: inject_mhc(nn.Linear(2, 2), nn.Linear, history_scope="all"), ValueError, "history_scope"),
        (lambda: inject_mhc(nn.Linear(2, 2), nn.Linear, depth=3), TypeError, "depth"),
        (lambda: inject_mhc(nn.Sequential(), nn.Sequential), ValueError, "Sequential"),
        (lambda: inject_mhc(Dictionary(), Dictionary)(torch.zeros(2)), TypeError, "Dictionary put out dict"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
