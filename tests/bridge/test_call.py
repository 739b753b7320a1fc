"""JAX in torch and torch in JAX: values, derivatives of every input, and the traps of shared memory."""

import copy
import multiprocessing
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

from bridge import JaxFunction, JaxModule, torch_function
from tests.bridge import pairs


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def twisted(tree: dict, *, power: int, shift: float = 0.5) -> dict:
    x, (w, i) = tree["x"], tree["rest"]
    return {"y": [jnp.tanh(x @ w) ** power + shift], "i": i + 1, "total": ((x * w).sum(),)}


def twisted_torch(tree: dict, *, power: int, shift: float = 0.5) -> dict:
    x, (w, i) = tree["x"], tree["rest"]
    return {"y": [torch.tanh(x @ w) ** power + shift], "i": i + 1, "total": ((x * w).sum(),)}


def test_pytrees_keywords_and_gradients_of_all_inputs() -> None:
    x, w = tensors((4, 4), (4, 4))
    tree = {"x": x, "rest": (w, torch.arange(3, dtype=torch.int32))}
    ours, theirs = JaxFunction(twisted)(tree, power=3), twisted_torch(tree, power=3)
    assert ours.keys() == theirs.keys()
    assert isinstance(ours["y"], list)
    assert isinstance(ours["total"], tuple)
    torch.testing.assert_close(ours, theirs)
    assert not ours["i"].requires_grad
    losses = [(out["y"][0] * torch.arange(4.0)).sum() + 2 * out["total"][0] for out in (ours, theirs)]
    found, expected = (torch.autograd.grad(loss, [x, w]) for loss in losses)
    torch.testing.assert_close(found, expected)


def test_first_and_second_derivatives_by_finite_differences() -> None:
    with jax.enable_x64(True):
        function = JaxFunction(lambda x, w: jnp.tanh(x @ w))
        x, w = tensors((2, 3), (3, 2), dtype=torch.float64)
        assert torch.autograd.gradcheck(function, (x, w))
        assert torch.autograd.gradgradcheck(function, (x, w))


def test_function_transforms() -> None:
    function = JaxFunction(lambda x, i: (jnp.sin(x), i + 1))
    (x,) = tensors((4, 4))
    i = torch.arange(3, dtype=torch.int32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return function(x, i)[0].sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.cos(x))
    torch.testing.assert_close(torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x), -torch.sin(x))


@pytest.mark.usefixtures("unchecked")
def test_one_opaque_operation_under_torch_compile() -> None:
    function = JaxFunction(twisted)
    x, w = tensors((4, 4), (4, 4))
    i = torch.arange(3, dtype=torch.int32)

    def step(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = function({"x": x.sin(), "rest": (w, i)}, power=2)
        return out["y"][0].cos() + out["total"][0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), step(x, w))
    found, expected = (torch.autograd.grad(f(x, w).sum(), [x, w]) for f in (compiled, step))
    torch.testing.assert_close(found, expected)


def test_compiles_once_for_each_signature() -> None:
    traced = []

    def function(x: jax.Array, power: int) -> jax.Array:
        traced.append((x.shape, power))
        return x**power

    call = JaxFunction(function)
    call(torch.ones(2), 2)
    once = len(traced)
    for _ in range(3):
        call(torch.ones(2), 2)
    assert len(traced) == once
    call(torch.ones(3), 2)
    call(torch.ones(2), 3)
    assert set(traced) == {((2,), 2), ((3,), 2), ((2,), 3)}


def test_tensors_that_dlpack_refuses() -> None:
    double = JaxFunction(lambda x: 2 * x)
    base = torch.arange(24.0).reshape(4, 6)
    for view in (base[:, 1:4:2], base.T, base[0].expand(3, 6), base[1:, 1:], torch.empty(0, 3), torch.tensor(1.5)):
        torch.testing.assert_close(double(view), 2 * view)
    leaf = torch.ones(3, requires_grad=True)
    double(leaf).sum().backward()  # the cotangent of a sum is an expanded view
    torch.testing.assert_close(leaf.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool])
def test_dtypes_cross_unchanged(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 2, 100]).to(dtype)
    y = JaxFunction(lambda x: x[::-1])(x)
    assert y.dtype == dtype
    assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_64_bits_are_refused_rather_than_truncated(dtype: torch.dtype) -> None:
    identity = JaxFunction(lambda x: x)
    x = torch.tensor([2**40 + 1]).to(dtype)
    with pytest.raises(TypeError, match="truncate"):
        identity(x)
    with jax.enable_x64(True):
        assert torch.equal(identity(x), x)


def test_results_share_no_memory_with_arguments_or_each_other() -> None:
    x = torch.zeros(4)
    first, second, third = JaxFunction(lambda x: (x, x, x + 1))(x)
    first += 1
    third += 1
    assert torch.equal(x, torch.zeros(4))
    assert torch.equal(second, torch.zeros(4))


