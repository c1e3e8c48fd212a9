"""How much memory is free, on a GPU, on this machine and in the container that the process may be in."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch

# What the two versions of cgroups call their limits, what is taken, and the page cache in that, which is free
# for whoever needs it.
_VERSIONS = (
    (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; for the CPU, what machine and container leave."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        meminfo = Path("/proc/meminfo")
        if meminfo.exists():
            line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
            available = int(line.split()[1]) * 1024
        return min([available, *left_in_groups()])
    raise RuntimeError("this system does not say how much memory is free")


def give_back() -> None:
    """Let the system have the freed memory that the C library keeps for each thread, if it can be told to.

    It would grow with every block that threads read and write.
    """
    with suppress(AttributeError):  # of other libraries than glibc
        ctypes.CDLL(None).malloc_trim(0)


def memory_for_activations(device: torch.device) -> int:
    """Bytes of activations that may be kept between the stages of a block."""
    return free_memory(device) // (2 if device.type == "cuda" else 128)


def left_in_groups(process: Path = Path("/proc/self")) -> list[int]:
    """Bytes that each limit on the memory of a process leaves it; none where no container limits it.

    The limits are those of its control group and of the groups around that one, as far as they can be seen;
    `process` is its directory in /proc.
    """
    left = []
    for group in _groups(process):
        for limits, usage, cache in _VERSIONS:
            found = [int(text) for name in limits if (text := _read(group / name)).isdecimal()]
            taken = _read(group / usage)
            if found and taken.isdecimal():
                stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
                given_back = sum(int(stat.get(name, 0)) for name in cache)
                left.append(max(0, min(found) - max(0, int(taken) - given_back)))
    return left


def _groups(process: Path) -> Iterator[Path]:
    """The directories of the groups of a process that control memory, each before the one around it."""
    paths = {}
    for line in _read(process / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    for line in _read(process / "mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(maxsplit=2)
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, point = mount.split()[3:5]
        # of a container the mount may be all that it sees, while its path is that on the machine
        inside = PurePosixPath()
        if paths[kind].is_relative_to(root) and ".." not in paths[kind].parts:
            inside = paths[kind].relative_to(root)
        yield from (Path(point, one) for one in (inside, *inside.parents))


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
