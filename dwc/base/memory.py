"""Free memory on the CPU or a GPU."""

from pathlib import Path

import torch

__all__ = ["free_memory"]

_UNKNOWN = 4 << 30  # bytes, if the system does not report them
_CGROUPS = (  # limit and usage of a container, cgroups v2 and v1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> int:
    """Free bytes on a device; on the CPU the memory that the system calls available, within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_available(), *_left_in_containers()])


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _UNKNOWN
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return kib["MemAvailable"] << 10


def _left_in_containers() -> list[int]:
    """Limit minus usage of each control group with a limit; usage includes caches, so this is a little too low."""
    left = []
    for limit, use in _CGROUPS:
        try:
            left.append(int(Path(limit).read_text()) - int(Path(use).read_text()))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return left
