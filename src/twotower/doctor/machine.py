"""What a machine is: the facts `twotower doctor` prints, and those at the head of a report."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from twotower import __version__
from twotower.doctor.sections import Answers
from twotower.errors import EngineMismatchError
from twotower.hardware import TARGETS, Machine, select_target
from twotower.units import format_bytes

RUNS = "can run here"
"""What is said of a target that runs on this machine."""

_LIBRARIES = (
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "onnxruntime-gpu",
    "onnxruntime",
    "cuda-bindings",
    "torch",
    "triton",
    "onnx",
    "onnx-ir",
    "numpy",
    "tokenizers",
)
_SMI_FIELDS = (
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "pstate",
)
"""Asked of nvidia-smi: nothing that names this one card, such as its serial number or UUID."""


def machine_facts(machine: Machine) -> dict[str, Any]:
    """Facts as `twotower doctor --json` prints them; `checks` and `passes` are empty."""
    return {
        "twotower": __version__,
        "python": platform.python_version(),
        "system": machine.system,
        "processor": machine.processor,
        "cpus": machine.cpus,
        "memory_bytes": machine.memory,
        "driver": machine.driver,
        "gpus": [
            {
                "name": g.name,
                "sm": g.sm,
                "memory_bytes": g.memory,
            }
            for g in machine.gpus
        ],
        "libraries": dict(machine.libraries),
        "conflict": machine.conflict,
        "targets": targets_here(machine, TARGETS),
        "checks": [],
        "passes": [],
    }


def report_facts(machine: Machine) -> dict[str, str]:
    """What stands at the head of a page: a label and a text for each fact."""
    gpus = [f"{g.name}, SM {g.sm}, {format_bytes(g.memory)}" for g in machine.gpus]
    cores = f"{machine.cpus} cores, {format_bytes(machine.memory)}"
    libraries = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    return {
        "GPUs": "; ".join(gpus) or "none",
        "driver": machine.driver or "none",
        "processor": f"{machine.processor}, {cores}",
        "system": f"{machine.system}, Python {platform.python_version()}",
        "libraries": libraries or "none",
    }


def put_machine(answers: Answers, machine: Machine) -> None:
    """Answers a report's section on the machine: facts, and nothing that could fail."""
    answers.put(facts=report_facts(machine))
    targets = targets_here(machine, TARGETS)
    answers.table(
        "Targets",
        ("target", "on this machine"),
        list(targets.items()),
    )
    if smi := driver_facts():
        answers.table(
            "As found by nvidia-smi",
            ("", ""),
            list(smi.items()),
        )


def library_versions() -> dict[str, str]:
    """Installed libraries that numbers can depend on, without importing them."""
    out = {}
    for name in _LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def driver_facts() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [
        program,
        f"--query-gpu={','.join(_SMI_FIELDS)}",
        "--format=csv,noheader",
        "--id=0",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(
        zip(
            _SMI_FIELDS,
            done.stdout.strip().split(", "),
            strict=False,
        )
    )


def targets_here(machine: Machine, built: tuple[str, ...]) -> dict[str, str]:
    """For every target, whether this machine can run it, or could once it is built."""
    out = {}
    for target in TARGETS:
        try:
            select_target(machine, built, wanted=target)
            out[target] = RUNS
        except EngineMismatchError as e:
            out[target] = e.found.removeprefix(f"{target}: ")
    return out
