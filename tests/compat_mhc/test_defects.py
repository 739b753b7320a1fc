"""What the published package (`mhc` 0.5.5) gets wrong, each shown to be right here; each test says what it does."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mhc_torch
from mhc_torch import MatrixMHCSkip, MHCBasicBlock, MHCBottleneck, MHCConv2d, MHCSequential, MHCSkip, inject_mhc
from mhc_torch.constraints import project_doubly_stochastic


def mlp(depth=5, width=4, **settings):
    torch.manual_seed(0)
    return MHCSequential([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)], **settings)


def test_1_checkpointing_has_the_right_gradients():
    """Published: the checkpointed closure binds the last layer; relative error 0.91 on the first of three layers."""
    gradients = []
    for use_checkpointing in (False, True):
        stack = mlp(3, use_checkpointing=use_checkpointing)
        x = torch.ones(2, 4, requires_grad=True)
        gradients.append(torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_2_history_carries_gradient_by_default():
    """Published: history is detached, and 50 layers of width 64 give the first one a gradient of 1e-6, against 2e4."""
    norms = []
    for detach_history in (None, True):
        torch.manual_seed(0)
        stack = MHCSequential([nn.Linear(64, 64) for _ in range(50)], detach_history=detach_history)
        stack(torch.randn(8, 64)).sum().backward()
        norms.append(stack.wrapped_modules[0].weight.grad.norm().item())
    assert norms[0] > 1e3
    assert norms[1] < 1e-3


def test_3_injection_mixes_more_than_one_state_by_default():
    """Published: scope "module" sees one state only, so its weight is 1 and the logits get exactly no gradient."""
    torch.manual_seed(0)
    model = inject_mhc(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), nn.Linear)
    model(torch.randn(3, 4)).square().sum().backward()
    assert [part.mhc_skip.live for part in model] == [1, 2, 3, 4]
    assert all(part.mhc_skip.mixing_logits.grad.abs().max() > 0 for part in list(model)[1:])


@pytest.mark.parametrize(
    "block", [lambda: MHCConv2d(4, 4, 3, padding=1), lambda: MHCBasicBlock(4, 4), lambda: MHCBottleneck(16, 4)]
)
def test_4_conv_blocks_forget_between_batches(block):
    """Published: the same evaluation twice differs, and another batch size raises."""
    block = block().eval()
    x = torch.randn(2, 16 if isinstance(block, MHCBottleneck) else 4, 5, 5)
    first = block(x)
    assert torch.equal(block(x), first)
    torch.testing.assert_close(block(x[:1]), first[:1])


def test_6_the_shown_weights_are_those_that_are_used():
    """Published: the callback logs the softmax of all logits, whatever the constraint and the number of states."""
    for constraint, k in itertools.product(("simplex", "identity", "sparse"), (1, 2, 4)):
        skip = MHCSkip(constraint=constraint, epsilon=0.5, init="uniform")
        nn.init.normal_(skip.mixing_logits)
        states = list(torch.eye(k))
        torch.testing.assert_close(skip(torch.zeros(k), states), skip.mixing_weights())


def test_7_projections_train_and_load():
    """Published: an optimizer made before the first forward misses the projection, and its state dict does not load."""
    stack = MHCSequential([nn.Linear(3, 5), nn.Linear(5, 5)], auto_project=True)
    fresh = copy.deepcopy(stack)
    optimizer = torch.optim.AdamW(stack.parameters())
    stack(torch.randn(2, 3)).sum().backward()
    before = stack.skip_layers[0].projection.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(stack.skip_layers[0].projection.weight, before)
    fresh.load_state_dict(stack.state_dict(), strict=True)
    x = torch.randn(2, 3)
    assert torch.equal(fresh(x), stack(x))
    MHCSequential([nn.Linear(3, 3)], auto_project=True).load_state_dict(
        MHCSequential([nn.Linear(3, 3)], auto_project=True).state_dict(), strict=True
    )


@pytest.mark.parametrize("settings", [{}, {"prune_threshold": 0.1, "constraint": "sparse"}, {"mode": "residual"}])
def test_8_compiles_and_exports_whole(settings):
    """Published: `if alpha < threshold` breaks torch.compile(fullgraph=True) and torch.export."""
    stack = mlp(4, init="uniform", **settings)
    x = torch.randn(2, 4)
    expected = stack(x)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(stack, (x,)).module()(x), expected)
    if stack.skip_layers[0].mode != "residual":
        compiled(x).sum().backward()
        assert stack.skip_layers[-1].mixing_logits.grad.abs().max() > 0


def test_8_compiled_code_serves_every_step():
    """One graph for training: no recompilation from one call to the next."""
    stack = mlp(3)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            compiled(torch.randn(2, 4)).sum().backward()


@pytest.mark.parametrize("injected", [False, True])
def test_9_copies_and_pickles_after_a_forward(injected):
    """Published: deep copies fail or share buffers, injected models don't pickle, torch.save stores activations."""
    model = inject_mhc(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear, clear_on_forward=False)
    if not injected:
        model = mlp(clear_history_each_forward=False)
    x = torch.randn(2, 4)
    model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        buffers = [part for part in twin.modules() if isinstance(part, mhc_torch.HistoryBuffer)]
        assert buffers
        assert not any(len(buffer) for buffer in buffers)
        kept = [len(part) for part in model.modules() if isinstance(part, mhc_torch.HistoryBuffer)]
        twin(x)
        assert kept == [len(part) for part in model.modules() if isinstance(part, mhc_torch.HistoryBuffer)]
        twin.clear_history()
        model.clear_history()
        assert torch.equal(twin(x), model(x))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (lambda: mlp(mode="residual", use_gating=True), torch.randn(2, 4)),
        (lambda: mlp(use_gating=True), torch.randn(2, 4)),
        (lambda: MHCBasicBlock(4, 8, stride=2), torch.randn(2, 4, 5, 5)),
        (lambda: MHCConv2d(4, 8, 3), torch.randn(2, 4, 5, 5)),
        (lambda: inject_mhc(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), nn.Linear), torch.randn(2, 4)),
    ],
)
def test_10_every_parameter_takes_part_under_ddp(model, x):
    """Published: residual mode and conv blocks leave parameters without gradient, and DDP stops at the second step."""
    model = DistributedDataParallel(model())
    for _ in range(2):
        model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_11_injection_reaches_the_root_does_not_nest_and_keeps_attributes():
    """Published: a targeted root is missed, a second injection wraps again, and parents cannot read child.weight."""
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    expected = layer(x) + x
    root = inject_mhc(layer, nn.Linear, init="identity")
    torch.testing.assert_close(root(x), expected)
    assert root is layer
    once = dict(root.named_modules())
    inject_mhc(root, nn.Linear)
    assert dict(root.named_modules()) == once
    assert len(root._forward_hooks) == 2  # mix, clear
    assert root.weight.shape == (4, 4)


