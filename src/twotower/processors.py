"""How many processor cores and how much memory this process may use: the machine's, within the limits of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["usable_cores", "usable_memory"]


def usable_cores(root: Path = Path("/")) -> int:
    """Cores to compute on, at least 1.

    Of the logical processors in the process's affinity mask those that share a core count once,
    because two threads on one core's arithmetic units win nothing. A CPU quota of the control
    group, or of one above it, is an upper limit, rounded up: a container with 1.5 CPUs gets two
    threads.

    Args:
        root: Where `proc` and `sys` lie; another folder in tests.
    """
    cores = _cores(_affinity(), root)
    quota = min(_quotas(root), default=math.inf)
    return max(1, min(cores, math.ceil(quota) if math.isfinite(quota) else cores))


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may use, whether they are free or not: the machine's, or the limit of a control group it is in.

    Args:
        root: Where `proc` and `sys` lie; another folder in tests.

    Returns:
        0 where the system does not say.
    """
    machine = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    limits = (
        _text(folder / file)
        for folder in _folders(root, "memory")
        for file in ("memory.max", "memory.limit_in_bytes")
    )
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _cores(processors: Iterable[int], root: Path) -> int:
    """Different cores among logical processors; one that does not tell its siblings is a core of its own."""
    folder = root / "sys/devices/system/cpu"
    return len(
        {_text(folder / f"cpu{n}/topology/thread_siblings_list") or str(n) for n in processors}
    )


def _quotas(root: Path) -> Iterator[float]:
    """CPUs that each control group from this process's own up to the visible top allows it, where there is a limit."""
    for folder in _folders(root, "cpu"):
        yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    second = _text(folder / "cpu.max").split()  # version 2: "150000 100000" or "max 100000"
    if len(second) == 2 and second[0].isdigit():
        yield int(second[0]) / int(second[1])
    quota, period = (
        _text(folder / "cpu.cfs_quota_us"),
        _text(folder / "cpu.cfs_period_us"),
    )  # version 1: -1 is no limit
    if quota.isdigit() and period.isdigit():
        yield int(quota) / int(period)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups, from its own up to the visible top, in every hierarchy with a controller."""
    for group, mount in _groups(root, controller):
        for folder in (group, *group.parents):
            yield folder
            if folder == mount:
                break


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, Path]]:
    """Folder of this process's own group and of its mount, in every hierarchy with a controller."""
    own: dict[str, str] = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # version 2 has no controllers: ""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mounted, _, kind = line.partition(" - ")
        filesystem, _, options = kind.split(" ", 2)
        name = {"cgroup2": "", "cgroup": controller}.get(filesystem)
        if name not in own or (name and name not in options.split(",")):
            continue
        top, point = mounted.split()[3:5]
        mount = root / point.lstrip("/")
        group = Path(os.path.normpath(mount / os.path.relpath(own[name], top)))
        # In a container the path can be the host's, outside what is mounted: then the mount itself
        # is the group.
        yield (group if group.is_dir() and mount in group.parents else mount), mount


def _text(file: Path) -> str:
    """A file of the kernel's, stripped; empty where there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
