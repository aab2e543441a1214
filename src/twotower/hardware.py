"""What this machine has (probed once) and which target fits it (decided by a pure function, with its reasons)."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import ConfigError, EngineMismatchError
from twotower.extras import TARGET_EXTRA, install_command, installed_libraries

__all__ = [
    "ANY_SM",
    "RTX_SMS",
    "TARGETS",
    "Gpu",
    "Machine",
    "Selection",
    "installed_version",
    "probe_machine",
    "select_target",
    "untried",
]

TARGETS = ("trt", "rtx", "ort-cuda", "ort-cpu")
"""Every target the design knows, the one to prefer first."""

_NEEDS = {
    "trt": ("tensorrt",),
    "rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
    "ort-cuda": ("onnxruntime-gpu",),
    "ort-cpu": ("onnxruntime", "onnxruntime-gpu"),
}
_LIBRARIES = tuple(dict.fromkeys(name for names in _NEEDS.values() for name in names))
RTX_SMS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT for RTX lists."""

ANY_SM = "TWOTOWER_RTX_ANY_SM"
"""Environment variable that lets a person try TensorRT for RTX on a GPU it does not list: `default` builds for the
library's own set of GPUs, `current` for the GPU at hand; either opens and runs what was built.
Unset, neither is tried.
"""

_ANY_SM_VALUES = ("default", "current")

_CC_MAJOR, _CC_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU: its name, compute capability as e.g. 89, and memory in bytes."""

    name: str
    sm: int
    memory: int


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about this machine.

    Attributes:
        libraries: Installed inference distributions and their versions; one that another in front
            of it hides is left out.
        processor: The processor's name; likewise
        driver: NVIDIA's driver, empty where there is none.
        available: Bytes of memory the kernel could give to a new program, 0 where it does not say.
        rtx_any_sm: What `TWOTOWER_RTX_ANY_SM` says: `default`, `current`, or empty.
    """

    system: str
    cpus: int
    memory: int
    gpus: tuple[Gpu, ...]
    libraries: Mapping[str, str]
    processor: str = ""
    driver: str = ""
    available: int = 0
    rtx_any_sm: str = ""

    @property
    def conflict(self) -> str | None:
        """What is wrong with the set of installed libraries, if anything."""
        if {"onnxruntime", "onnxruntime-gpu"} <= set(self.libraries):
            return (
                "onnxruntime and onnxruntime-gpu are installed in the same folder; they hold the same files and overwrite one another: "
                "`pip uninstall onnxruntime onnxruntime-gpu`, then install exactly one of the extras `cpu` and `gpu`"
            )
        return None


@dataclass(frozen=True, slots=True)
class Selection:
    """A chosen target and why every other one was not taken."""

    target: str
    rejected: Mapping[str, str]


def probe_machine() -> Machine:
    """Looks at the machine: processors, memory, GPUs by the CUDA driver, installed libraries (none is imported)."""
    libraries = installed_libraries(_LIBRARIES)
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return Machine(
        platform.platform(terse=True),
        os.cpu_count() or 1,
        memory,
        _gpus(),
        libraries,
        processor=_processor(),
        driver=_driver(),
        available=_available(),
        rtx_any_sm=_rtx_any_sm(),
    )


def untried(how: str, sms: Sequence[int]) -> str:
    """What a person should know who goes on with GPUs that TensorRT for RTX does not list.

    Args:
        how: `default` or `current`.
        sms: Compute capabilities of the GPUs.
    """
    unlisted = [str(sm) for sm in sms if sm not in RTX_SMS]
    where = f"SM {', '.join(unlisted)}" if unlisted else "a GPU beyond its list"
    return f"{ANY_SM}={how} lets TensorRT for RTX be tried on {where}: NVIDIA does not support it there, and it was never tried by us"


