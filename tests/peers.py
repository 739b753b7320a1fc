"""A branch tanh on streams as public projects connect it, each as its source defines it, in float64 torch.

Written from the mathematics of the sources, whose versions `mhc_jax.streams.conventions` names; where a project is
installed it is its own module that runs, with the casts to float32 inside lifted. `LAYERS[name]` is a function of
tensors, by the names of the project, and of streams (tokens, n, C); so is `HEADS[name]`.
"""

import itertools
import math
from types import SimpleNamespace

import torch
from hyper_connections.manifold_constrained_hyper_connections import ManifoldConstrainedHyperConnections
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextHyperConnection
from transformers.models.hy_v4.configuration_hy_v4 import HYV4Config
from transformers.models.hy_v4.modeling_hy_v4 import HYV4HyperConnection, HYV4HyperHead

from bridge.proof.exact_torch import Exact


def installed(module, tensors, *arguments):
    with Exact():
        return torch.func.functional_call(module.double(), tensors, arguments)


def deepseek_v4(tensors, x):
    config = DeepseekV4Config(hc_mult=x.shape[1], hidden_size=x.shape[2])
    post, comb, collapsed = installed(DeepseekV4HyperConnection(config), tensors, x[None])
    return (post[..., None] * torch.tanh(collapsed)[..., None, :] + comb.transpose(-1, -2) @ x)[0]


def glm5_next(tensors, x):
    sizes = {"hc_mult": x.shape[1], "hidden_size": x.shape[2], "hc_sinkhorn_iters": 20, "hc_eps": 1e-6}
    module = Glm5NextTextHyperConnection(SimpleNamespace(**sizes, rms_norm_eps=1e-5))
    post, comb, collapsed = installed(module, tensors, x[None])
    return (post[..., None] * torch.tanh(collapsed)[..., None, :] + comb.transpose(-1, -2) @ x)[0]


def hy_v4(tensors, x):
    config = HYV4Config(hc_mult=x.shape[1], hidden_size=x.shape[2], hc_magnitude=1.7)
    post, collapsed = installed(HYV4HyperConnection(config), tensors, x[None])
    return (post[..., None] * torch.tanh(collapsed)[..., None, :] + x)[0]


def lucidrains(tensors, x):
    module = ManifoldConstrainedHyperConnections(x.shape[1], dim=x.shape[2], branch=torch.nn.Tanh(), layer_index=0)
    return installed(module, tensors, x.transpose(0, 1)).transpose(0, 1)


def alternating(logits, first, second, iterations, epsilon=0.0):
    """Softmax over the axis `first`, plus epsilon, then over `second`, and so on; each sum plus epsilon."""
    matrix = torch.softmax(logits, first) + epsilon
    matrix = matrix / (matrix.sum(second, keepdim=True) + epsilon)
    for _ in range(iterations - 1):
        for axis in (first, second):
            matrix = matrix / (matrix.sum(axis, keepdim=True) + epsilon)
    return matrix


def inverse_rms(x, epsilon):
    return 1 / torch.sqrt(torch.mean(x**2, -1, keepdim=True) + epsilon)


def connected(x, pre, post, mixing):
    """`mixing[..., new, old]`."""
    branch = torch.tanh(torch.einsum("tn,tnc->tc", pre, x))
    return torch.einsum("tij,tjc->tic", mixing, x) + torch.einsum("tn,tc->tnc", post, branch)


def megatron(tensors, x):
    n, flat = x.shape[1], x.flatten(1)
    over = 1 / (flat.norm(dim=-1, keepdim=True) / math.sqrt(flat.shape[1]) + 1e-6)
    pre, post, res = (flat @ tensors["mapping_proj.weight"].T * over).split([n, n, n * n], -1)
    b_pre, b_post, b_res = tensors["bias"].split([n, n, n * n])
    pre = torch.sigmoid(pre * tensors["alpha_pre"] + b_pre) + 1e-6
    post = 2 * torch.sigmoid(post * tensors["alpha_post"] + b_post)
    res = (res * tensors["alpha_res"] + b_res).unflatten(-1, (n, n))
    return connected(x, pre, post, alternating(res, -1, -2, 20, 1e-6).mT)


