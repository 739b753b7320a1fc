"""One seed for every generator of random numbers that training uses."""

import os
import random

import numpy as np
import torch

from mhc_torch.monitoring.logging import get_logger


def set_seed(seed: int = 42, verbose: bool = True) -> None:
    """Seed Python, NumPy and PyTorch on every device, and let cuDNN choose deterministic algorithms.

    PYTHONHASHSEED is set for processes that are started from here; it cannot change this one.

    Raises:
        ValueError: seed is not in 0..2**32 - 1, which NumPy asks for.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2**32 - 1, got {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (other people's code draws from it)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if verbose:
        get_logger("mhc.seed").info("random seed set to %d", seed)
