"""How much memory there still is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Give the bytes that this process can still take on a device; of the CPU, its RAM.

    A limit of the container (cgroup) or of the process (``ulimit -v``, ``ulimit -d``) counts.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return max(min(_free_on_host()), 0)


def _free_on_host() -> Iterator[int]:
    yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if os.name != "posix" or not Path("/proc/meminfo").is_file():
        return
    yield _kilobytes("/proc/meminfo", "MemAvailable:")
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        yield int(limit.read_text()) - int(used.read_text())
    import resource

    for kind, used_as in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            yield most - _kilobytes("/proc/self/status", used_as)


def _kilobytes(file: str, key: str) -> int:
    """Give a line's value in bytes."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
