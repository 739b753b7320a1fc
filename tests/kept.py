"""What a computation leaves behind in memory."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Kept(TorchDispatchMode):
    """The storages that operations inside made, and whose memory is still held; views of what is `given` are none."""

    def __init__(self, given):
        super().__init__()
        self.given, self.made = {tensor.untyped_storage().data_ptr() for tensor in given}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.made[storage.data_ptr(), storage.nbytes()] = StorageWeakRef(storage)
        return result

    def bytes(self):
        return sum(size for (_, size), storage in self.made.items() if not storage.expired())


def check_stack(make, block_length, depth, tokens, width, n, held=0):
    """A stack of n bfloat16 streams, `make(block_length)`, keeps no more than it has to, and nothing afterwards.

    Args:
        held: bytes of a token that somebody else may hold on to.
    """
    network = make(block_length).bfloat16()
    for name, parameter in network.named_parameters():
        if name.endswith(("phi", "alpha", "bias")):
            parameter.data = parameter.data.float()
    x = torch.randn(tokens, width).bfloat16()
    with Kept([x, *network.parameters()]) as kept:
        y = network(x)
    found = kept.bytes() - y.untyped_storage().nbytes()
    # At least the streams of each block once, what each branch reads and puts out, and the numbers of its maps.
    streams, state = 2 * n * width, 2 * width
    least = tokens * (streams * depth // block_length + depth * 2 * state + depth * 4 * (n * n + 2 * n))
    assert least <= found <= least + tokens * (depth * 4 * 60 + held)
    y.float().sum().backward()
    del y
    assert kept.bytes() <= tokens * held
