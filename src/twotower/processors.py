"""Processor cores and memory this process may use, within the limits of its control group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores to compute on, at least 1.

    Of the logical processors in the affinity mask those that share a core count once: two threads
    win nothing on one core's arithmetic units. A CPU quota of the control group, or of one above
    it, is an upper limit, rounded up: 1.5 CPUs get two threads. `root` is where `proc` and `sys`
    lie.
    """
    processors = set(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        processors = os.sched_getaffinity(0)
    cores = set()
    for number in processors:  # one that does not tell its siblings is a core of its own
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        cores.add(read_text(topology / "thread_siblings_list") or str(number))
    quotas = [quota for folder in _folders(root, "cpu") for quota in _quotas(folder)]
    return max(1, min([len(cores), *map(math.ceil, quotas)]))


def installed_memory() -> int:
    """Bytes of memory of the machine; 0 where the system does not say."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes this process may use, free or not: the machine's, or its control group's; 0 if unknown.

    `root` is where `proc` and `sys` lie.
    """
    limits = [installed_memory()]
    for folder in _folders(root, "memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            limit = read_text(folder / file)
            if limit.isdigit():
                limits.append(int(limit))
    return min(limits)


def _quotas(folder: Path) -> Iterator[float]:
    """CPUs that a control group is limited to, by either version of their files."""
    second = read_text(folder / "cpu.max").split()  # version 2: "150000 100000" or "max 100000"
    if len(second) == 2 and second[0].isdigit():
        yield int(second[0]) / int(second[1])
    quota = read_text(folder / "cpu.cfs_quota_us")  # version 1: -1 is no limit
    period = read_text(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        yield int(quota) / int(period)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """This process's groups, from its own up to the visible top, where a controller acts."""
    for group, mount in _groups(root, controller):
        for folder in (group, *group.parents):
            yield folder
            if folder == mount:
                break


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, Path]]:
    """Folder of this process's own group and of its mount, in hierarchies with a controller."""
    own: dict[str, str] = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path)  # version 2 has no controllers: ""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
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


def read_text(file: Path) -> str:
    """A file of the kernel's, stripped; empty where there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
