"""Calls as the published package (`mhc` 0.5.5) takes them: understood, or refused in words that say what to write."""

import copy
import importlib.metadata
import re

import mhc.layers
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from mhc_torch import (
    MatrixMHCSkip,
    MHCLightningCallback,
    MHCSequential,
    MHCSkip,
    autocast_context,
    create_training_dashboard,
    inject_mhc,
    plot_gradient_flow,
)


def layers(depth=3, width=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def test_a_number_in_third_place_is_max_history():
    """Published: inject_mhc(model, target_types, max_history, ...)."""
    assert inject_mhc(layers(), nn.Linear, 2)[0].mhc_skip.max_history == 2
    model = inject_mhc(layers(), nn.Linear, 8, clear_on_forward=False, history_scope="module")
    assert model[0].mhc_skip.max_history == 8
    assert model[0].mhc_skip.history_buffer is not model[1].mhc_skip.history_buffer
    with pytest.raises(ValueError, match="max_history must be at least 1, got 0"):
        inject_mhc(layers(), nn.Linear, 0)
    with pytest.raises(TypeError, match=re.escape("max_history must be of type int, got 2.5")):
        inject_mhc(layers(), nn.Linear, 2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear, nn.Conv2d), "target_class_name must be the name of a class, got <class"),
        ((nn.Linear, True), "target_class_name must be the name of a class, got True"),
        ((nn.Linear, 8, True), "give what follows it by name, as clear_on_forward=True"),
        ((nn.Linear, 8, True, "module"), "give what follows it by name, as clear_on_forward=True"),
        ((nn.Linear, None, 4, "module"), "clear_history_each_forward must be of type bool, got 'module'"),
    ],
)
def test_other_things_in_the_places_of_inject_mhc_are_refused(arguments, message):
    model = layers()
    with pytest.raises(TypeError, match=re.escape(message)):
        inject_mhc(model, *arguments)
    assert not hasattr(model[0], "mhc_skip")


@pytest.mark.parametrize(
    ("arguments", "keywords", "name"),
    [
        ((True, 2, "foo"), {}, "log_entropy"),
        ((True, 2), {}, "log_entropy"),
        ((True, True, "foo"), {}, "log_gradients"),
        ((1,), {}, "log_mixing_weights"),
        ((), {"log_interval": 2.0}, "log_interval"),
        ((), {"log_interval": True}, "log_interval"),
        ((), {"prefix": None}, "prefix"),
        ((), {"log_weights": "yes"}, "log_weights"),
    ],
)
def test_the_published_order_of_the_callback_is_refused_by_name(arguments, keywords, name):
    """Published: MHCLightningCallback(log_mixing_weights, log_interval, prefix)."""
    with pytest.raises(TypeError, match=rf"^{name} must be of type .*\(log_mixing_weights, log_interval, prefix\)"):
        MHCLightningCallback(*arguments, **keywords)


# What only the published documentation has.


def test_what_a_buffer_holds_is_mixed_as_documented():
    """docs/guides/advanced_customization.md: mixed_history = buffer.get_mixed(weights=my_learned_weights)."""
    from mhc_torch.layers.managed import HistoryBuffer

    buffer = HistoryBuffer(max_history=3)
    with pytest.raises(ValueError, match="of which there are 0"):
        buffer.get_mixed(weights=[])
    states = [torch.full((2, 3), float(i)) for i in range(4)]
    for state in states:
        buffer.append(state)
    weights = torch.tensor([0.5, 0.25, 2.0], requires_grad=True)
    mixed = buffer.get_mixed(weights=weights)
    torch.testing.assert_close(mixed, torch.full((2, 3), 0.5 * 1 + 0.25 * 2 + 2 * 3))
    mixed.sum().backward()
    torch.testing.assert_close(weights.grad, torch.tensor([6.0, 12.0, 18.0]))
    torch.testing.assert_close(buffer.get_mixed([0, 0, 1]), states[3])
    with pytest.raises(ValueError, match="of which there are 3"):
        buffer.get_mixed(weights[:2])
    buffer.append(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="shape"):
        buffer.get_mixed(weights)


def test_what_is_documented_and_not_there_says_what_to_write():
    with pytest.raises(ImportError, match="ForwardProfiler times modules"):
        from mhc_torch.utils.profiling import PerformanceAudit  # noqa: F401
    with pytest.raises(TypeError, match=r"unknown settings \['dim'\]; those of MatrixConfig are .*max_history"):
        MatrixMHCSkip(dim=64, max_history=4)


def test_the_version_is_in_its_place():
    from mhc_torch.version import __version__

    assert __version__ == importlib.metadata.version("mhc-jax")


