"""The list beside compiled kernels: what each file is, read and checked without Triton."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from twotower.errors import BundleError, EngineMismatchError
from twotower.kernels.shape import ExpertShape
from twotower.records import decode, encode, stored

MANIFEST = "manifest.json"
"""Its name in the folder of the kernels."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """One kernel compiled for one compute capability.

    Attributes:
        entry: Name of the function in it.
        nulls: Pointers of Triton's own that follow them; 0 is passed.
        threads: Threads of a program.
        shared: Dynamic shared memory of a program, bytes.
        registers: Registers of a thread.
        stack: Bytes of local memory of a thread, spilled registers included.
        matrix_instructions: The matrix instructions it uses, by name.
    """

    kernel: str
    sm: int
    file: str
    entry: str
    sha256: str
    arguments: tuple[tuple[str, str], ...]
    nulls: int
    threads: int
    shared: int
    registers: int
    stack: int
    matrix_instructions: tuple[str, ...] = ()
    grid: str = ""
    constants: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file:
            raise ValueError(f"{self.file!r} is not the name of a file beside it")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The kernels of one layer shape in a folder.

    Attributes:
        fp_fusion: Whether it could contract products and sums, as TRITON_DEFAULT_FP_FUSION says.
        max_tokens: The most tokens of a launch.
    """

    folder: Path
    shape: ExpertShape
    triton: str
    fp_fusion: bool = field(metadata=stored("TRITON_DEFAULT_FP_FUSION"))
    max_tokens: int
    cubins: tuple[Cubin, ...]
    schema: Literal[1] = field(default=1, metadata=stored(required=True))

    @property
    def sms(self) -> tuple[int, ...]:
        """Compute capabilities there are kernels for."""
        return tuple(sorted({cubin.sm for cubin in self.cubins}))

    def cubin(self, kernel: str, sm: int) -> Cubin:
        """The file of a kernel; EngineMismatchError without one for this capability."""
        for cubin in self.cubins:
            if (cubin.kernel, cubin.sm) == (kernel, sm):
                return cubin
        raise EngineMismatchError(
            f"the expert kernels of this bundle were not compiled for SM {sm}",
            found=f"kernel {kernel!r}; compiled for SM {', '.join(map(str, self.sms)) or 'none'}",
            do=f"{build_command(self.folder, {*self.sms, sm})} compiles them",
        )

    def code(self, cubin: Cubin) -> bytes:
        """A file's checked bytes; BundleError if missing or not the one compiled."""
        try:
            data = (self.folder / cubin.file).read_bytes()
        except OSError as e:
            raise BundleError(
                "a compiled expert kernel cannot be read",
                found=f"{self.folder / cubin.file}: {e.strerror}",
                do=f"{build_command(self.folder, self.sms)} compiles the kernels again",
            ) from e
        digest = hashlib.sha256(data).hexdigest()
        if digest != cubin.sha256:
            raise BundleError(
                f"the compiled expert kernel {cubin.file} is damaged or of another build",
                found=f"SHA-256 {digest[:12]}..., the manifest says {cubin.sha256[:12]}...",
                do=f"{build_command(self.folder, self.sms)} compiles the kernels again",
            )
        return data

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"schema": self.schema, **encode(self, leave_out=("folder",))}


def build_command(folder: Path, sms: Iterable[int] = ()) -> str:
    """The command, in backquotes, that compiles kernels into BUNDLE/engines/TARGET/CODE.

    Without `sms` the build chooses. Full TensorRT builds for the GPU at hand and takes none.
    """
    *above, engines, target, _ = ("", "", "", *folder.parts)
    name = str(Path(*above))
    if engines != "engines":
        name, target = "BUNDLE", "rtx"
    listed, chosen = ",".join(map(str, sorted(sms))), ""
    if listed and target != "trt":
        chosen = f" --sm {listed}"
    return f"`twotower build {name} --target {target}{chosen} --experts kernels --force`"


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest; BundleError if unreadable. Files are checked when read."""
    path, again = folder / MANIFEST, f"{build_command(folder)} compiles the kernels again"
    try:
        return decode(Manifest, json.loads(path.read_text(encoding="utf-8")), folder=folder)
    except OSError as e:
        what, found = "the list of the expert kernels cannot be read", f"{path}: {e.strerror}"
        raise BundleError(what, found=found, do=again) from e
    except ValueError as e:
        what, found = "the list of the expert kernels is damaged", f"{path}: {e}"
        raise BundleError(what, found=found, do=again) from e
