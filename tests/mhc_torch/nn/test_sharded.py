"""DTensor parameters, FSDP2 (`fully_shard`) and DistributedDataParallel over two processes."""

import pytest
import torch.multiprocessing

from tests.mhc_torch.nn import sharded


@pytest.mark.parametrize("how", ["each part", "whole", "dtensor", "ddp"])
def test_a_model_of_two_processes_is_the_whole_model(how, tmp_path):
    torch.multiprocessing.spawn(sharded.run, (tmp_path / "init", how), nprocs=2)