# What differs from the published code, in one way or the other.


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("build", [mhc.MHCSkip, mhc.layers.MatrixMHCSkip])
def test_a_history_in_half_precision_mixes(narrow, build):
    """Before: TypeError. The published guide recommends float16 for history buffers."""
    torch.manual_seed(0)
    theirs = build(max_history=3).double()
    nn.init.normal_(theirs.mixing_logits)
    ours = {mhc.MHCSkip: MHCSkip}.get(build, MatrixMHCSkip)(max_history=3).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    history = [torch.randn(2, 5).to(narrow) for _ in range(3)]
    mixed, expected = ours(x, history), theirs(x, [state.double() for state in history])
    assert mixed.dtype == torch.float64
    torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-8)
    found, wanted = (torch.autograd.grad(y.sum(), s.mixing_logits)[0] for y, s in ((mixed, ours), (expected, theirs)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    residual = MHCSkip(mode="residual")(x, history)
    torch.testing.assert_close(residual, x + history[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("settings", [{}, {"mode": "residual"}])
@pytest.mark.usefixtures("unchecked")
def test_a_history_that_would_widen_the_states_is_refused(dtype, settings):
    with pytest.raises(TypeError, match=re.escape(f"history has a state of {dtype}, x is torch.float16")):
        MHCSkip(**settings)(torch.zeros(2, dtype=torch.float16), [torch.zeros(2).to(dtype)])


def test_a_float16_history_does_not_overflow_in_the_gradient_of_its_weights():
    """The sum of 2^16 products of 100 and 1 is beyond float16."""
    skip = MHCSkip(max_history=2, init="uniform")
    x = torch.zeros(2**16)
    skip(x, [torch.full((2**16,), 100.0).half(), torch.zeros(2**16).half()]).sum().backward()
    torch.testing.assert_close(skip.mixing_logits.grad, torch.tensor([1.0, -1.0]) * 25 * 2**16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_autocast_changes_nothing_where_there_is_no_cuda():
    """Before: bfloat16 by default, without a word, and RuntimeError for "cuda"."""
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    for arguments in ((), ("cuda",), ("cuda", torch.float16)):
        with autocast_context(*arguments):
            assert layer(x).dtype == torch.float32
    with autocast_context("cpu"):
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="nowhere"), autocast_context("nowhere"):
        pass


@pytest.mark.parametrize(("branch", "x"), [(nn.Linear(3, 5), (2, 3)), (nn.Conv2d(3, 5, 1), (2, 3, 4, 4))])
def test_parameters_are_counted_before_the_first_forward(branch, x):
    """Before: ValueError from the projection, whose shape is not known yet."""
    stack = MHCSequential([copy.deepcopy(branch)], auto_project=True)
    own = sum(p.numel() for p in branch.parameters()) + 4
    assert sum(p.numel() for p in stack.parameters()) == own
    twin = copy.deepcopy(stack)
    stack(torch.randn(x))
    assert sum(p.numel() for p in stack.parameters()) == own + 15
    assert type(stack.skip_layers[0].projection.weight) is nn.Parameter
    twin.load_state_dict(stack.state_dict())
    assert sum(p.numel() for p in twin.parameters()) == own + 15


def test_projections_take_spectral_norm_after_the_first_forward():
    """docs/guides/advanced_customization.md, for a projection that is an nn.Linear there."""
    stack = MHCSequential([nn.Linear(3, 5)], auto_project=True, init="uniform", max_history=1)
    stack(torch.randn(2, 3))
    projection = stack.skip_layers[0].projection
    spectral_norm(projection, n_power_iterations=20)
    x = torch.randn(2, 3)
    expected = torch.linalg.matrix_norm(projection.weight, 2)
    torch.testing.assert_close(stack(x), stack.wrapped_modules[0](x) + x @ projection.weight.T)
    assert expected.item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inject_mhc(layers(), nn.Conv2d, 4), ValueError, r"holds no module of \['Conv2d'\]"),
        (lambda: create_training_dashboard({}), ValueError, "metrics_dict is empty"),
        (lambda: plot_gradient_flow(layers(), torch.ones(1, 4), target=torch.ones(1)), ValueError, "needs a loss_fn"),
    ],
)
def test_what_the_published_package_passes_over_in_silence_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Options that are set after construction.


@pytest.mark.usefixtures("unchecked")
def test_annealing_reaches_code_that_is_compiled():
    stack = MHCSequential([nn.Linear(3, 3) for _ in range(4)], init="uniform")
    nn.init.normal_(stack.skip_layers[2].mixing_logits)
    compiled, x = torch.compile(copy.deepcopy(stack), backend="eager", fullgraph=True), torch.randn(2, 3)
    before = compiled(x)
    for temperature in (1.0, 0.5, 0.1):
        stack.skip_layers[2].temperature = compiled.skip_layers[2].temperature = temperature
        torch.testing.assert_close(compiled(x), stack(x))
    assert not torch.allclose(compiled(x), before)


def test_options_of_a_buffer_are_checked_when_they_are_set():
    """Before: max_history = 0 kept every state."""
    stack = MHCSequential([nn.Linear(3, 3)], clear_history_each_forward=False, max_history=4)
    buffer = stack.history_buffer
    for value, error in ((0, ValueError), (2.5, TypeError), ("4", TypeError)):
        with pytest.raises(error, match="max_history must be"):
            buffer.max_history = value
    with pytest.raises(TypeError, match="detach_history must be of type bool, got 'no'"):
        buffer.detach_history = "no"
    x = torch.randn(2, 3, requires_grad=True)
    stack(x)
    buffer.max_history, buffer.detach_history = 1, True
    stack(x)
    assert len(buffer) == 1
    assert not buffer.get()[0].requires_grad
