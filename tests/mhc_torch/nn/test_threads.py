"""A forward owns its states: several threads, forwards within forwards, and forwards that fail."""

import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mhc_torch import (
    HistoryBuffer,
    MatrixMHCSkip,
    MHCBasicBlock,
    MHCConv2d,
    MHCSequential,
    inject_mhc,
    native,
    share_history,
)

THREADS = 4


class Gate(nn.Module):
    """The identity, at which all threads wait for each other: each forward is in the middle while the others run."""

    def __init__(self):
        super().__init__()
        self.barrier = None
        self.inner = None

    def forward(self, x):
        if self.barrier is not None:
            self.barrier.wait(timeout=30)
        if self.inner is not None:
            inner, self.inner = self.inner, None
            inner()
        return 1.0 * x


class Tower(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack():
    return MHCSequential([nn.Linear(4, 4), Gate(), nn.Linear(4, 4), nn.Linear(4, 4)], init="uniform")


def kept_stack():
    model = stack()
    model.clear_history_each_forward = False
    return model


def injected(**settings):
    layers = [nn.Linear(4, 4), Gate(), nn.Linear(4, 4), nn.Linear(4, 4)]
    return inject_mhc(Tower(layers), nn.Linear, init="uniform", **settings)


def blocks():
    """Conv blocks alone, the gate inside of one."""
    block = MHCBasicBlock(4, 4)
    block.relu = nn.Sequential(nn.ReLU(), Gate())
    return Tower([nn.Unflatten(1, (4, 1, 1)), block, MHCConv2d(4, 4, 1), nn.Flatten()])


def shared_blocks(**settings):
    return share_history(blocks(), **settings)


MODELS = {
    "stack": stack,
    "injected": injected,
    "injected, a history each": lambda: injected(history_scope="module"),
    "blocks": blocks,
    "shared blocks": shared_blocks,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def gate_of(model):
    return next(part for part in model.modules() if isinstance(part, Gate))


def inputs(count):
    torch.manual_seed(1)
    return [torch.randn(2, 4) for _ in range(count)]


def held(model):
    return [len(part) for part in model.modules() if isinstance(part, HistoryBuffer)]


def test_threads_share_a_model(model):
    xs, gate = inputs(THREADS), gate_of(model)
    expected = [model(x) for x in xs]
    gate.barrier = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        for ours, alone in zip(pool.map(model, xs), expected, strict=True):
            assert torch.equal(ours, alone)
    assert not any(held(model))


def test_a_forward_within_a_forward(model):
    first, second = inputs(2)
    outer, inner = model(first), model(second)
    found = []
    gate_of(model).inner = lambda: found.append(model(second))
    assert torch.equal(model(first), outer)
    assert torch.equal(found[0], inner)


def test_replicas_as_of_data_parallel(model):
    # What DataParallel does on GPUs: shallow copies of every module, each called by a thread.
    xs = inputs(THREADS)
    expected = [model(x) for x in xs]
    gate_of(model).barrier = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda x: replica(model, {})(x), xs))
    for ours, alone in zip(found, expected, strict=True):
        assert torch.equal(ours, alone)


def replica(module, done):
    if module not in done:
        done[module] = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(done[module], name, parameter)
        done[module]._modules = {name: child and replica(child, done) for name, child in module._modules.items()}
    return done[module]


class Failure(Exception):
    pass


def fail():
    raise Failure


def test_a_forward_that_fails_leaves_nothing_behind(model):
    x, other = inputs(2)
    expected, alone = model(x), next(part for part in model.modules() if isinstance(part, nn.Linear | MHCConv2d))
    small = torch.randn(2, 4, 1, 1) if isinstance(alone, MHCConv2d) else other
    part = alone(small)
    reset(model)
    gate_of(model).inner = fail
    with pytest.raises(Failure):
        model(other)
    assert not any(held(model))
    assert torch.equal(alone(small), part)  # a part called by itself meets no states either
    reset(model)
    assert torch.equal(model(x), expected)


def reset(model):
    for part in model.modules():
        if isinstance(part, HistoryBuffer):
            part.clear()


KEEPING = {
    "stack": kept_stack,
    "injected": lambda: injected(clear_on_forward=False),
    "shared blocks": lambda: shared_blocks(clear_on_forward=False),
}


