"""Derivatives of MHCSequential, whose layers share their work, against the same sums left to autograd."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from mhc_torch import MHCSequential, native
from tests.mhc_torch.nn.test_layers import branch, stack_of

F64 = torch.float64


@pytest.fixture(autouse=True, params=["python", "compiled"])
def nodes(request, monkeypatch):
    """Every test runs on both kinds of nodes, where a compiler has made the second."""
    if request.param == "python":
        monkeypatch.setattr(native, "nodes", lambda: None)
    else:
        request.getfixturevalue("compiled_nodes")
    return request.param


def plain_states(stack, x):
    """All states, as a differentiable loop over the formula."""
    window = stack.skip_layers[0].max_history
    states = [x]
    for module, skip in zip(stack.wrapped_modules, stack.skip_layers, strict=True):
        live = states[-window:]
        weights = torch.softmax(skip.mixing_logits[-len(live) :], 0)
        states.append(module(states[-1]) + sum(w * state for w, state in zip(weights, live, strict=True)))
    return states


def states_of(stack, x):
    """All states of one forward of the stack itself."""
    states = [x]
    handles = [skip.register_forward_hook(lambda *call: states.append(call[2])) for skip in stack.skip_layers]
    stack(x)
    for handle in handles:
        handle.remove()
    return states


def leaf(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


@pytest.mark.parametrize(("depth", "max_history"), [(1, 4), (2, 4), (7, 1), (7, 3), (9, 4), (12, 6), (12, 8)])
def test_gradients_at_any_depth_and_window(depth, max_history):
    stack, x = stack_of(depth, max_history=max_history), leaf(2, 3)
    leaves = [x, *stack.parameters()]
    ours = torch.autograd.grad(stack(x).square().sum(), leaves)
    loss = plain_states(stack, x)[-1].square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def test_a_loss_on_states_in_the_middle():
    stack, x = stack_of(7, max_history=3), leaf(2, 3)

    def loss(states):
        return states[3].square().sum() + states[6].sin().sum()  # the last layer has no part in it

    leaves = [x, *(p for i in range(6) for p in (*stack.wrapped_modules[i].parameters(), stack.skip_layers[i].logits))]
    ours = torch.autograd.grad(loss(states_of(stack, x)), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(plain_states(stack, x)), leaves))


def test_one_graph_serves_several_passes():
    stack, x = stack_of(6, max_history=3), leaf(2, 3)
    states, plain = states_of(stack, x), plain_states(stack, x)
    leaves = [x, stack.skip_layers[1].logits, stack.wrapped_modules[2][0].weight]
    for at in (6, 4, 6):  # a pass that starts further down must not meet what an earlier one left
        ours = torch.autograd.grad(states[at].square().sum(), leaves, retain_graph=True)
        expected = torch.autograd.grad(plain[at].square().sum(), leaves, retain_graph=True)
        torch.testing.assert_close(ours, expected)
    # One that ends before the weights leaves its cotangents behind, and the next begins below them.
    inner = [stack.wrapped_modules[3][0].weight]
    for at, wanted in ((6, inner), (4, leaves)):
        ours = torch.autograd.grad(states[at].square().sum(), wanted, retain_graph=True)
        expected = torch.autograd.grad(plain[at].square().sum(), wanted, retain_graph=True)
        torch.testing.assert_close(ours, expected)
    only = torch.autograd.grad(states[-1].sum(), inner)
    torch.testing.assert_close(only, torch.autograd.grad(plain[-1].sum(), inner))


def test_second_derivatives_of_everything():
    stack, x = stack_of(5, max_history=3), leaf(2, 3)
    names, values = zip(*stack.named_parameters(), strict=True)

    def output(x, *values):
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(output, (x, *values))


def test_a_batch_of_cotangents():
    stack, x = stack_of(5, max_history=3), leaf(2, 3)
    rows = torch.eye(6, dtype=F64).reshape(6, 2, 3)
    leaves = [x, stack.skip_layers[2].logits]
    ours = torch.autograd.grad(stack(x), leaves, rows, is_grads_batched=True)
    expected = torch.autograd.grad(plain_states(stack, x)[-1], leaves, rows, is_grads_batched=True)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("change", ["replace", "detach"])
def test_a_hook_may_put_another_state_in_place(change):
    stack, x = stack_of(6, max_history=3), leaf(2, 3)

    def changed(y):
        return 2 * y if change == "replace" else y.detach()

    stack.skip_layers[2].register_forward_hook(lambda skip, args, y: changed(y))
    states = [x]
    for index, (module, skip) in enumerate(zip(stack.wrapped_modules, stack.skip_layers, strict=True)):
        live = states[-3:]
        weights = torch.softmax(skip.mixing_logits[-len(live) :], 0)
        y = module(states[-1]) + sum(w * state for w, state in zip(weights, live, strict=True))
        states.append(changed(y) if index == 2 else y)
    leaves = [x, *stack.parameters()]
    ours = torch.autograd.grad(stack(x).square().sum(), leaves, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(states[-1].square().sum(), leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("frozen", ["logits", "some logits", "first layers", "branches"])
def test_frozen_parts(frozen):
    stack, x = stack_of(6, max_history=3), torch.randn(2, 3, dtype=F64)
    for name, parameter in stack.named_parameters():
        layer = int(name.split(".")[1])
        parameter.requires_grad_(
            {
                "logits": "logits" not in name,
                "some logits": "logits" not in name or layer % 2 == 0,
                "first layers": layer >= 3,
                "branches": "logits" in name,
            }[frozen]
        )
    # The first layer's only state has weight 1, whatever its logit.
    leaves = [p for n, p in stack.named_parameters() if p.requires_grad and n != "skip_layers.0.mixing_logits"]
    ours = torch.autograd.grad(stack(x).square().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(plain_states(stack, x)[-1].square().sum(), leaves))


def test_a_stack_in_which_nothing_learns():
    y = stack_of(5).requires_grad_(False)(torch.randn(2, 3, dtype=F64))
    assert not y.requires_grad


def test_states_of_any_memory_layout_keep_it():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(5)]
    stack = MHCSequential(convolutions, max_history=3).to(F64, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 4, 5, dtype=F64).to(memory_format=torch.channels_last).requires_grad_()
    y = stack(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    leaves = [x, *(skip.logits for skip in stack.skip_layers[1:]), convolutions[0].weight]
    expected = torch.autograd.grad(plain_states(stack, x)[-1].square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_graph_is_freed_without_the_garbage_collector(create_graph):
    # A graph in a cycle keeps its memory until the collector happens to run: steps then grow the heap by turns.
    stack = stack_of(6, marked, max_history=3)
    y = stack(leaf(2, 3))
    layers = weakref.WeakSet(_nodes(y.grad_fn))
    gradients = torch.autograd.grad(y.square().sum(), list(stack.parameters()), create_graph=create_graph)
    gc.disable()
    try:
        del y, gradients
        assert not layers
    finally:
        gc.enable()


class Back(torch.autograd.Function):
    """The identity, with any function in place of its derivative: a node that Python can refer to."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.back = back
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None


