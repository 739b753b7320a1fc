"""The quality study: every connection trains, seeds differ, and its gradient of layer 0 is the right one."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks import quality


def test_a_run_is_the_one_of_a_plain_loop():
    task = replace(quality.digits(), steps=4)
    run = quality.train(task, "residual", depth=3, seeds=2, every=2)
    assert run["step"] == [2, 4]

    model = task.model("residual", 3, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(optax.linear_schedule(task.learning_rate, 0.0, 4)), wrt=nnx.Param)
    images, labels = task.batches(1, 4)
    gradient = nnx.jit(nnx.grad(lambda model, batch: quality.loss_and_accuracy(model, batch)[0]))
    for step in range(4):
        grads = gradient(model, (images[step], labels[step]))
        if step == 0:
            norm = np.linalg.norm(grads["stack"]["layers"]["linear"]["kernel"][...][0])
        optimizer.update(model, grads)
    loss, accuracy = quality.loss_and_accuracy(model, task.held_out)
    np.testing.assert_allclose(run["gradient norm"][1], norm, rtol=1e-4)
    np.testing.assert_allclose(run["loss"][-1][1], loss, rtol=1e-4)
    np.testing.assert_allclose(run["accuracy"][1], accuracy, atol=1e-6)
    assert run["loss"][-1][0] != run["loss"][-1][1]


@pytest.mark.parametrize("task", quality.TASKS)
def test_every_connection_makes_a_network(task):
    made = quality.TASKS[task]()
    for connection in made.connections:
        network = partial(made.model, connection, 2)
        logits = jax.eval_shape(lambda inputs, make=network: make(rngs=nnx.Rngs(0))(inputs), made.held_out[0])
        assert logits.shape[:-1] == made.held_out[1].shape


def test_steps_to_the_target_are_those_of_the_held_out_loss():
    task = replace(quality.digits(), steps=4, target=100.0)
    assert quality.train(task, "plain", depth=2, seeds=1, every=2)["steps to target"] == [2]
    assert quality.train(replace(task, target=0.0), "plain", depth=2, seeds=1, every=2)["steps to target"] == [None]