def test_an_argument_may_be_changed_right_after_the_call() -> None:
    slow = JaxFunction(lambda x: jnp.linalg.matrix_power(x, 64).sum())
    x = torch.eye(200)
    for _ in range(5):
        x.copy_(torch.eye(200))
        result = slow(x)
        x.zero_()
        assert result == 200


def test_an_argument_changed_before_backward_is_an_error() -> None:
    (x,) = tensors((3,))
    y = x * 1
    result = JaxFunction(jnp.square)(y)
    y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def in_forked_child(call: JaxFunction, queue: multiprocessing.Queue) -> None:
    try:
        call(torch.ones(2))
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings(r"ignore:.*fork\(\)")  # jax, and Python of 3.12, advise against it, too
def test_a_forked_process_gets_an_error_and_no_deadlock() -> None:
    call = JaxFunction(jnp.square)
    call(torch.ones(2))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_forked_child, args=(call, queue))
    child.start()
    assert "spawn" in queue.get(timeout=60)
    child.join(60)


def test_arguments_and_results_that_make_no_sense() -> None:
    with pytest.raises(TypeError, match="callable"):
        JaxFunction(3)
    with pytest.raises(TypeError, match="hashable"):
        JaxFunction(lambda x, s: x)(torch.ones(2), {1, 2})
    with pytest.raises(TypeError, match="arrays"):
        JaxFunction(lambda x: (x, "text"))(torch.ones(2))


def test_a_jax_model_is_trained_by_a_torch_optimizer() -> None:
    jax_model, torch_model = pairs.chain()
    module = JaxModule(jax_model)
    assert set(module.state_dict()) == {name for name, _ in named(jax_model)}
    x = torch.tensor(pairs.inputs(pairs.chain)["inputs"])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (module, torch_model)]
    for _ in range(5):
        for model, optimizer in zip((module, torch_model), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(module(x), torch_model(x), rtol=1e-4, atol=1e-5)
    trained = module.update(jax_model)
    torch.testing.assert_close(torch.tensor(np.asarray(trained(x.numpy()))), module(x).detach())


def named(model: nnx.Module) -> list[tuple[str, jax.Array]]:
    return [(".".join(map(str, path)), leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))]


def test_statistics_and_random_streams_move_on_in_training_only() -> None:
    rngs = nnx.Rngs(0)
    module = JaxModule(nnx.Sequential(nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(module.state_dict())
    first, second = module(x), module(x)
    assert not torch.equal(first == 0, second == 0)
    assert not torch.equal(module.state_dict()["layers.0.mean"], before["layers.0.mean"])
    module.eval()
    settled = copy.deepcopy(module.state_dict())
    assert torch.equal(module(x), module(x))
    assert all(torch.equal(value, settled[name]) for name, value in module.state_dict().items())
    module.train()(x).sum().backward()  # although the statistics that went in are overwritten


def test_module_copies_pickles_and_loads() -> None:
    module = JaxModule(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    x = torch.ones(1, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    other.kernel.data.zero_()
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    with pytest.raises(TypeError, match=r"nnx\.Module"):
        JaxModule(nn.Linear(3, 2))


def test_torch_function_in_jax_with_gradients_under_jit_and_vmap() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    apply = torch_function(lambda params, x: torch.func.functional_call(module, params, (x,)))
    params = {name: jnp.asarray(p.detach().numpy().copy()) for name, p in module.named_parameters()}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)
    np.testing.assert_allclose(jax.jit(apply)(params, x), module(torch.tensor(np.asarray(x))).detach(), rtol=1e-6)
    found = jax.jit(jax.grad(lambda p, x: jnp.sum(apply(p, x) ** 2), argnums=(0, 1)))(params, x)
    given = torch.tensor(np.asarray(x), requires_grad=True)
    expected = torch.autograd.grad(module(given).square().sum(), [*module.parameters(), given])
    for name, gradient in zip(params, expected, strict=False):
        np.testing.assert_allclose(found[0][name], gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda row: apply(params, row))(x), apply(params, x), rtol=1e-6)
    optimizer = optax.sgd(0.1)
    updates, _ = optimizer.update(found[0], optimizer.init(params))
    assert jax.tree.structure(optax.apply_updates(params, updates)) == jax.tree.structure(params)


def test_torch_function_with_integers_and_bad_results() -> None:
    pick = torch_function(lambda table, index: (table[index.long()], index + 1))
    table, index = jnp.arange(12.0).reshape(4, 3), jnp.array([1, 3, 1])
    np.testing.assert_array_equal(pick(table, index)[0], table[index])
    gradient = jax.grad(lambda t: pick(t, index)[0].sum())(table)
    np.testing.assert_array_equal(gradient, np.array([0, 2, 0, 1])[:, None] * np.ones(3))
    with pytest.raises(TypeError, match="truncate"):
        torch_function(lambda x: x.double())(table)
    with pytest.raises(TypeError, match="tensors"):
        torch_function(lambda x: "text")(table)
