"""MHCSkip, MHCSequential, MatrixMHCSkip and HistoryBuffer against the mathematics, written out in plain loops."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mhc_torch import HistoryBuffer, MatrixMHCSkip, MHCSequential, MHCSkip, mhc_compatible

F64 = torch.float64


def branch():
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh())


def stack_of(depth, make=branch, **settings):
    """A stack in float64 whose logits are random."""
    torch.manual_seed(0)
    stack = MHCSequential([make() for _ in range(depth)], **settings).double()
    for skip in stack.skip_layers:
        nn.init.normal_(skip.mixing_logits)
    return stack


def reference(stack, x, weights_of):
    """x_{l+1} = f_l(x_l) + sum_k weights_of(live logits)_k x_k, one state after the other."""
    window = stack.skip_layers[0].max_history
    states = [x]
    for module, skip in zip(stack.wrapped_modules, stack.skip_layers, strict=True):
        live = states[-window:]
        weights = weights_of(skip.mixing_logits.detach().numpy()[-len(live) :])
        states.append(module(states[-1]) + sum(w * state for w, state in zip(weights, live, strict=True)))
    return states[-1]


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def test_stack_is_the_formula():
    x = torch.randn(2, 3, dtype=F64)
    stack = stack_of(6, max_history=3, temperature=0.7)
    torch.testing.assert_close(stack(x), reference(stack, x, lambda z: softmax(z / 0.7)))


@pytest.mark.parametrize("mode", ["mhc", "hc", "residual"])
@pytest.mark.parametrize("constraint", ["simplex", "identity", "sparse"])
def test_projecting_all_layers_at_once_is_projecting_each(mode, constraint):
    x = torch.randn(2, 3, dtype=F64)
    settings = {"mode": mode, "constraint": constraint, "use_gating": True, "prune_threshold": 0.2, "max_history": 3}
    stack = stack_of(5, **settings)
    states = [x]
    for module, skip in zip(stack.wrapped_modules, stack.skip_layers, strict=True):
        states.append(skip(module(states[-1]), states))
    torch.testing.assert_close(stack(x), states[-1])


@pytest.mark.parametrize("settings", [{}, {"constraint": "identity"}, {"use_gating": True}, {"detach_history": True}])
def test_gradients_of_input_and_all_parameters(settings):
    stack = stack_of(4, max_history=3, **settings)
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    names, values = zip(*stack.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), x)

    if settings.get("detach_history"):  # gradcheck sees the function, which detaching does not change
        gradient = torch.autograd.grad(stack(x).sum(), x)[0]
        through = torch.eye(3, dtype=F64)
        state = x
        with torch.no_grad():
            states = [x]
            for module, skip in zip(stack.wrapped_modules, stack.skip_layers, strict=True):
                linear = module[0]
                slope = 1 - torch.tanh(linear(state)) ** 2
                through = (slope[:, :, None] * linear.weight) @ through
                state = skip(module(state), states)
                states.append(state)
        torch.testing.assert_close(gradient, through.sum(dim=1))
    else:
        assert torch.autograd.gradcheck(call, (x, *values))


def test_second_derivatives_and_functional_transforms():
    stack = stack_of(3)
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(stack, x)
    per_sample = torch.func.vmap(torch.func.grad(lambda row: stack(row[None]).sum()))(x)
    torch.testing.assert_close(per_sample, torch.autograd.grad(stack(x).sum(), x)[0])


def test_only_the_states_are_saved_for_backward():
    """Each (32, 16) tensor that the graph keeps is one of the 6 states or the input of a tanh: no product, no copy."""
    stack = MHCSequential([nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(5)])
    saved = set()

    def pack(tensor):
        if tensor.shape == (32, 16):
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = stack(torch.randn(32, 16))
    assert len(saved) == 5 + 5  # x_0 .. x_4 and the outputs of the five tanh; the last state is the output
    assert output.data_ptr() not in saved


def test_initial_weights():
    torch.testing.assert_close(MHCSkip().mixing_weights(), torch.softmax(torch.tensor([-10.0, -10, -10, 0]), -1))
    torch.testing.assert_close(MHCSkip(init="uniform").mixing_weights(2), torch.full((2,), 0.5))
    skip = MHCSkip(use_gating=True)
    assert skip.gate_logit.item() == 2.0
    assert skip.logits is skip.mixing_logits
    assert list(skip.state_dict()) == ["mixing_logits", "gate_logit"]


def test_live_weights_are_known_before_and_after_the_first_forward():
    stack = MHCSequential([nn.Linear(3, 3) for _ in range(5)], max_history=3)
    assert [len(skip.mixing_weights()) for skip in stack.skip_layers] == [1, 2, 3, 3, 3]
    stack(torch.randn(2, 3))
    assert [skip.live for skip in stack.skip_layers] == [1, 2, 3, 3, 3]


def test_settings_of_one_layer_can_change():
    x = torch.randn(2, 3, dtype=F64)
    stack = stack_of(4, max_history=3)
    hot, last = stack(x), stack.skip_layers[-1]
    last.config = MHCSkip(config=last.config, temperature=0.1).config
    states = [x]
    for module, skip in zip(stack.wrapped_modules, stack.skip_layers, strict=True):
        states.append(skip(module(states[-1]), states))
    torch.testing.assert_close(stack(x), states[-1])
    assert not torch.allclose(stack(x), hot)


def test_pruned_weights_count_as_zero_without_renormalising():
    skip = MHCSkip(prune_threshold=0.3, max_history=3)
    skip.mixing_logits.data = torch.tensor([0.2, 0.5, 0.3]).log()
    torch.testing.assert_close(skip.mixing_weights(), torch.tensor([0.0, 0.5, 0.3]))
    history = [torch.full((1,), v) for v in (100.0, 10.0, 1.0)]
    torch.testing.assert_close(skip(torch.zeros(1), history), torch.tensor([5.3]))


@pytest.mark.parametrize("constraint", ["simplex", "identity", "sparse"])
def test_a_tiny_temperature_picks_the_largest_logit(constraint):
    skip = MHCSkip(constraint=constraint, epsilon=0.0, temperature=2e-38, max_history=3)
    skip.mixing_logits.data = torch.tensor([5.0, 30.0, -2.0])
    assert skip.mixing_weights().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.usefixtures("unchecked")
def test_a_stack_of_no_layers_is_the_identity():
    x = torch.randn(2, 3, requires_grad=True)
    stack = MHCSequential([])
    assert torch.equal(stack(x), x)
    assert torch.autograd.grad(stack(x).sum(), x)[0].tolist() == [[1.0] * 3] * 2
    kept = MHCSequential([], clear_history_each_forward=False)
    assert torch.equal(torch.compile(kept, fullgraph=True, backend="eager")(x), x)
    assert len(kept.history_buffer) == 1


def test_an_infinite_entry_spoils_no_other():
    stack = stack_of(4, nn.Identity, max_history=3)
    x = torch.randn(2, 3, dtype=F64)
    expected = stack(x)
    spoiled = x.clone()
    spoiled[0, 0] = torch.inf
    found = stack(spoiled.requires_grad_())
    assert found[0, 0].item() == torch.inf
    torch.testing.assert_close(found.flatten()[1:], expected.flatten()[1:])


def test_noise_is_only_for_training():
    skip = MHCSkip(stochastic=True, init="uniform")
    history = [torch.randn(3) for _ in range(4)]
    assert not torch.equal(skip(torch.zeros(3), history), skip(torch.zeros(3), history))
    skip.eval()
    assert torch.equal(skip(torch.zeros(3), history), skip(torch.zeros(3), history))


def test_history_across_forwards_when_asked_for():
    torch.manual_seed(0)
    stack = stack_of(2, max_history=3, clear_history_each_forward=False)
    a, b = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    stack(a)
    assert len(stack.history_buffer) == 3
    carried = stack(b)
    stack.clear_history()
    assert len(stack.history_buffer) == 0
    assert not torch.allclose(stack(b), carried)


def test_checkpointing_computes_the_same():
    for stochastic in (False, True):
        gradients = []
        for use_checkpointing in (False, True):
            stack = stack_of(4, use_checkpointing=use_checkpointing, stochastic=stochastic)
            torch.manual_seed(3)
            stack(torch.randn(2, 3, dtype=F64)).sum().backward()
            gradients.append([p.grad for p in stack.parameters()])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, checkpointed)


def test_auto_project_maps_widths_of_vectors_and_images():
    stack = MHCSequential([nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 5)], auto_project=True, init="uniform")
    x = torch.randn(2, 3)
    first, second, third = stack.wrapped_modules
    x1 = first(x) + x @ stack_weight(stack, x, 0).T
    w1 = stack_weight(stack, x, 1)
    x2 = second(x1) + (x @ w1.T + x1) / 2
    x3 = third(x2) + (x @ stack_weight(stack, x, 2).T + x1 + x2) / 3
    torch.testing.assert_close(stack(x), x3)
    image = MHCSkip(auto_project=True)
    assert image(torch.randn(2, 5, 4, 4), [torch.randn(2, 3, 4, 4)]).shape == (2, 5, 4, 4)


def stack_weight(stack, x, layer):
    stack(x)
    return stack.skip_layers[layer].projection.weight


def test_matrix_skip_is_the_last_row():
    torch.manual_seed(0)
    for doubly_stochastic, states in itertools.product((True, False), (1, 3, 6)):
        skip = MatrixMHCSkip(4, doubly_stochastic).double()
        k = min(states, 4)
        matrix = np.exp(skip.mixing_logits.detach().numpy()[-k:, -k:])
        for _ in range(10):
            matrix = matrix / matrix.sum(axis=1, keepdims=True)
            if not doubly_stochastic:
                break
            matrix = matrix / matrix.sum(axis=0, keepdims=True)
        history = [torch.randn(2, 3, dtype=F64) for _ in range(states)]
        x = torch.randn(2, 3, dtype=F64)
        expected = x + sum(w * state for w, state in zip(matrix[-1], history[-k:], strict=True))
        torch.testing.assert_close(skip(x, history), expected)
        torch.testing.assert_close(skip.mixing_weights(), torch.from_numpy(matrix[-1]))


def test_buffer_keeps_the_latest_and_follows_the_module():
    buffer = HistoryBuffer(max_history=2, detach_history=True)
    states = [torch.randn(3, requires_grad=True) for _ in range(3)]
    for state in states:
        buffer.append(state)
    assert len(buffer) == 2
    assert [torch.equal(a, b) for a, b in zip(buffer.get(), states[1:], strict=True)] == [True, True]
    assert not any(state.requires_grad for state in buffer.get())
    buffer.double()
    assert all(state.dtype == F64 for state in buffer.get())
    assert buffer.to("meta").get()[0].device.type == "meta"
    assert not buffer.state_dict()
    buffer.clear()
    assert buffer.get() == []


def test_lower_precision():
    stack = MHCSequential([nn.Linear(4, 4) for _ in range(6)], init="uniform")
    x = torch.randn(8, 4)
    exact = stack(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = stack(x)
    assert mixed.dtype == torch.float32  # the stream keeps the precision it came with, as with x + f(x)
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)
    half = stack.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)
    half.float().sum().backward()
    assert stack.skip_layers[-1].mixing_logits.grad.abs().max() > 0


def test_mark_leaves_the_class_as_it_is():
    @mhc_compatible
    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.buffer = HistoryBuffer()

    layer = Layer(width=3)
    layer.buffer.append(torch.zeros(1))
    layer.clear_history()
    assert isinstance(layer, Layer)
    assert len(layer.buffer) == 0
    with pytest.raises(TypeError, match="decorates subclasses"):
        mhc_compatible(int)


EIGHT_BITS = torch.ones(2, 3).to(torch.float8_e4m3fn)


class Half(nn.Module):
    def forward(self, x):
        return x.half()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MHCSkip()(torch.zeros(2, 3), [torch.zeros(4, 3)]), ValueError, "another batch: call clear_history"),
        (lambda: MHCSkip()(torch.zeros(2, 3), [torch.zeros(2, 5)]), ValueError, "auto_project=True"),
        (lambda: MHCSkip()(torch.zeros(2), [torch.zeros(2, dtype=F64)]), TypeError, "float64"),
        (lambda: MHCSkip()(torch.zeros(2), [torch.zeros(2, device="meta")]), ValueError, "meta"),
        (lambda: MHCSkip(auto_project=True)(torch.zeros(2, 3), [torch.zeros(4, 5)]), ValueError, "the width only"),
        (lambda: MHCSkip()(torch.zeros(2), torch.zeros(2)), TypeError, "history must be a list of tensors, got Tensor"),
        (lambda: MHCSkip()(torch.zeros(2), None), TypeError, "history must be a list of tensors, got NoneType"),
        (lambda: MHCSkip()((torch.zeros(2),), []), TypeError, "output of the branch, must be a tensor, got tuple"),
        (lambda: MHCSkip()(torch.zeros(2), [np.zeros(2)]), TypeError, "got a ndarray in it"),
        (lambda: MatrixMHCSkip()(torch.zeros(2, 3), [torch.zeros(2, 5)]), ValueError, r"\(2, 5\)"),
        (lambda: MHCSkip().mixing_weights(5), ValueError, r"k must be in 0..4, got 5"),
        (lambda: HistoryBuffer(0), ValueError, "max_history must be at least 1, got 0"),
        (lambda: HistoryBuffer().append([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda: MatrixMHCSkip(iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (lambda: MHCSequential([nn.ReLU(), "relu"]), TypeError, "str"),
        (lambda: MHCSequential(nn.ReLU(), nn.ReLU()), TypeError, "modules must be an iterable of modules"),
        (lambda: MHCSequential([nn.ReLU(), nn.Linear(3, 1)])(torch.zeros(2, 3)), ValueError, "auto_project=True"),
        (lambda: MHCSequential([nn.ReLU(), Half()])(torch.zeros(2, 3)), TypeError, "state of torch.float32"),
        (lambda: MHCSequential([])(1.0), TypeError, "x must be a tensor, got float"),
        (lambda: MatrixMHCSkip()(1.0, []), TypeError, "must be a tensor, got float"),
        (
            lambda: MHCSequential([nn.Identity()])(EIGHT_BITS),
            TypeError,
            "x must be bfloat16 or wider, got torch.float8",
        ),
        (lambda: MHCSkip()(EIGHT_BITS, [EIGHT_BITS]), TypeError, "x must be bfloat16 or wider, got torch.float8"),
        (lambda: MHCSkip(temperature=1e-46), ValueError, "temperature must be .* got 1e-46; the least in float32"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_window_of_a_skip_is_as_wide_as_its_logits():
    skip = MHCSkip(max_history=2)
    skip.config = dataclasses.replace(skip.config, temperature=0.5)
    assert skip.temperature == 0.5
    with pytest.raises(ValueError, match=r"config.max_history must stay 2, .*got 4: make a new MHCSkip"):
        skip.config = dataclasses.replace(skip.config, max_history=4)
    assert skip.max_history == 2
