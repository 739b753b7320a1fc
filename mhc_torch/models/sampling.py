"""Drawing the next token of a decoder."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def check_sampling(steps: int, temperature: float, top_k: int | None, vocabulary: int) -> None:
    """A ValueError if one of these is out of its range."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be in 1..{vocabulary}, got {top_k}")


def sample(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Int[Tensor, "B 1"]:
    """One token of each row, out of its `top_k` likeliest; None is all, temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