def deepseek_v4_1(layers, x):
    """A network: each branch reads by the H_pre of the one before, the first one the first stream, as all ends."""
    n = x.shape[1]
    pre = torch.eye(n, dtype=x.dtype)[0].expand(len(x), n)
    for tensors in layers:
        flat = x.flatten(1)
        following, post, res = (flat @ tensors["mapping_proj.weight"].T * inverse_rms(flat, 1e-5)).split(
            [n, n, n * n], -1
        )
        b_pre, b_post, b_res = tensors["bias"].split([n, n, n * n])
        post = 2 * torch.sigmoid(post * tensors["alpha_post"] + b_post)
        res = alternating((res * tensors["alpha_res"] + b_res).unflatten(-1, (n, n)), -1, -2, 20, 1e-6)
        x = connected(x, pre, post, res.mT)
        pre = torch.sigmoid(following * tensors["alpha_pre"] + b_pre) + 1e-6
    return torch.einsum("tn,tnc->tc", pre, x)


def megatron_head(tensors, x):
    flat = x.flatten(1)
    logits = flat @ tensors["hc_head_fn"].T * inverse_rms(flat, 1e-6) * tensors["hc_head_scale"]
    return torch.einsum("tn,tnc->tc", torch.sigmoid(logits + tensors["hc_head_base"]) + 1e-6, x)


def liger(tensors, x):
    n, flat = x.shape[1], x.flatten(1)
    pre, post, res = (flat @ tensors["phi"] * inverse_rms(flat, 1e-6)).split([n, n, n * n], -1)
    b_pre, b_post, b_res = tensors["b"].split([n, n, n * n])
    pre = torch.sigmoid(pre * tensors["alpha_pre"] + b_pre) + 1e-4
    post = 1.5 * torch.sigmoid(post * tensors["alpha_post"] + b_post)
    res = (res * tensors["alpha_res"] + b_res).unflatten(-1, (n, n))
    return connected(x, pre, post, alternating(res, -1, -2, 20, 1e-6))


def tile_kernels(tensors, x):
    n, flat = x.shape[1], x.flatten(1)
    fn = tensors["fn"] * tensors["norm_weight"]
    pre, post, res = (flat @ fn.T * inverse_rms(flat, 1e-6)).split([n, n, n * n], -1)
    b_pre, b_post, b_res = tensors["base"].split([n, n, n * n])
    s_pre, s_post, s_res = tensors["scale"]
    pre, post = torch.sigmoid(pre * s_pre + b_pre) + 1e-3, torch.sigmoid(post * s_post + b_post)
    return connected(x, pre, post, alternating((res * s_res + b_res).unflatten(-1, (n, n)), -1, -2, 10, 1e-6).mT)


def tile_kernels_head(tensors, x):
    flat = x.flatten(1)
    logits = flat @ (tensors["fn"] * tensors["norm_weight"]).T * inverse_rms(flat, 1e-6) * tensors["scale"]
    return torch.einsum("tn,tnc->tc", torch.sigmoid(logits + tensors["base"]) + 1e-6, x)


def transformer_engine(tensors, x):
    """On streams (tokens, C, n); H_res is on their right."""
    n, wide = x.shape[1], x.transpose(1, 2)
    flat = wide.flatten(1)
    over = 1 / torch.sqrt(torch.mean(flat**2, -1, keepdim=True) + torch.finfo(torch.float32).eps)
    gates = torch.repeat_interleave(tensors["alpha"], torch.tensor([n, n, n * n]))
    pre, post, res = (flat @ tensors["phi"].T * gates * over + tensors["beta"]).split([n, n, n * n], -1)
    res, f, g = res.unflatten(-1, (n, n)), torch.zeros_like(pre), torch.zeros_like(pre)
    for _ in range(20):
        f = -torch.logsumexp(res + g[:, None, :], 2)
        g = -torch.logsumexp(res + f[:, :, None], 1)
    mixing = torch.exp(f[:, :, None] + res + g[:, None, :])
    branch = torch.tanh((wide @ torch.sigmoid(pre)[..., None])[..., 0])
    return (branch[..., None] @ (2 * torch.sigmoid(post))[:, None] + wide @ mixing).transpose(1, 2)


