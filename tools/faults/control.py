"""The page of shared memory that tells the shim (shim.c) which system call fails, and how."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

_LAYOUT = struct.Struct("=qqiiiii4096s")
_COUNT, _FIRED = struct.Struct("=q"), struct.Struct("=i")
_FIRED_AT = struct.calcsize("=qqiiii")


class Call(IntFlag):
    """Kinds of system calls; values as in shim.c."""

    WRITE = 1
    PUBLISH = 2
    SYNC = 4
    MAKE = 8
    READ = 16


CHANGES = Call.WRITE | Call.PUBLISH | Call.SYNC | Call.MAKE


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        under: The folder whose files it concerns.
        kinds: Calls that count.
        at: The call that fails, from 1; 0 counts only.
        error: errno of it; 0 kills the process with SIGKILL in its place.
        sticky: All later ones fail, too, as on a full disk.
    """

    under: Path
    kinds: Call = CHANGES
    at: int = 0
    error: int = 0
    sticky: bool = False


class Control:
    """The page; one for each worker."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(bytes(_LAYOUT.size))
        with file.open("r+b") as opened:
            self._page = mmap.mmap(opened.fileno(), 0)

    def arm(self, fault: Fault, process: int) -> None:
        """Counts from now on; `process` is the one that a kill hits."""
        under = os.fsencode(fault.under.resolve()) + b"/"
        self._page[:] = _LAYOUT.pack(
            0, fault.at, fault.kinds, fault.error, fault.sticky, process, 0, under
        )

    def disarm(self) -> None:
        """Lets everything through."""
        self._page[:] = bytes(_LAYOUT.size)

    @property
    def count(self) -> int:
        """Calls since it was armed."""
        return int(_COUNT.unpack_from(self._page)[0])

    @property
    def fired(self) -> bool:
        """Whether the call was reached."""
        return bool(_FIRED.unpack_from(self._page, _FIRED_AT)[0])


def build_shim(folder: Path) -> Path:
    """Compiles the shim; returns the library.

    Raises:
        SystemExit: there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("faults in system calls need a C compiler: install gcc")
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library
