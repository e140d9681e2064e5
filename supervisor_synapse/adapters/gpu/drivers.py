"""What all drivers of this machine tell together."""

from __future__ import annotations

from supervisor_synapse.adapters.gpu import amd, nvidia
from supervisor_synapse.adapters.gpu.readings import Reading, Unreadable, of_device
from supervisor_synapse.core.model import Device


def read(device: Device) -> Reading | None:
    """The memory of one of the engine's devices now; None where no driver tells, or not now."""
    try:
        return of_device(device, (*nvidia.read(), *amd.read()))
    except Unreadable:
        return None
