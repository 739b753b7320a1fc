"""The products of streams and maps, by operations of torch. Streams are (T, n, C), maps (T, n) and (T, n, n)."""

import torch
from jaxtyping import Float
from torch import Tensor


def merged(
    streams: Float[Tensor, "T n C"],
    output: Float[Tensor, "T C"],
    post: Float[Tensor, "T n"],
    res: Float[Tensor, "T n n"] | None,
) -> Float[Tensor, "T n C"]:
    """res X + post y, summed in the dtype of the maps. A res of None is the identity."""
    mixed = post[..., None] * output.to(post.dtype)[:, None]
    if res is None:
        return mixed.add_(streams).to(streams.dtype)
    return _add_product(mixed, res, streams.to(res.dtype)).to(streams.dtype)


def mixed_back(res: Float[Tensor, "T n n"] | None, d: Float[Tensor, "T n C"]) -> Float[Tensor, "T n C"]:
    """res^T d. A res of None is the identity."""
    return d if res is None else _add_product(torch.zeros_like(d), res.mT, d)


def weighted(weights: Float[Tensor, "T n"], streams: Float[Tensor, "T n C"]) -> Float[Tensor, "T C"]:
    """The sum of the streams with these weights."""
    return torch.bmm(weights[:, None], streams)[:, 0]


def inner(one: Float[Tensor, "T C"], streams: Float[Tensor, "T n C"]) -> Float[Tensor, "T n"]:
    """The inner product of `one` and each stream."""
    return torch.bmm(one[:, None], streams.mT)[:, 0]


def _add_product(total: Tensor, matrices: Tensor, streams: Tensor) -> Tensor:
    """total + matrices (T, n, n) @ streams (T, n, C), in place of `total`.

    A sum over streams takes as long as a product of tiny matrices, and a compiler fuses it with what is around.
    """
    for j in range(streams.shape[1]):
        total.addcmul_(matrices[:, :, j, None], streams[:, j, None])
    return total