def test_12_noise_stays_on_the_manifold():
    """Published: the stochastic path is a plain softmax, whatever the constraint."""
    skip = MHCSkip(constraint="identity", epsilon=0.9, stochastic=True, init="uniform")
    for _ in range(20):
        weights = skip(torch.zeros(4), list(torch.eye(4)))
        assert weights[-1] >= 0.9
        assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("field", [{"mode": "x"}, {"init": "x"}, {"epsilon": 2.0}, {"max_history": 0}])
def test_12_wrong_settings_are_refused_at_construction(field):
    """Published: any mode, init, epsilon or max_history is taken, and fails or misleads later."""
    for build in (MHCSkip, lambda **f: MHCSequential([nn.Linear(2, 2)], **f)):
        with pytest.raises(ValueError, match=next(iter(field))):
            build(**field)


def test_13_sinkhorn_survives_underflow():
    """Published: [[0, -200], [0, -200]] gives [[.5, 0], [.5, 0]], whose rows sum to a half."""
    matrix = project_doubly_stochastic(torch.tensor([[0.0, -200.0], [0.0, -200.0]]))
    torch.testing.assert_close(matrix, torch.full((2, 2), 0.5))


def test_14_weights_of_matrix_skips_and_of_early_layers():
    """Published: extract_mixing_weights forgets matrix skips, and shows H weights where fewer states are live."""
    model = nn.ModuleDict({"matrix": MatrixMHCSkip(3), "stack": mlp(3, max_history=3)})
    weights = mhc_torch.extract_mixing_weights(model)
    assert [len(alpha) for alpha in weights.values()] == [3, 1, 2, 3]
    for alpha in weights.values():
        assert alpha.sum().item() == pytest.approx(1, abs=1e-4)
