"""Processes of a test that have another number of devices than the test."""

import os


def with_devices(count: int) -> dict[str, str]:
    """For the environment of a process: so many devices, and to compile as these tests do."""
    flag = "--xla_force_host_platform_device_count="
    others = [other for other in os.environ["XLA_FLAGS"].split() if not other.startswith(flag)]
    return {"XLA_FLAGS": " ".join([*others, f"{flag}{count}"])}
