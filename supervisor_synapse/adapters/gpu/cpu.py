"""The host's memory, as a device that models can live in."""

from __future__ import annotations

import psutil

from supervisor_synapse.core.model import Device


def read() -> Device:
    """Total and available bytes now."""
    memory = psutil.virtual_memory()
    return Device("CPU", memory.total, memory.available, "host memory")
