"""What the assembler for NVIDIA GPUs says, as `ptxas -v` of CUDA 12.9 says it."""

from benchmarks.accelerators.ptx import read

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'stream_project' for 'sm_90a'
ptxas info    : Function properties for stream_project
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 79 registers, used 1 barriers, 4224 bytes smem
ptxas info    : Compile time = 11.742 ms
ptxas info    : Compiling entry function 'stream_write' for 'sm_90a'
ptxas info    : Function properties for stream_write
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers
"""


def test_registers_spills_and_shared_memory_of_every_entry():
    assert read(SAID) == {"stream_project": (79, 20, 4224), "stream_write": (64, 0, 0)}
