"""The pieces of a pack: each function makes one of them in the pack's folder.

A function raises `ImportError` where a library that it needs is not installed.
"""

from __future__ import annotations

import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tools.gpu.library import split_file
from tools.gpu.rtx import FOLDER as RTX_FOLDER
from tools.gpu.rtx_setup import LIBRARY, REST, built_for

__all__ = [
    "LIBRARY_FILES",
    "TRITON",
    "bundles",
    "carried",
    "experts",
    "full_size",
    "library",
    "rtx",
    "rtx_version",
]

TRITON = "triton==3.9.0"
SMS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that the expert kernels are compiled for."""

PREBUILT = ("default", "SM80")
"""Capabilities that plans are built for beforehand."""

CALLS = ("call1", "call2")
LIBRARY_FILES = (
    *(f"{call}/{LIBRARY}.{i}.xz" for i, call in enumerate(CALLS)),
    *(f"{call}/{LIBRARY}.json" for call in CALLS),
    f"call1/{REST}",
)
_SHARES = (10, 9)
"""Of the library in each call: the second has more besides."""

EXPORTING = ("onnx-ir", "packaging")
"""Of Python alone, and what exporting needs beside onnx and what comes with torch."""

_RTX = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu13-libs")
_BINDINGS = "tensorrt-rtx-cu13-bindings"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64")


def rtx_version() -> str:
    """Of the TensorRT for RTX that is installed, and so packed; empty for none."""
    try:
        return distribution(_RTX[0]).version
    except PackageNotFoundError:
        return ""


def carried() -> str:
    """What of `EXPORTING` is installed, and so packed; empty where something is missing."""
    try:
        return ", ".join(f"{name} {distribution(name).version}" for name in EXPORTING)
    except PackageNotFoundError:
        return ""


def experts(pack: Path) -> None:
    """The published layer's expert kernels, by the Triton that twotower asks for."""
    from tools.gpu.experts import ARCHIVE, FOLDER

    with tempfile.TemporaryDirectory() as scratch, _with_triton():
        command = [sys.executable, "-m", "tools.gpu.expert_cubins", f"{scratch}/{FOLDER}"]
        subprocess.run([*command, *map(str, SMS)], check=True, stdout=subprocess.DEVNULL)
        _pack_folder(Path(scratch), pack / "call1" / ARCHIVE)


@contextmanager
def _with_triton() -> Iterator[None]:
    """Triton for processes that are started here and for this one; fetched where it is missing."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    before = os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory() as site:
        _pip("install", "--no-deps", "--target", site, TRITON)
        os.environ["PYTHONPATH"] = _joined(site, before)
        sys.path.insert(0, site)
        try:
            yield
        finally:
            sys.path.remove(site)
            os.environ.pop("PYTHONPATH")
            os.environ.update({} if before is None else {"PYTHONPATH": before})


def bundles(pack: Path) -> None:
    """Bundles with torch engines; one archive, because the same weights lie in several of them."""
    from tools.gpu.cuda_layer import ARCHIVE, CASES, torch_bundle

    with tempfile.TemporaryDirectory() as scratch, _with_triton():
        for case in CASES:
            torch_bundle(case, Path(scratch) / case.name)
        _pack_folder(Path(scratch), pack / "call1" / ARCHIVE)


def rtx(pack: Path) -> None:
    """Passes of the small models with their plans for the default set and for SM 80."""
    import tensorrt_rtx as trt

    from tools.gpu.plans import PlanOptions, build_plan, make_logger
    from tools.gpu.recorded import recorded_passes, write_pass
    from tools.gpu.rtx_trial import Trial, fixed_shapes, plan_file

    folder = pack / "call2" / RTX_FOLDER
    folder.mkdir(parents=True)
    said: list[str] = []
    logger = make_logger(trt, said.append)
    for name, one in recorded_passes().items():
        write_pass(folder, name, one)
        shapes = fixed_shapes({key: array.shape for key, array in one.given.items()})
        for capability in PREBUILT:
            options = PlanOptions(capability=capability, profiles=(shapes,))
            plan = build_plan(trt, logger, one.graph, options)
            if plan is None:
                raise RuntimeError(f"no plan of {name} for {capability}: {said[-3:]}")
            file = plan_file(Trial(folder, name, capability))
            file.write_bytes(lzma.compress(bytes(plan), preset=9))


def full_size(pack: Path) -> None:
    """The published model's graphs, programs and expert kernels in bfloat16, without weights."""
    from tools.gpu.full_size import ARCHIVE, FOLDER, build_full_size

    with tempfile.TemporaryDirectory() as scratch, built_for(PREBUILT[0]) as words, _with_triton():
        build_full_size(Path(scratch) / FOLDER, words)
        _pack_folder(Path(scratch), pack / "call2" / ARCHIVE)


def targets(pack: Path) -> None:
    """The small models with RTX engines for the default set, and twotower-tiny's reference answer.

    Programs with kernels between: dense engines are built where they are asked for, in seconds.
    """
    from tools.gpu.recorded_texts import FIXTURES
    from tools.gpu.targets import ARCHIVE, HALF, TINY, Asked, built, store_reference_answer

    with tempfile.TemporaryDirectory() as scratch, built_for(PREBUILT[0]) as words, _with_triton():
        asked = Asked("rtx", Path(scratch), words)
        for fixture in ("hybrid-a", "hybrid-b"):
            built(FIXTURES / fixture, asked, "float32")
        for dtype in HALF:
            store_reference_answer(built(TINY, asked, dtype), asked, dtype)
        _pack_folder(Path(scratch), pack / "call2" / ARCHIVE)


def library(pack: Path, python: str) -> None:
    """TensorRT for RTX as installed here, its library in parts, and what another Python needs.

    That is the bindings, tokenizers, which the runtime needs for text, and what exports a model.
    """
    if not rtx_version():
        raise ImportError("TensorRT for RTX is not installed (the extra `rtx`)")
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        for name in (*_RTX, *EXPORTING):
            _copy_distribution(name, site)
        wheels = Path(scratch) / "wheels"
        platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
        _pip(
            *("download", "--no-deps", "--only-binary=:all:", "--implementation", "cp", *platforms),
            *("--python-version", python, "-d", str(wheels)),
            *(f"{_BINDINGS}=={rtx_version()}", f"tokenizers=={distribution('tokenizers').version}"),
        )
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(site)
        large = next(site.rglob(LIBRARY))
        split_file(large, [pack / call for call in CALLS], shares=_SHARES)
        large.unlink()
        _pack_folder(site, pack / "call1" / REST)


def _copy_distribution(name: str, site: Path) -> None:
    """An installed distribution's files, without caches."""
    found = distribution(name)
    for file in found.files or ():
        if "__pycache__" not in file.parts and ".." not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.locate_file(file), target)


def _pack_folder(folder: Path, archive: Path) -> None:
    """A folder as a compressed tar, without owners and times, in the order of the names."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for file in sorted(folder.rglob("*")):
            packed.add(file, file.relative_to(folder).as_posix(), recursive=False, filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _pip(*words: str) -> None:
    command: Sequence[str] = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    subprocess.run([*command, *words], check=True)


def _joined(first: str, rest: str | None) -> str:
    return os.pathsep.join(filter(None, (first, rest)))