def select_target(
    machine: Machine, built: Collection[str], *, wanted: str | None = None
) -> Selection:
    """Picks the target to run: the wanted one, or the first of `TARGETS` that is built and can run here.

    Args:
        machine: What `probe_machine` found.
        built: Targets the bundle has engines for; as a mapping, with the compute capabilities they
            hold code for, none for any.
        wanted: A target asked for by name; the reasons against it become the error.

    Raises:
        EngineMismatchError: no target fits; it lists each with its reason.
    """
    reasons = {target: _reason_against(target, machine, built) for target in TARGETS}
    candidates = (wanted,) if wanted else TARGETS
    for target in candidates:
        if target in reasons and reasons[target] is None:
            return Selection(
                target, {t: r or "less preferred" for t, r in reasons.items() if t != target}
            )
    if wanted and wanted not in reasons:
        raise EngineMismatchError(
            f"unknown target {wanted!r}",
            found=f"known targets: {', '.join(TARGETS)}",
            do="choose one with --target",
        )
    trace = "; ".join(f"{t}: {reasons[t]}" for t in candidates)
    raise EngineMismatchError(
        f"no engine fits this machine ({_describe(machine)})",
        found=trace,
        do=_remedy(machine, [t for t in candidates if t in built]),
    )


def installed_version(machine: Machine, target: str) -> str | None:
    """Version of the library a target runs on; None if it is not installed."""
    return next(
        (machine.libraries[name] for name in _NEEDS.get(target, ()) if name in machine.libraries),
        None,
    )


def _reason_against(target: str, machine: Machine, built: Collection[str]) -> str | None:
    if target not in built:
        return "not built"
    if not any(name in machine.libraries for name in _NEEDS[target]):
        return f"{_NEEDS[target][0]} is not installed"
    if target.startswith("ort") and machine.conflict:
        return machine.conflict
    if target == "ort-cpu":
        return None
    if not machine.gpus:
        return "no NVIDIA GPU"
    if target == "rtx" and machine.rtx_any_sm:
        return None
    if target == "rtx" and all(gpu.sm not in RTX_SMS for gpu in machine.gpus):
        listed = ", ".join(map(str, RTX_SMS))
        return f"TensorRT-RTX does not list SM {machine.gpus[0].sm} (it lists {listed}; {ANY_SM}=current tries it all the same)"
    sms = built.get(target, ()) if isinstance(built, Mapping) else ()
    if sms and all(gpu.sm not in sms for gpu in machine.gpus):
        return f"built for SM {', '.join(map(str, sms))}, the GPU is SM {machine.gpus[0].sm}"
    return None


def _remedy(machine: Machine, built: Sequence[str]) -> str:
    """What to do where no target runs: the library of one that is built, if this machine lacks that alone."""
    for target in built:
        able = target == "ort-cpu" or bool(machine.gpus)
        if able and not any(name in machine.libraries for name in _NEEDS[target]):
            return f"{install_command(TARGET_EXTRA[target])} for the built {target} engines"
    return "`twotower build BUNDLE --target ort-cpu` works on any machine"


def _describe(machine: Machine) -> str:
    return (
        ", ".join(f"{g.name} SM {g.sm}" for g in machine.gpus)
        or f"{machine.cpus} CPUs, no NVIDIA GPU"
    )


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()


def _driver() -> str:
    found = re.search(r"NVRM version: .*?(\d+(?:\.\d+)+)", _text("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _available() -> int:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _rtx_any_sm() -> str:
    value = os.environ.get(ANY_SM, "")
    if value and value not in _ANY_SM_VALUES:
        raise ConfigError(
            f"{ANY_SM}={value} cannot be used",
            found=f"allowed: {', '.join(_ANY_SM_VALUES)}, or nothing",
            do=f"`unset {ANY_SM}`, or set it to one of them",
        )
    return value


def _text(file: str) -> str:
    """A file of the kernel's; empty where there is none."""
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gpus() -> tuple[Gpu, ...]:
    """GPUs as the CUDA driver lists them; none where there is no driver. The driver's C interface needs no package."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(cuda, index) for index in range(count.value))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    parts = []
    for attribute in (_CC_MAJOR, _CC_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(value.value)
    return Gpu(name.value.decode(errors="replace"), 10 * parts[0] + parts[1], memory.value)
