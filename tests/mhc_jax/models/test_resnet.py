"""Convolutions and ResNets with history: against their formula, and against a plain ResNet of the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mhc_jax.models import MHCResNet
from mhc_jax.nn import MHCBasicBlock, MHCBottleneck, MHCConv

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))


def conv(x, kernel, strides=1):
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel[...], (strides, strides), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def norm(x, bn):
    return (x - bn.mean[...]) / jnp.sqrt(bn.var[...] + 1e-5) * bn.scale[...] + bn.bias[...]


def plain_block(block, x, strides):
    """He et al. 2015: relu(f(x) + shortcut(x)), with the statistics of evaluation."""
    if isinstance(block, MHCBasicBlock):
        y = norm(conv(x, block.conv1.kernel, strides), block.bn1)
        y = norm(conv(jax.nn.relu(y), block.conv2.kernel), block.bn2)
    else:
        y = norm(conv(x, block.conv1.kernel), block.bn1)
        y = norm(conv(jax.nn.relu(y), block.conv2.kernel, strides), block.bn2)
        y = norm(conv(jax.nn.relu(y), block.conv3.kernel), block.bn3)
    if block.downsample is not None:
        x = norm(conv(x, block.downsample.layers[0].kernel, strides), block.downsample.layers[1])
    return jax.nn.relu(y + x)


@pytest.mark.parametrize("block", [MHCBasicBlock, MHCBottleneck])
def test_residual_mode_is_a_plain_resnet(block):
    model = MHCResNet((2, 1), 3, in_features=4, features=4, block=block, mode="residual", rngs=nnx.Rngs(0))
    model(5 * IMAGES)  # moves the batch statistics away from where they start
    model.eval()
    x = jax.nn.relu(norm(conv(IMAGES, model.conv1.kernel), model.bn1))
    for layer, strides in zip(model.blocks, (1, 1, 2), strict=True):
        x = plain_block(layer, x, strides)
    expected = x.mean(axis=(1, 2)) @ model.fc.kernel[...] + model.fc.bias[...]
    np.testing.assert_allclose(model(IMAGES), expected, atol=1e-4)


def test_conv_mixes_the_window_and_projects_it_to_a_new_shape():
    rngs = nnx.Rngs(0)
    first = MHCConv(4, 6, (3, 3), strides=2, init="uniform", rngs=rngs)
    second = MHCConv(6, 6, (3, 3), init="uniform", rngs=rngs)
    older = IMAGES + 1
    p0, p1 = (lax.reduce_window(s, 0.0, lax.add, (1, 1, 1, 1), (1, 2, 2, 1), "VALID") for s in (older, IMAGES))
    p0, p1 = (p @ first.projection.kernel[0, 0] for p in (p0, p1))
    x2 = first.conv(IMAGES) + (p0 + p1) / 2
    x3 = second.conv(x2) + (p0 + p1 + x2) / 3
    states = second.advance(first.advance((older, IMAGES)))
    np.testing.assert_allclose(states[-1], x3, atol=1e-4)
    np.testing.assert_allclose(first(IMAGES), first.conv(IMAGES) + p1, atol=1e-5)


def test_conv_takes_any_number_of_spatial_axes():
    assert MHCConv(4, 6, (3,), strides=2, rngs=nnx.Rngs(0))(jnp.ones((2, 9, 4))).shape == (2, 5, 6)
    assert MHCConv(4, 6, (3, 3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 4, 4, 4, 4))).shape == (2, 4, 4, 4, 6)


def test_the_history_runs_through_the_whole_network_and_not_across_calls():
    model = MHCResNet((2, 2), 3, in_features=4, features=4, init="uniform", rngs=nnx.Rngs(0))
    model.eval()
    np.testing.assert_array_equal(model(IMAGES), model(IMAGES))
    np.testing.assert_allclose(model(IMAGES[:1]), model(IMAGES)[:1], atol=1e-5)
    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(model(IMAGES) ** 2)))(model)
    for index in range(1, 4):
        live = min(index + 1, 4)
        gradient = np.asarray(grads["blocks"][index]["skip"]["mixing_logits"][...])
        assert (gradient[-live:] != 0).all(), index
        assert (gradient[:-live] == 0).all(), index


def test_errors_say_in_which_block_they_came_up():
    with pytest.raises(ValueError, match="stage_sizes must hold at least one block"):
        MHCResNet((2, 0), 3, rngs=nnx.Rngs(0))
    model = MHCResNet((2,), 3, in_features=4, features=4, rngs=nnx.Rngs(0))
    model.blocks[1].conv2 = nnx.Conv(4, 5, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(Exception, match=r"in block 1 \(MHCBasicBlock\)"):
        model(IMAGES)
