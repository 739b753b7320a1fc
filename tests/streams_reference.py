"""The streams of arXiv 2512.24880 written out in float64 numpy, token by token and index by index."""

import inspect
import itertools
import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sinkhorn(logits, iterations=20, epsilon=0.0, order="columns"):
    """One n x n matrix: columns, then rows, `iterations` times, in the log domain when epsilon is 0."""
    if order == "rows":
        return sinkhorn(np.transpose(logits), iterations, epsilon).T
    log = np.array(logits, np.float64)
    n = len(log)
    for step in range(iterations):
        for j in range(n):
            log[:, j] -= np.logaddexp.reduce(log[:, j]) if step == 0 else np.log(np.exp(log[:, j]).sum() + epsilon)
        if step == 0 and epsilon:
            log = np.log(np.exp(log) + epsilon)
        for i in range(n):
            log[i] -= np.log(np.exp(log[i]).sum() + epsilon) if epsilon else np.logaddexp.reduce(log[i])
    return np.exp(log)


def permutation_mixture(logits, n):
    weights = np.exp(logits - np.max(logits))
    weights /= weights.sum()
    result = np.zeros((n, n))
    for weight, permutation in zip(weights, itertools.permutations(range(n)), strict=True):
        for i, j in enumerate(permutation):
            result[i, j] += weight
    return result


def residual_map(logits, n, constraint, iterations=20, epsilon=0.0, order="columns"):
    if constraint == "none":
        return np.reshape(logits, (n, n))
    if constraint == "identity":
        return np.diag(np.ones(n))
    if constraint == "sinkhorn":
        return sinkhorn(np.reshape(logits, (n, n)), iterations, epsilon, order)
    if constraint == "permutations":
        return permutation_mixture(logits, n)
    factors, rest, result, start = [], n, np.ones((1, 1)), 0
    while rest > 1:
        factors.append(next(p for p in range(2, rest + 1) if rest % p == 0))
        rest //= factors[-1]
    for factor in factors:
        count = math.factorial(factor)
        result = np.kron(result, permutation_mixture(logits[start : start + count], factor))
        start += count
    return result


def normed(x, norm, epsilon):
    """All entries of one token x of shape (n, C), stream by stream."""
    if norm == "streams":
        return np.concatenate([stream / math.sqrt(sum(stream**2) / len(stream) + epsilon) for stream in x])
    flat = x.ravel()
    if norm == "rms_outside":
        return flat / (math.sqrt(sum(flat**2) / len(flat)) + epsilon)
    return flat / np.sqrt(np.mean(flat**2) + epsilon)


def maps(
    phi,
    alpha,
    bias,
    x,
    constraint="sinkhorn",
    iterations=20,
    epsilon=0.0,
    norm_epsilon=1e-6,
    pre_epsilon=None,
    post_scale=2.0,
    post_epsilon=0.0,
    order="columns",
    norm="rms",
):
    """H_pre (n,), H_post (n,), H_res (n, n) of one token x of shape (n, C)."""
    n = len(x)
    logits = np.array(bias, np.float64)
    if phi is not None:
        flat = normed(x, norm, norm_epsilon)
        for k in range(len(logits)):
            group = 0 if k < n else 1 if k < 2 * n else 2
            dynamic = sum(flat[c] * phi[c, k] for c in range(len(flat)))
            logits[k] += alpha[group] * (np.tanh(dynamic) if constraint == "none" else dynamic)
    res = residual_map(logits[2 * n :], n, constraint, iterations, epsilon, order)
    if constraint == "none":
        return logits[:n], logits[n : 2 * n], res
    pre = sigmoid(logits[:n]) + (epsilon if pre_epsilon is None else pre_epsilon)
    return pre, post_scale * sigmoid(logits[n : 2 * n]) + post_epsilon, res


def options(config):
    """What `maps` takes of a StreamConfig of either package."""
    return {name: getattr(config, name) for name in inspect.signature(maps).parameters if hasattr(config, name)}


def layer(phi, alpha, bias, x, branch, **options):
    """X_{l+1} = H_res X_l + H_post^T F(H_pre X_l), for x of shape (tokens, n, C)."""
    result = np.empty_like(x)
    for t, token in enumerate(x):
        pre, post, res = maps(phi, alpha, bias, token, **options)
        output = branch(sum(pre[i] * token[i] for i in range(len(token))))
        for i in range(len(token)):
            result[t, i] = post[i] * output + sum(res[i, j] * token[j] for j in range(len(token)))
    return result
