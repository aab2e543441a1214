"""How many cores a process may use, for machines and containers this one is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.processes import run_python
from twotower.processors import usable_cores, usable_memory

V2 = "30 20 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1 = "33 31 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "34 31 0:31 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n", encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def version_2(own: str, file: str = "cpu.max", **limits: str) -> dict[str, str]:
    """A machine with control groups of version 2: a limit by the group's folder, `top` for /."""
    files = {"proc/self/cgroup": f"0::{own}", "proc/self/mountinfo": V2}
    for folder, text in limits.items():
        below = "" if folder == "top" else folder.replace("_", "/") + "/"
        files[f"sys/fs/cgroup/{below}{file}"] = text
    return files


def version_1(own: str, mounts: str, **quotas: tuple[int, int]) -> dict[str, str]:
    """A machine with control groups of version 1: quota and period by folder."""
    files = {"proc/self/cgroup": own, "proc/self/mountinfo": mounts}
    for controller, (quota, period) in quotas.items():
        folder = "sys/fs/cgroup/" + controller.replace("_", "/").replace("cpu", "cpu,cpuacct")
        files[f"{folder}/cpu.cfs_quota_us"] = str(quota)
        files[f"{folder}/cpu.cfs_period_us"] = str(period)
    return files


def siblings(text: Callable[[int], str]) -> dict[str, str]:
    """Eight logical processors, each with the list of those on its core."""
    folder = "sys/devices/system/cpu"
    return {f"{folder}/cpu{n}/topology/thread_siblings_list": text(n) for n in range(8)}


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, 8),
        (version_2("/a", a="max 100000"), 8),
        (version_2("/a", a="300000 100000"), 3),
        (version_2("/a", a="150000 100000"), 2),
        (version_2("/a", a="10000 100000"), 1),
        (version_2("/a", a="6400000 100000"), 8),
        # The tightest of a group and the groups above it counts.
        (version_2("/p/b/t", p="200000 100000", p_b="500000 100000", p_b_t="max 100000"), 2),
        # In a container: a namespace of its own, or the host's path, of which the container sees
        # nothing.
        (version_2("/", top="400000 100000"), 4),
        (version_2("/system/box", top="400000 100000"), 4),
        (version_2("/../../box", top="400000 100000"), 4),
        # Version 1: the hierarchy with the controller `cpu`, whatever its folder is called.
        (
            version_1(
                "3:memory:/a\n2:cpu,cpuacct:/a\n0::/",
                f"{MEMORY}\n{V1.format(top='/')}",
                cpu_a=(250000, 100000),
                memory_a=(100000, 100000),
            ),
            3,
        ),
        (version_1("2:cpu,cpuacct:/d/box", V1.format(top="/d/box"), cpu=(50000, 25000)), 2),
        (version_1("2:cpu,cpuacct:/", V1.format(top="/"), cpu=(-1, 100000)), 8),
        # Two logical processors a core.
        (siblings(lambda n: f"{n % 4},{n % 4 + 4}"), 4),
        (
            siblings(lambda n: f"{n // 2 * 2}-{n // 2 * 2 + 1}")
            | version_2("/", top="200000 100000"),
            2,
        ),
    ],
)
def test_affinity_and_quota_say_how_many(tmp_path: Path, files: dict[str, str], want: int) -> None:
    assert usable_cores(machine(tmp_path, files)) == want


def test_a_narrower_affinity_counts_its_own_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert usable_cores(machine(tmp_path, siblings(str))) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_session_on_one_processor_starts_no_second_thread() -> None:
    """As `taskset -c 0` starts it: ONNX Runtime by itself would start one thread for every core."""
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from onnx import TensorProto, helper
from twotower.onnx_runtime import ort, session_options
a, b = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "ab")
graph = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "g", [a], [b])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
def started(**options):
    before = set(os.listdir("/proc/self/task"))
    given = model.SerializeToString(), session_options(**options)
    session = ort.InferenceSession(*given, providers=["CPUExecutionProvider"])
    return len(set(os.listdir("/proc/self/task")) - before)
print(started(), started(threads=3))
"""
    done = run_python("-c", code, check=True)
    assert done.stdout.split() == ["0", "2"]


MEMORY_V1 = {
    "proc/self/cgroup": "3:memory:/a\n2:cpu,cpuacct:/a",
    "proc/self/mountinfo": f"{MEMORY}\n{V1.format(top='/')}",
}


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, None),
        (version_2("/pod/box", "memory.max", pod_box="max"), None),
        (version_2("/pod/box", "memory.max", pod_box="4096000"), 4096000),
        (version_2("/pod/box", "memory.max", pod="8192", pod_box="4096000"), 8192),
        # Version 1 writes a number near 2**63 where there is no limit.
        (
            {**MEMORY_V1, "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712"},
            None,
        ),
        ({**MEMORY_V1, "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "1048576"}, 1048576),
        ({**MEMORY_V1, "sys/fs/cgroup/cpu,cpuacct/a/memory.limit_in_bytes": "1"}, None),
    ],
)
def test_memory_is_the_machine_s_within_the_control_group_s_limit(
    tmp_path: Path, files: dict[str, str], want: int | None
) -> None:
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert usable_memory(machine(tmp_path, files)) == (machine_bytes if want is None else want)
