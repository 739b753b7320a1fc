"""The hyper-connections of DeepSeek-V4, as transformers ships them, and ours with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

import mhc_jax.streams
import mhc_torch.streams
from mhc_torch.nn.hyper_connections import HyperConnections, StreamHead

WIDTH = 32


@pytest.fixture(params=[4, 3])
def theirs(request):
    """Their layer around tanh, their head, random streams, and the gradients of both."""
    torch.manual_seed(0)
    settings = DeepseekV4Config(hc_mult=request.param, hidden_size=WIDTH)
    layer, head = DeepseekV4HyperConnection(settings), DeepseekV4HyperHead(settings)
    for parameter in (*layer.parameters(), *head.parameters()):
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, request.param, WIDTH, requires_grad=True)
    post, comb, collapsed = layer(x)
    # As DeepseekV4DecoderLayer puts them together.
    wide = post.unsqueeze(-1) * torch.tanh(collapsed).unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
    result = head(wide)
    result.square().sum().backward()
    return settings, layer, head, x, wide, result


def options(settings):
    return {
        "streams": settings.hc_mult,
        "iterations": settings.hc_sinkhorn_iters,
        "epsilon": settings.hc_eps,
        "norm_epsilon": settings.rms_norm_eps,
    }


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-6 * np.abs(theirs).max(), rtol=2e-5)


def test_ours_in_torch_computes_what_theirs_does(theirs):
    settings, layer, head, x, wide, result = theirs
    ours = HyperConnections(nn.Tanh(), WIDTH, **options(settings))
    our_head = StreamHead(WIDTH, **options(settings))
    with torch.no_grad():
        for mine, loaded in zip(
            (ours.phi, ours.alpha, ours.bias),
            mhc_torch.streams.from_deepseek_v4(layer.fn, layer.base, layer.scale),
            strict=True,
        ):
            mine.copy_(loaded)
        our_head.phi.copy_(head.hc_fn.T)
        our_head.alpha.copy_(head.hc_scale)
        our_head.bias.copy_(head.hc_base)
    our_x = x.detach().clone().requires_grad_()
    our_wide = ours(our_x)
    our_result = our_head(our_wide)
    our_result.square().sum().backward()
    close(our_wide.detach(), wide)
    close(our_result.detach(), result)
    close(our_x.grad, x.grad)
    loaded = mhc_torch.streams.from_deepseek_v4(layer.fn.grad, layer.base.grad, layer.scale.grad)
    for mine, gradient in zip((ours.phi, ours.alpha, ours.bias), loaded, strict=True):
        close(mine.grad, gradient)
    close(our_head.phi.grad, head.hc_fn.grad.T)


def test_ours_in_jax_computes_what_theirs_does(theirs):
    settings, layer, head, x, wide, result = theirs
    config = mhc_jax.streams.StreamConfig(**options(settings))

    def array(tensor):
        return jnp.array(tensor.detach().numpy())

    params = mhc_jax.streams.from_deepseek_v4(array(layer.fn), array(layer.base), array(layer.scale))
    head_params = mhc_jax.streams.HeadParams(array(head.hc_fn).T, array(head.hc_scale), array(head.hc_base))

    def run(params, head_params, x):
        wide = mhc_jax.streams.wrap(jnp.tanh, config)(params, x)
        result = mhc_jax.streams.head(head_params, wide, config)
        return jnp.sum(result**2), (wide, result)

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
    (_, (our_wide, our_result)), (d_params, d_head, d_x) = run(params, head_params, array(x))
    close(our_wide, wide)
    close(our_result, result)
    close(d_x, x.grad)
    gradients = mhc_jax.streams.from_deepseek_v4(array(layer.fn.grad), array(layer.base.grad), array(layer.scale.grad))
    for mine, gradient in zip(d_params, gradients, strict=True):
        np.testing.assert_allclose(mine, gradient, atol=2e-6 * np.abs(gradient).max(), rtol=2e-5)
    close(d_head.phi, head.hc_fn.grad.T)


def test_parameters_of_no_number_of_streams_are_refused():
    with pytest.raises(ValueError, match="got 23 and 23"):
        mhc_jax.streams.from_deepseek_v4(jnp.ones((23, 8)), jnp.ones(23), jnp.ones(3))
    with pytest.raises(ValueError, match="got 23 and 23"):
        mhc_torch.streams.from_deepseek_v4(torch.ones(23, 8), torch.ones(23), torch.ones(3))
