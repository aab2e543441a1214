"""Which inference libraries are installed, by distribution; where two hold the same module, the one that would be imported."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

__all__ = ["installed_libraries"]

_ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu")  # both bring the module onnxruntime


def installed_libraries(names: Iterable[str]) -> dict[str, str]:
    """Version of each named distribution that is installed; nothing is imported.

    Of onnxruntime and onnxruntime-gpu in different folders of `sys.path` the one in front is the library, and the other is left out. In one
    folder they have overwritten one another, and both are listed.
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
    """Those of the distributions, with their versions, that the file belongs to which `import module` would load."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return {}
    file = Path(spec.origin)
    installed = ((name, found) for name in names for found in distributions(name=name))
    return {name: found.version for name, found in installed if _owns(found, file)}


def _owns(distribution: Distribution, file: Path) -> bool:
    listed = distribution.files
    if listed is None:  # installed by something that keeps no list
        return Path(str(distribution.locate_file("/".join(file.parts[-2:])))).resolve() == file.resolve()
    return any(f.parts == file.parts[-2:] and Path(str(f.locate())).resolve() == file.resolve() for f in listed)
