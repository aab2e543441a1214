"""Makes a virtual environment with this project, or a wheel of it, installed.

Torch is the one dependency that needs care: from a plain package index it brings gigabytes of CUDA
libraries. Where the `gpu` extra is not asked for, its CPU build is taken: from the configured
package indexes if they have it, otherwise from PyTorch's own. A wheel is installed by this
interpreter's own pip, so that nothing but the wheel and what it asks for comes into the
environment.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
INSTALL = (
    "install",
    "--no-compile",
)  # of 20 000 files a run imports few, and those are compiled then
WITH_TORCH = {"export", "calibration", "evaluate"}
RTX = (sys.platform, platform.machine()) == ("linux", "x86_64")  # where it needs no GPU
CPU_TORCH = (
    TORCH if sys.platform == "darwin" else f"{TORCH}+cpu"
)  # macOS has CPU builds only, under the plain name
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_SOURCES = (  # (where, what pip is given), tried in this order
    ("the configured package indexes", [CPU_TORCH]),
    (CPU_INDEX, ["--extra-index-url", CPU_INDEX, CPU_TORCH]),
    ("the configured package indexes, with gigabytes of CUDA libraries that stay unused", [TORCH]),
)


def main() -> int:
    if sys.version_info < OLDEST_PYTHON:
        return _fail(
            f"twotower needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}",
            "make PYTHON=python3.12 ...",
        )
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--venv",
        type=Path,
        default=ROOT / ".venv",
        help="where the environment lies (default: .venv)",
    )
    parser.add_argument(
        "--extras",
        default="",
        help="extras to install, or none (default: export,gpu,kernels,evaluate,dev with an NVIDIA "
        "GPU, else export,cpu,rtx,kernels,evaluate,dev)",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        help="install this wheel, without pip beside it (default: this checkout, editable)",
    )
    args = parser.parse_args()
    extras = args.extras or (_default_extras())
    try:
        _install(args.venv, [] if extras == "none" else extras.split(","), args.wheel)
    except subprocess.CalledProcessError as e:
        hint = "read pip's message above"
        if "gpu" in extras.split(","):
            hint += "; TensorRT comes from NVIDIA's own package index. `make EXTRAS=export,cpu,evaluate,dev ...` installs without it"
        return _fail(f"`{' '.join(map(str, e.cmd))}` failed with exit code {e.returncode}", hint)
    return 0


def _default_extras() -> str:
    if shutil.which("nvidia-smi"):
        return "export,gpu,kernels,evaluate,dev"
    return "export,cpu,rtx,kernels,evaluate,dev" if RTX else "export,cpu,evaluate,dev"


def _install(venv: Path, extras: list[str], wheel: Path | None) -> None:
    print(
        f"installing twotower[{','.join(extras)}] into {venv}: a few minutes the first time",
        file=sys.stderr,
    )
    subprocess.run(
        [sys.executable, "-m", "venv", *(["--without-pip"] if wheel else []), str(venv)], check=True
    )
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip = (
        [str(python), "-m", "pip"]
        if wheel is None
        else [sys.executable, "-m", "pip", "--python", str(python)]
    )
    pip += ["--disable-pip-version-check", "--quiet"]
    _remove_other_onnxruntime(pip, extras)
    constraints: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        if "gpu" not in extras and WITH_TORCH & set(extras):
            _install_cpu_torch(pip)
            file = Path(scratch) / "constraints.txt"
            file.write_text(f"{TORCH}\n", encoding="utf-8")  # or the next command might replace it
            constraints = ["--constraint", str(file)]
        project = [str(wheel)] if wheel else ["--editable", str(ROOT)]
        project[-1] += f"[{','.join(extras)}]" if extras else ""
        subprocess.run([*pip, *INSTALL, *constraints, *project], check=True)


def _install_cpu_torch(pip: list[str]) -> None:
    """Takes torch from the first source that has it: a mirror or a wheel on this disk spares a download."""
    for where, arguments in TORCH_SOURCES:
        print(f"  torch for CPUs: trying {where}", file=sys.stderr)
        done = subprocess.run(
            [*pip, *INSTALL, *arguments], stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode == 0:
            return
    print(done.stderr, file=sys.stderr)
    done.check_returncode()


def _remove_other_onnxruntime(pip: list[str], extras: list[str]) -> None:
    """The two ONNX Runtime distributions overwrite one another: an environment changes sides cleanly or breaks."""
    unwanted = "onnxruntime" if "gpu" in extras else "onnxruntime-gpu"
    if subprocess.run([*pip, "show", unwanted], capture_output=True, check=False).returncode == 0:
        subprocess.run([*pip, "uninstall", "--yes", "onnxruntime", "onnxruntime-gpu"], check=True)


def _fail(what: str, do: str) -> int:
    print(f"error: {what}\n  do: {do}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
