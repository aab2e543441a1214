"""Archives of our own, unpacked as safely as the Python at hand can."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

__all__ = ["unpack"]


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Extracts everything, without links out of the folder where tarfile knows how.

    It does from Python 3.11.4 on.
    """
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    archive.extractall(folder, **safely)
