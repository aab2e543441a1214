"""Optional libraries: which extra brings each, which are installed, and what to say of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

from twotower.errors import ConfigError

EXTRA_OF: Mapping[str, str] = {
    "cuda": "gpu",
    "huggingface_hub": "export",
    "lm_eval": "evaluate",
    "matplotlib": "evaluate",
    "onnx": "cpu",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
    "safetensors": "export",
    "tensorrt": "gpu",
    "tensorrt_rtx": "rtx",
    "torch": "export",
    "transformers": "peers",
    "triton": "kernels",
}
"""First name of an import -> the extra to install for it (several extras bring some of them)."""


TARGET_EXTRA: Mapping[str, str] = {"trt": "gpu", "rtx": "rtx", "ort-cuda": "gpu", "ort-cpu": "cpu"}
"""Target -> the extra that brings its library."""


def install_command(extra: str) -> str:
    """What to type for an extra, or several separated by commas."""
    return f"`pip install 'twotower[{extra}]'`"


def require_libraries(extra: str, *modules: str, what: str = "this command") -> None:
    """Says before any work (ConfigError) what module is missing, and the extra that has it."""
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise ConfigError(
            f"{what} needs libraries that are not installed here",
            found=f"not installed: {', '.join(missing)}",
            do=install_command(extra),
        )


def missing_library(error: ModuleNotFoundError, what: str = "this command") -> ConfigError | None:
    """The same for an import that has failed; None if the module is of no extra."""
    name = (error.name or "").split(".")[0]
    if name not in EXTRA_OF:
        return None
    return ConfigError(
        f"{what} needs a library that is not installed here",
        found=f"not installed: {error.name}",
        do=install_command(EXTRA_OF[name]),
    )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


_ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu")  # both bring the module onnxruntime


def installed_libraries(names: Iterable[str]) -> dict[str, str]:
    """Version of each named distribution that is installed; nothing is imported.

    Of onnxruntime and onnxruntime-gpu in different folders of `sys.path` only the one in front
    counts. In one folder they have overwritten one another, and both are listed.
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if set(_ONNXRUNTIME) <= set(found):
        owners = _owners("onnxruntime", _ONNXRUNTIME)
        if owners:
            found = {name: v for name, v in found.items() if name not in _ONNXRUNTIME} | owners
    return found


def _owners(module: str, names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that own the file `import module` would load."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return {}
    file = Path(spec.origin)
    installed = ((name, found) for name in names for found in distributions(name=name))
    return {name: found.version for name, found in installed if _owns(found, file)}


def _owns(distribution: Distribution, file: Path) -> bool:
    listed = distribution.files
    if listed is None:  # installed by something that keeps no list
        return (
            Path(str(distribution.locate_file("/".join(file.parts[-2:])))).resolve()
            == file.resolve()
        )
    return any(
        f.parts == file.parts[-2:] and Path(str(f.locate())).resolve() == file.resolve()
        for f in listed
    )