def maxtext(tensors, x, lite=False):
    n, flat = x.shape[1], x.flatten(1)
    normed = flat * inverse_rms(flat, 1e-5) * tensors["mhc_norm.scale"]
    logits = [
        tensors[f"{name}_alpha_scale"] * (normed @ tensors[f"{name}_alpha"]) + tensors[f"{name}_beta"].reshape(-1)
        for name in ("pre", "post", "res")
    ]
    mixing = permuted(logits[2], n) if lite else alternating(logits[2].unflatten(-1, (n, n)), -1, -2, 20, 1e-6)
    return connected(x, torch.sigmoid(logits[0]) + 1e-6, 2 * torch.sigmoid(logits[1]), mixing.mT)


def maxtext_head(tensors, x):
    flat = x.flatten(1)
    logits = flat @ tensors["hc_fn"] * inverse_rms(flat, 1e-5) * tensors["hc_scale"] + tensors["hc_base"]
    return torch.einsum("tn,tnc->tc", torch.sigmoid(logits) + 1e-6, x)


def permuted(logits, n):
    """The mixture of matrices that have their 1 of row i in column p[i], for all p in lexical order."""
    result = torch.zeros(*logits.shape[:-1], n, n, dtype=logits.dtype)
    for weight, p in zip(torch.softmax(logits, -1).unbind(-1), itertools.permutations(range(n)), strict=True):
        result = result + weight[..., None, None] * torch.eye(n, dtype=logits.dtype)[list(p)]
    return result


def by_twos(logits, n):
    """The Kronecker product of mixtures of the identity and the swap, one for each pair of logits."""
    result = torch.ones(*logits.shape[:-1], 1, 1, dtype=logits.dtype)
    for pair in logits.split(2, -1):
        p, q = torch.softmax(pair, -1).unbind(-1)
        factor = torch.stack([torch.stack([p, q], -1), torch.stack([q, p], -1)], -2)
        result = torch.stack([torch.kron(a, b) for a, b in zip(result, factor, strict=True)])
    return result


def lite(tensors, x, residual=permuted):
    n, flat = x.shape[1], x.flatten(1)
    normed = flat / flat.norm(dim=-1, keepdim=True) * math.sqrt(flat.shape[1]) * (1 + tensors["norm.gamma"])
    reading = normed @ tensors["dynamic_alpha_fn"]
    pre = torch.sigmoid(tensors["pre_branch_scale"] * reading[:, :n] + tensors["static_alpha"][:n])
    res = residual(tensors["residual_scale"] * reading[:, n:] + tensors["static_alpha"][n:], n)
    writing = normed @ tensors["dynamic_beta_fn"] * tensors["h_post_scale"]
    return connected(x, pre, 2 * torch.sigmoid(writing + tensors["static_beta"]), res.mT)


def deepseek_v4_head(tensors, x):
    config = DeepseekV4Config(hc_mult=x.shape[1], hidden_size=x.shape[2])
    return installed(DeepseekV4HyperHead(config), tensors, x[None])[0]


def hy_v4_head(tensors, x):
    config = HYV4Config(hc_mult=x.shape[1], hidden_size=x.shape[2], hc_magnitude=1.7)
    return installed(HYV4HyperHead(config), tensors, x[None])[0]


LAYERS = {
    "deepseek_v4": deepseek_v4,
    "glm5_next": glm5_next,
    "hy_v4": hy_v4,
    "megatron": megatron,
    "liger": liger,
    "tile_kernels": tile_kernels,
    "transformer_engine": transformer_engine,
    "maxtext": maxtext,
    "maxtext_lite": lambda tensors, x: maxtext(tensors, x, lite=True),
    "mhc_lite": lite,
    "kromhc": lambda tensors, x: lite(tensors, x, by_twos),
    "lucidrains": lucidrains,
}
HEADS = {
    "deepseek_v4": deepseek_v4_head,
    "hy_v4": hy_v4_head,
    "megatron": megatron_head,
    "tile_kernels": tile_kernels_head,
    "maxtext": maxtext_head,
    "maxtext_lite": maxtext_head,
}
# What is not the default above, under the names of the projects.
SETTINGS = {
    "hy_v4": {"hc_magnitude": 1.7},
    "liger": {"pre_eps": 1e-4, "post_mult": 1.5},
    "tile_kernels": {"pre_eps": 1e-3},
}
# Of a head with settings of its own.
HEAD_SETTINGS = {"hy_v4": {"hc_magnitude": 1.7}}
