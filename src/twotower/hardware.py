"""What this machine has, probed once, and which target fits it, with the reasons."""

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
from twotower.processors import installed_memory, read_text

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
"""Environment variable that lets a person try TensorRT for RTX on a GPU it does not list.

`default` builds for the library's own set of GPUs, `current` for the GPU at hand; either opens and
runs what was built. Unset, neither is tried.
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

    `libraries` are installed inference distributions with versions, without one that another in
    front of it hides; `driver` is NVIDIA's, empty if none; `available` is the memory in bytes the
    kernel could give to a new program, 0 if unknown; `rtx_any_sm` is what `TWOTOWER_RTX_ANY_SM`
    says: `default`, `current`, or empty.
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
                "onnxruntime and onnxruntime-gpu are installed in the same folder; they hold the "
                "same files and overwrite one another: `pip uninstall onnxruntime onnxruntime-gpu`,"
                " then install exactly one of the extras `cpu` and `gpu`"
            )
        return None


def probe_machine() -> Machine:
    """Looks at the machine: processors, memory, GPUs, installed libraries (none is imported).

    ConfigError if the environment variable `ANY_SM` has another value than it may.
    """
    any_sm = os.environ.get(ANY_SM, "")
    if any_sm and any_sm not in _ANY_SM_VALUES:
        raise ConfigError(
            f"{ANY_SM}={any_sm} cannot be used",
            found=f"allowed: {', '.join(_ANY_SM_VALUES)}, or nothing",
            do=f"`unset {ANY_SM}`, or set it to one of them",
        )
    processor = _found(r"^model name\s*: (.+)$", "/proc/cpuinfo").strip()
    return Machine(
        system=platform.platform(terse=True),
        cpus=os.cpu_count() or 1,
        memory=installed_memory(),
        gpus=_gpus(),
        libraries=installed_libraries(_LIBRARIES),
        processor=processor or platform.processor() or platform.machine(),
        driver=_found(r"NVRM version: .*?(\d+(?:\.\d+)+)", "/proc/driver/nvidia/version"),
        available=1024 * int(_found(r"^MemAvailable:\s+(\d+) kB$", "/proc/meminfo") or 0),
        rtx_any_sm=any_sm,
    )


def untried(how: str, sms: Sequence[int]) -> str:
    """What a person should know who goes on with GPUs (`sms`) that TensorRT for RTX does not list.

    `how` is `default` or `current`.
    """
    unlisted = [str(sm) for sm in sms if sm not in RTX_SMS]
    where = f"SM {', '.join(unlisted)}" if unlisted else "a GPU beyond its list"
    return (
        f"{ANY_SM}={how} lets TensorRT for RTX be tried on {where}: NVIDIA does not support it "
        "there, and it was never tried by us"
    )


def select_target(machine: Machine, built: Collection[str], *, wanted: str | None = None) -> str:
    """Picks the wanted target, or the first of `TARGETS` that is built and can run here.

    A mapping `built` has the compute capabilities the engines hold code for, none for any.

    Raises:
        EngineMismatchError: no target fits; it lists each with its reason.
    """
    reasons = {target: _reason_against(target, machine, built) for target in TARGETS}
    candidates = (wanted,) if wanted else TARGETS
    for target in candidates:
        if target in reasons and reasons[target] is None:
            return target
    if wanted and wanted not in reasons:
        raise EngineMismatchError(
            f"unknown target {wanted!r}",
            found=f"known targets: {', '.join(TARGETS)}",
            do="choose one with --target",
        )
    gpus = ", ".join(f"{gpu.name} SM {gpu.sm}" for gpu in machine.gpus)
    remedy = "`twotower build BUNDLE --target ort-cpu` works on any machine"
    for target in candidates:  # of one that is built the library may be all that is missing
        able = target in built and (target == "ort-cpu" or machine.gpus)
        if able and installed_version(machine, target) is None:
            remedy = f"{install_command(TARGET_EXTRA[target])} for the built {target} engines"
            break
    raise EngineMismatchError(
        f"no engine fits this machine ({gpus or f'{machine.cpus} CPUs, no NVIDIA GPU'})",
        found="; ".join(f"{t}: {reasons[t]}" for t in candidates),
        do=remedy,
    )


def installed_version(machine: Machine, target: str) -> str | None:
    """Version of the library a target runs on; None if it is not installed."""
    found = [machine.libraries[n] for n in _NEEDS.get(target, ()) if n in machine.libraries]
    return found[0] if found else None


def _reason_against(target: str, machine: Machine, built: Collection[str]) -> str | None:
    if target not in built:
        return "not built"
    if installed_version(machine, target) is None:
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
        return (
            f"TensorRT-RTX does not list SM {machine.gpus[0].sm} (it lists {listed}; "
            f"{ANY_SM}=current tries it all the same)"
        )
    sms = built.get(target, ()) if isinstance(built, Mapping) else ()
    if sms and all(gpu.sm not in sms for gpu in machine.gpus):
        return f"built for SM {', '.join(map(str, sms))}, the GPU is SM {machine.gpus[0].sm}"
    return None


def _found(pattern: str, file: str) -> str:
    """The first match's group in a file of the kernel; empty where there is none."""
    match = re.search(pattern, read_text(Path(file)), re.MULTILINE)
    return match[1] if match else ""


def _gpus() -> tuple[Gpu, ...]:
    """GPUs as the CUDA driver lists them, by its C interface, which needs no package."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    out = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        memory, major, minor = ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _CC_MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CC_MINOR, device)
        shown = name.value.decode(errors="replace")
        out.append(
            Gpu(
                shown,
                10 * major.value + minor.value,
                memory.value,
            )
        )
    return tuple(out)
