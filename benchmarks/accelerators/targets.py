"""The machines that the lab compiles for. A target is an entry here."""

import re
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Target:
    """One device of a machine, as JAX sees it.

    Attributes:
        topology: a topology that libtpu knows, or the name of the card.
        bandwidth: of its memory, bytes a second.
        peak: operations a second of its matrix unit in bfloat16.
        memory: bytes of it.
        clock: cycles a second. Of a TPU it is the one that its published peak and its matrix units give.
        description: of a GPU, what XLA must know of the card, in the text format of its `GpuTargetConfigProto`.
        scale: the share of the tokens of a stack of layers that fit.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    topology: str
    bandwidth: float
    peak: float
    memory: float
    clock: float
    description: str = ""
    scale: float = 1.0

    @property
    def capability(self) -> int:
        """The compute capability of a GPU, as 90; 0 of a TPU."""
        found = re.search(r"major: (\d+) minor: (\d+) }\n", self.description)
        return 10 * int(found.group(1)) + int(found.group(2)) if found else 0

    def device(self) -> Any:
        """The device, described and absent.

        Raises:
            RuntimeError: the installed compiler does not know it, or is not installed.
        """
        from jax.experimental import topologies

        if self.platform == "tpu":
            return topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices[0]
        described = topologies.get_topology_desc(
            self.topology, "cuda", target_config=self.description, topology="1x1x1"
        )
        return described.devices[0]


def _gpu(
    name: str,
    card: str,
    *,
    capability: tuple[int, int],
    units: int,
    lanes: int,
    shared: int,
    cache: int,
    clock: float,
    bandwidth: float,
    peak: float,
    memory: float,
) -> Target:
    """A card by its public numbers: `units` multiprocessors of `lanes` float32 lanes, `shared` memory of each."""
    description = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
          core_count: {units} fpus_per_core: {lanes}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache} clock_rate_ghz: {clock / 1e9}
          device_memory_size: {memory:.0f} registers_per_core_limit: 65536 registers_per_block_limit: 65536
          cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        runtime_version {{ major: 12 minor: 8 }}
        device_description_str: "{card}"
    """
    return Target(name, "cuda", name, bandwidth, peak, memory, clock, description)


# Bandwidths, peaks and memories of TPUs are those that JAX has for its kernels (`pltpu.get_tpu_info`), of one device.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("v5e", "tpu", "v5e:2x2", 8.2e11, 1.97e14, 17.2e9, 1.5e9, scale=0.25),
        Target("v5p", "tpu", "v5p:2x2x1", 2.46e12, 4.59e14, 103e9, 1.75e9),
        Target("v6e", "tpu", "v6e:2x2", 1.64e12, 9.2e14, 34.4e9, 1.75e9, scale=0.5),
        Target("tpu7x", "tpu", "tpu7x:2x2x1", 3.7e12, 1.155e15, 103e9, 2.2e9),
        _gpu(
            "a100",
            "NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            units=108,
            lanes=64,
            shared=167936,
            cache=40 * 2**20,
            clock=1.41e9,
            bandwidth=2.039e12,
            peak=3.12e14,
            memory=85e9,
        ),
        _gpu(
            "h100",
            "NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            units=132,
            lanes=128,
            shared=233472,
            cache=50 * 2**20,
            clock=1.98e9,
            bandwidth=3.352e12,
            peak=9.89e14,
            memory=85e9,
        ),
        _gpu(
            "b200",
            "NVIDIA B200",
            capability=(10, 0),
            units=148,
            lanes=128,
            shared=233472,
            cache=126 * 2**20,
            clock=1.965e9,
            bandwidth=8e12,
            peak=2.25e15,
            memory=191e9,
        ),
    )
}
