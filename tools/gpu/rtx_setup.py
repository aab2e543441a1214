"""TensorRT for RTX on a machine without it, and on a GPU that it does not list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.gpu.library import join_file
from tools.gpu.questions import Given
from tools.gpu.unpack import unpack
from twotower.doctor import SkipSectionError
from twotower.errors import ConfigError
from twotower.hardware import ANY_SM, RTX_SMS, probe_machine

__all__ = [
    "CAPABILITIES",
    "LIBRARY",
    "REST",
    "built_for",
    "library_site",
    "running_capability",
    "set_up_rtx",
]

CAPABILITIES = ("default", "CURRENT", "SM80")
"""A plan for the library's own set, for the GPU at hand (built on it), for SM 80 alone."""

LIBRARY, REST = "libtensorrt_rtx.so.1", "tensorrt-rtx.tar.xz"
"""In a pack: the large library, in parts, and the rest of the wheels."""


def library_site(given: Given) -> Path | None:
    """Makes `import tensorrt_rtx` work here and in processes started from here.

    Returns:
        The folder with the pack's library; None for an installed one.

    Raises:
        SkipSectionError: it is neither in the pack nor installed.
    """
    rest = given.find(REST)
    if rest is None:
        done = subprocess.run([sys.executable, "-c", "import tensorrt_rtx"], check=False)
        if done.returncode:
            raise SkipSectionError("TensorRT for RTX is neither in the pack nor installed")
        return None
    site = given.work / "site"
    if not (site / "tensorrt_rtx").is_dir():
        try:
            join_file(LIBRARY, given.pack, site / "tensorrt_rtx_libs" / LIBRARY)
        except ConfigError as e:
            raise SkipSectionError(f"{e.what}: {e.found}") from e
        with tarfile.open(rest) as packed:
            unpack(packed, site)
    sys.path.insert(0, str(site))
    paths = filter(None, (str(site), os.environ.get("PYTHONPATH")))
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    return site


def running_capability(given: Given) -> str | None:
    """The first capability that the section `rtx` found to run, in the same work folder.

    Raises:
        SkipSectionError: it was asked, and found none.
    """
    file = given.work / "rtx.json"
    if not file.is_file():
        return None
    runs = json.loads(file.read_text(encoding="utf-8")).get("runs", {})
    works = [name for name, right in runs.items() if right]
    if not works:
        raise SkipSectionError("the section rtx found no plan that runs on this GPU")
    return works[0]


def set_up_rtx(given: Given) -> tuple[str, ...]:
    """Lets this process and those it starts build for this GPU and run on it.

    Returns:
        Words for `twotower build`.

    Raises:
        SkipSectionError: the library is not here, or nothing of it runs.
    """
    library_site(given)
    gpus = probe_machine().gpus
    if not gpus or gpus[0].sm in RTX_SMS:
        return ()
    environment, words = _asked_for(running_capability(given) or CAPABILITIES[0])
    os.environ.update(environment)
    return words


@contextmanager
def built_for(capability: str) -> Iterator[tuple[str, ...]]:
    """Within the `with` statement `twotower build` builds for a capability, given these words."""
    environment, words = _asked_for(capability)
    before = os.environ.get(ANY_SM)
    os.environ.update(environment)
    try:
        yield words
    finally:
        os.environ.pop(ANY_SM)
        os.environ.update({} if before is None else {ANY_SM: before})


def _asked_for(capability: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The environment and the words that ask for a capability."""
    current = {ANY_SM: "current" if capability == "CURRENT" else "default"}
    return current, ("--sm", capability[2:]) if capability.startswith("SM") else ()