def marked():
    """A branch with a node of Python in its graph."""
    module = branch()
    module.register_forward_hook(lambda module, args, y: Back.apply(y, lambda gradient: gradient))
    return module


def _nodes(node):
    """Those nodes of a graph that Python made."""
    found, left = [], [node]
    while left:
        node = left.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.append(node)
        left += [following for following, _ in node.next_functions if following is not None]
    assert found
    return found


def gradients_of(output, leaves, reduction="mean"):
    loss = getattr(output.square(), reduction)()
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("max_history", [4, 7])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.bfloat16, 0.2)])
def test_large_states_in_single_and_half_precision(dtype, error, max_history, two_threads):
    # More numbers than one thread takes, and than one piece; against float64.
    exact = stack_of(9, lambda: nn.Linear(33, 33), max_history=max_history)
    rough = copy.deepcopy(exact).to(dtype)
    x = torch.randn(2501, 33, dtype=F64)
    y, expected = rough(x.to(dtype)), plain_states(exact, x)[-1]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=error, atol=error * expected.std().item())
    found = gradients_of(y, list(rough.parameters()))
    wanted = gradients_of(expected, list(exact.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5 * error * theirs.abs().max().item() + 1e-12)


@pytest.mark.parametrize("of", ["input", "branch", "gradient"])
def test_tensors_that_do_not_fill_their_memory(of):
    stack = stack_of(6, max_history=3)
    x = leaf(3).expand(4, 3) if of == "input" else leaf(4, 3)
    if of == "branch":
        stack.wrapped_modules[2].register_forward_hook(lambda module, args, y: y[:1].expand(4, 3))
        stack.wrapped_modules[4].register_forward_hook(lambda module, args, y: y.t().contiguous().t())

    def loss(y):
        return y.sum() if of == "gradient" else y.square().sum()

    leaves = [x, *(p for n, p in stack.named_parameters() if n != "skip_layers.0.mixing_logits")]
    ours = torch.autograd.grad(loss(stack(x)), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(plain_states(stack, x)[-1]), leaves))


