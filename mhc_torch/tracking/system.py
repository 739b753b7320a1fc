"""Use of the machine while an experiment runs: CPU, memory, NVIDIA GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import psutil

from mhc_torch.monitoring.logging import get_logger

_MIB = 2**20


class SystemMonitor:
    """Samples the machine every ``interval`` seconds, and once at the end, from a thread of its own.

    The metrics are ``system/cpu_percent``, ``system/memory_percent`` (both of the machine),
    ``system/process_memory_mib``, and for each GPU that NVIDIA's NVML shows ``system/gpu_<i>/utilization_percent`` and
    ``system/gpu_<i>/memory_used_mib``.

    Args:
        log: called with the metrics and their step, the number of the sample: 0, 1, 2...
        interval: seconds.
    """

    def __init__(self, log: Callable[[dict[str, float], int], None], interval: float) -> None:
        self._log, self._interval = log, interval
        self._process = psutil.Process()
        self._gpus = _gpus()
        self._reported: set[str] = set()
        self._stop = threading.Event()
        psutil.cpu_percent()  # what follows is measured from here
        self._thread = threading.Thread(target=self._run, name="mhc-tracking-system", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> dict[str, float]:
        metrics = {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": psutil.virtual_memory().percent,
            "system/process_memory_mib": self._process.memory_info().rss / _MIB,
        }
        for number, gpu in enumerate(self._gpus):
            for name, read in _GPU_METRICS.items():
                try:
                    metrics[f"system/gpu_{number}/{name}"] = read(gpu)
                except Exception as error:  # not every GPU answers every query (MIG does not know its utilization)
                    self._report(f"gpu_{number}/{name}", error)
        return metrics

    def _report(self, what: str, error: Exception) -> None:
        if what not in self._reported:
            self._reported.add(what)
            get_logger("mhc.tracking").warning("no system metric %s: %s: %s", what, type(error).__name__, error)

    def _run(self) -> None:
        step, last = 0, False
        while not last:
            last = self._stop.wait(self._interval)
            try:
                self._log(self.sample(), step)
            except Exception as error:
                get_logger("mhc.tracking").error("no more system metrics: %s: %s", type(error).__name__, error)
                return
            step += 1


def _utilization_percent(gpu: Any) -> float:
    import pynvml

    return float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)


def _memory_used_mib(gpu: Any) -> float:
    import pynvml

    return float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used) / _MIB


_GPU_METRICS = {"utilization_percent": _utilization_percent, "memory_used_mib": _memory_used_mib}


def _gpus() -> list[Any]:
    """NVML's handles; none without nvidia-ml-py, a driver or a GPU."""
    if find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
