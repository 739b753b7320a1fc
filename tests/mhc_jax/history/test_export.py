"""The jitted entry points lower for accelerators that this machine need not have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

from mhc_jax.models import Decoder, DecoderConfig, MHCResNet
from mhc_jax.monitoring.diagnostics import diagnose
from mhc_jax.nn import MatrixMHCSkip, MHCConv, MHCSequential, MHCSkip, MHCStack
from mhc_jax.training import TrainState, make_train_step

X = jnp.ones((2, 8))
MODELS = {
    "skip": (lambda rngs: MHCSkip(constraint="sparse"), (X, [X, X])),
    "matrix": (lambda rngs: MatrixMHCSkip(rngs=rngs), (X, [X, X])),
    "sequential": (lambda rngs: MHCSequential([nnx.Linear(8, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)]), (X,)),
    "stack": (lambda rngs: MHCStack(lambda rngs: nnx.Linear(8, 8, rngs=rngs), 5, rngs=rngs), (X,)),
    "conv": (lambda rngs: MHCConv(3, 4, (3, 3), rngs=rngs), (jnp.ones((2, 4, 4, 3)),)),
    "resnet": (lambda rngs: MHCResNet((1, 1), 3, features=4, rngs=rngs), (jnp.ones((2, 4, 4, 3)),)),
    "decoder": (
        lambda rngs: Decoder(DecoderConfig(9, features=8, mlp_features=8, depth=3, num_heads=2), "history", rngs=rngs),
        (jnp.ones((2, 4), int),),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_train_steps_lower_for_tpu_and_cuda(name):
    make, inputs = MODELS[name]
    optimizer = optax.adam(1e-3)
    state = TrainState.create(make(nnx.Rngs(0)), optimizer)
    step = make_train_step(lambda model, batch: (jnp.mean(model(*batch) ** 2), {}), optimizer, diagnose=diagnose)
    exported = export.export(step, platforms=["tpu", "cuda"])(state, inputs)
    assert exported.platforms == ("tpu", "cuda")
    assert exported.in_avals == tuple(map(jax.typeof, jax.tree.leaves((state, inputs))))


def test_an_exported_stack_computes_the_same():
    make, inputs = MODELS["stack"]
    model = make(nnx.Rngs(0))
    exported = export.export(jax.jit(lambda model, x: model(x)), platforms=["cpu", "tpu", "cuda"])(model, *inputs)
    np.testing.assert_allclose(exported.call(model, *inputs), model(*inputs), rtol=1e-5)