@pytest.mark.parametrize("kind", KEEPING)
def test_a_history_that_is_kept_forgets_the_forward_that_failed(kind):
    torch.manual_seed(0)
    model = KEEPING[kind]().eval()
    x, other = inputs(2)
    model(x)
    kept = held(model)
    assert any(kept)
    carried = model(other)
    reset(model)
    model(x)
    gate_of(model).inner = fail
    with pytest.raises(Failure):
        model(torch.randn(2, 4))
    assert held(model) == kept
    assert torch.equal(model(other), carried)


def test_a_pre_hook_that_fails_ends_no_other_forward():
    model = injected()
    first, second = inputs(2)
    outer = model(first)

    def nested():
        handle = model.register_forward_pre_hook(lambda *_: fail())
        with pytest.raises(Failure):
            model(second)
        handle.remove()

    gate_of(model).inner = nested
    assert torch.equal(model(first), outer)


def test_copies_and_pickles_made_in_the_middle_of_a_forward():
    model, copies = injected(), []
    (x,) = inputs(1)
    expected = model(x)
    gate_of(model).inner = lambda: copies.extend([copy.deepcopy(model), pickle.loads(pickle.dumps(model))])
    assert torch.equal(model(x), expected)
    for twin in copies:
        assert not any(held(twin))
        assert torch.equal(twin(x), expected)


def test_gradients_of_threads_and_of_checkpoints(model):
    xs, parameters = inputs(THREADS), [p for p in model.parameters() if p.requires_grad]

    def gradients(x):
        return torch.autograd.grad(model(x).square().sum(), parameters, allow_unused=True, materialize_grads=True)

    expected = [gradients(x) for x in xs]
    gate_of(model).barrier = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        for ours, alone in zip(pool.map(gradients, xs), expected, strict=True):
            torch.testing.assert_close(ours, alone)
    gate_of(model).barrier = None
    loss = checkpoint(model, xs[0], use_reentrant=False).square().sum()
    again = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(again, expected[0])
    assert not any(held(model))


def test_matrix_skips_in_threads_with_windows_of_different_length():
    skip, barrier = MatrixMHCSkip(4), threading.Barrier(2)
    windows = [[torch.randn(3) for _ in range(k)] for k in (1, 4)]
    x = torch.randn(3)
    expected = [skip(x, window) for window in windows]
    setter = MatrixMHCSkip.__setattr__

    class Waiting(MatrixMHCSkip):
        def __setattr__(self, name, value):
            setter(self, name, value)
            if name == "live" and barrier.parties == 2 and threading.current_thread() is not threading.main_thread():
                barrier.wait(timeout=30)

    skip.__class__ = Waiting
    with ThreadPoolExecutor(2) as pool:
        for ours, alone in zip(pool.map(lambda window: skip(x, window), windows), expected, strict=True):
            assert torch.equal(ours, alone)


def test_threads_make_the_projection_once(monkeypatch):
    """The first forward gives it its width; the one that comes second must not meet it without numbers, nor anew."""
    model = MHCSequential([nn.Linear(3, 4)], auto_project=True)
    weight, made, barrier = model.skip_layers[0].projection.weight, [], threading.Barrier(2)
    fill = nn.init.kaiming_uniform_

    def slowly(tensor, **settings):
        made.append(tensor)
        started.set()
        barrier.wait(timeout=0.5) if len(made) == 2 else threading.Event().wait(0.2)
        return fill(tensor, **settings)

    started = threading.Event()
    monkeypatch.setattr(nn.init, "kaiming_uniform_", slowly)
    x = torch.randn(2, 3)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(model, x)
        assert started.wait(timeout=30)
        second = pool.submit(model, x)
        assert torch.equal(first.result(), second.result())
    assert len(made) == 1
    assert model.skip_layers[0].projection.weight is weight


def test_threads_load_the_compiled_nodes_once(compiled_nodes):
    program = """
import importlib.util, threading, time
from mhc_torch import native
load_module = importlib.util.module_from_spec
importlib.util.module_from_spec = lambda spec: time.sleep(0.1) or load_module(spec)
barrier, found = threading.Barrier(8), []
def load():
    barrier.wait()
    found.append(native.nodes())
threads = [threading.Thread(target=load) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 8 and len(set(map(id, found))) == 1 and found[0] is not None, found
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert native.nodes() is not None