@pytest.mark.parametrize("view", ["expanded", "every other column", "empty"])
def test_states_that_are_all_views(view):
    stack = stack_of(3, nn.Identity, max_history=3)
    whole = leaf(0, 6) if view == "empty" else leaf(1, 6)
    x = whole.expand(4, 6) if view == "expanded" else whole[:, ::2]
    y, expected = stack(x), plain_states(stack, x)[-1]
    torch.testing.assert_close(y, expected)
    leaves = [whole, *(skip.logits for skip in stack.skip_layers[1:])]
    torch.testing.assert_close(gradients_of(y, leaves, "sum"), gradients_of(expected, leaves, "sum"))


def test_complex_states():
    stack = stack_of(4, nn.Tanh, max_history=3)
    x = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    leaves = [x, *(skip.logits for skip in stack.skip_layers[1:])]
    ours = torch.autograd.grad(stack(x).abs().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(plain_states(stack, x)[-1].abs().sum(), leaves))


def test_a_state_whose_gradient_is_none():
    stack, x = stack_of(5, max_history=3), leaf(2, 3)
    leaves = [x, stack.wrapped_modules[0][0].weight, stack.skip_layers[3].logits]
    gradients = torch.autograd.grad(Back.apply(stack(x), lambda _: None).sum(), leaves, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_forward_mode_differentiation():
    stack, x, tangent = stack_of(6, max_history=3), torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(stack(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6 * tangent
    torch.testing.assert_close(found, (stack(x + step) - stack(x - step)) / 2e-6, rtol=1e-6, atol=1e-8)


def test_two_threads_go_back_through_one_graph():
    stack, x = stack_of(12, max_history=4), leaf(2, 3)
    y, leaves = stack(x), [x, *stack.parameters()]

    def gradients(scale):
        return torch.autograd.grad((scale * y).sum(), leaves, retain_graph=True)

    expected = gradients(1.0)
    with ThreadPoolExecutor(2) as pool:
        for scale, found in enumerate(pool.map(gradients, [1.0, 2.0] * 20)):
            torch.testing.assert_close(found, [(1 + scale % 2) * gradient for gradient in expected])


def test_shapes_alone():
    with FakeTensorMode():
        stack = MHCSequential([nn.Linear(3, 3) for _ in range(6)], max_history=3)
        x = torch.randn(2, 3, requires_grad=True)
        stack(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(parameter.grad.shape == parameter.shape for parameter in stack.parameters())


class _Marked(torch.Tensor):
    pass


def test_a_subclass_of_tensor_stays_one():
    y = stack_of(3)(torch.randn(2, 3, dtype=F64).as_subclass(_Marked))
    assert type(y) is _Marked
    y.sum().backward()


def test_a_state_that_was_changed_in_place():
    stack, x = stack_of(5, max_history=3), leaf(2, 3)
    states = states_of(stack, x)
    with torch.no_grad():
        states[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states[-1].sum().backward()


def test_what_a_pass_needs_is_gone_when_it_ends():
    # A pass over the last layers does not come to the first; the graph stays for the next one.
    stack, x = MHCSequential([nn.Identity() for _ in range(4)], max_history=2), torch.randn(1 << 20, requires_grad=True)
    states, process = states_of(stack, x), psutil.Process()
    before = process.memory_info().rss
    for _ in range(40):  # 4 MB a cotangent
        torch.autograd.grad(states[-1].sum(), states[2], retain_graph=True)
    assert process.memory_info().rss - before < 80e6


def test_compiled_nodes_take_the_place_of_operators(nodes):
    if nodes == "python":
        pytest.skip("these are made of operators")
    stack = MHCSequential([nn.Identity() for _ in range(30)]).double()
    x = leaf(2, 3)
    with torch.autograd.profiler.profile(use_cpu=True) as profile:
        stack(x).sum().backward()
    called = {event.key: event.count for event in profile.key_averages()}
    assert called["aten::add"] == 30  # autograd's own: the gradients of a state
    assert sum(called.get(f"aten::{name}", 0) for name in ("add_", "mul", "mv", "sum", "copy_")) < 10


def test_a_pass_that_fails_keeps_nothing():
    def fail(gradient):
        raise ValueError("no gradient today")

    stack, x = stack_of(5, marked, max_history=3), leaf(2, 3)
    y = stack(Back.apply(x, fail))
    layers = weakref.WeakSet(_nodes(y.grad_fn))
    with pytest.raises(ValueError, match="no gradient today"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
    del y
    gc.collect()
    assert not layers


def test_tracers_see_every_operation():
    stack, x, other = stack_of(4, max_history=3), torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    for traced in (torch.jit.trace(stack, x), make_fx(stack)(x)):
        torch.testing.assert_close(traced(other), stack(other))


def test_a_backward_pass_under_autocast_rounds_no_state():
    stack, x = stack_of(6, nn.Identity).float(), torch.randn(2, 64, requires_grad=True)
    expected = gradients_of(plain_states(stack, x)[-1], [x])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients_of(stack(x), [x]), expected)


def test_a_hook_that_changes_a_gradient_in_place(nodes):
    stack, x = stack_of(6, max_history=3), leaf(2, 3)
    plain = stack.wrapped_modules[3].register_forward_hook(lambda module, args, y: _half(y, in_place=False))
    expected = torch.autograd.grad(stack(x).sum(), x)
    plain.remove()
    stack.wrapped_modules[3].register_forward_hook(lambda module, args, y: _half(y, in_place=True))
    if nodes == "compiled":  # which keeps no copy
        with pytest.raises(RuntimeError, match=r"gradient of layer 3 was changed in place.*return a new tensor"):
            stack(x).sum().backward()
    else:
        torch.testing.assert_close(torch.autograd.grad(stack(x).sum(), x), expected)


def _half(y, in_place):
    y.register_hook(lambda gradient: gradient.mul_(0.5) if in_place else 0.5 * gradient)


def test_memory_of_states_is_hidden_from_nobody():
    # What is saved passes through the hooks that offload and checkpoint activations: each state once.
    stack, x = stack_of(6, nn.Identity, max_history=3), leaf(2, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        states = states_of(stack, x)
    assert [saved.count(state.data_ptr()) for state in states] == [1] * 6 + [0]
    inner = list(stack.parameters())
    ours = torch.autograd.grad(checkpoint(stack, x, use_reentrant=False).square().sum(), [x, *inner])
    torch.testing.assert_close(ours, torch.autograd.grad(stack(x).square().sum(), [x, *inner]))


@pytest.mark.parametrize("by_hand", [False, True])
def test_logits_of_large_states_in_half_precision(by_hand):
    # One product of two states is beyond 65504, the largest float16.
    stack = stack_of(5, nn.Identity, max_history=3)
    rough = copy.deepcopy(stack).float()
    x = 300 * torch.randn(4, 64, dtype=F64)
    x_half = x.half().requires_grad_()

    def states_by_hand():
        states = [x_half]
        for skip in rough.skip_layers:
            states.append(skip(states[-1], states))
        return states[-1]

    y = states_by_hand() if by_hand else rough(x_half)
    cotangent = torch.randn(4, 64, dtype=F64) * 10
    found = torch.autograd.grad(y, [x_half, *rough.parameters()], cotangent.half())
    exact = x_half.detach().double().requires_grad_()
    wanted = torch.autograd.grad(
        plain_states(stack, exact)[-1],
        [exact, *stack.parameters()],
        cotangent.half().double(),
        allow_unused=True,
        materialize_grads=True,
    )
    for ours, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=0.01 * scale + 1e-3 * (scale == 0))


def test_shapes_alone_on_the_meta_device():
    stack = MHCSequential([nn.Linear(3, 3) for _ in range(4)], max_history=3).to("meta")
    stack(torch.empty(2, 3, device="meta")).sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in stack.parameters())
