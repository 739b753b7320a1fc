"""DTensor parameters and FSDP2 (`fully_shard`) over two processes."""

import pytest
import torch.multiprocessing

from tests.mhc_torch import sharded


@pytest.mark.parametrize("how", ["each part", "whole", "dtensor"])
def test_a_sharded_model_is_the_whole_model(how, tmp_path):
    torch.multiprocessing.spawn(sharded.run, (tmp_path / "init", how), nprocs=2)
