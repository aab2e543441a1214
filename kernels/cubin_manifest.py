"""The list beside compiled kernels: what each file is, read and checked without Triton."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twotower.errors import BundleError, EngineMismatchError
from twotower.kernels.shape import ExpertShape

__all__ = ["MANIFEST", "Cubin", "Manifest", "build_command", "read_manifest"]

MANIFEST = "manifest.json"
"""Its name in the folder of the kernels."""

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Cubin:
    """One kernel compiled for one compute capability.

    Attributes:
        kernel: Its name, as launches use it.
        sm: Compute capability.
        file: Name of the file.
        entry: Name of the function in it.
        sha256: Of the file.
        arguments: Names and types of the parameters of a launch.
        nulls: Pointers of Triton's own that follow them; 0 is passed.
        threads: Threads of a program.
        shared: Dynamic shared memory of a program, bytes.
        registers: Registers of a thread.
        stack: Bytes of local memory of a thread, spilled registers included.
        matrix_instructions: The matrix instructions it uses, by name.
        grid: How many programs are launched, for a reader.
        constants: What was compiled in.
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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cubin:
        """The same from plain data.

        Raises:
            TypeError, KeyError, ValueError: it is not such data.
        """
        file = str(data["file"])
        if Path(file).name != file:
            raise ValueError(f"{file!r} is not the name of a file beside it")
        arguments = tuple((str(name), str(kind)) for name, kind in data["arguments"])
        instructions = tuple(map(str, data["matrix_instructions"]))
        constants = {str(name): int(value) for name, value in data["constants"].items()}
        return cls(
            **{
                **data,
                "arguments": arguments,
                "matrix_instructions": instructions,
                "constants": constants,
            }
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The kernels of one layer shape in a folder.

    Attributes:
        folder: Where the files lie.
        shape: The layer.
        triton: Version of the compiler.
        fp_fusion: Whether it could contract products and sums, as TRITON_DEFAULT_FP_FUSION says.
        max_tokens: The most tokens of a launch.
        cubins: The files.
    """

    folder: Path
    shape: ExpertShape
    triton: str
    fp_fusion: bool
    max_tokens: int
    cubins: tuple[Cubin, ...]

    @property
    def sms(self) -> tuple[int, ...]:
        """Compute capabilities there are kernels for."""
        return tuple(sorted({cubin.sm for cubin in self.cubins}))

    def cubin(self, kernel: str, sm: int) -> Cubin:
        """The file of a kernel.

        Raises:
            EngineMismatchError: there is none for this compute capability.
        """
        for cubin in self.cubins:
            if (cubin.kernel, cubin.sm) == (kernel, sm):
                return cubin
        raise EngineMismatchError(
            f"the expert kernels of this bundle were not compiled for SM {sm}",
            found=f"kernel {kernel!r}; compiled for SM {', '.join(map(str, self.sms)) or 'none'}",
            do=f"{build_command(self.folder, {*self.sms, sm})} compiles them",
        )

    def code(self, cubin: Cubin) -> bytes:
        """The bytes of a file, checked.

        Raises:
            BundleError: the file is missing or is not the one that was compiled.
        """
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
        return {
            "schema": _SCHEMA,
            "shape": self.shape.to_json(),
            "triton": self.triton,
            "TRITON_DEFAULT_FP_FUSION": self.fp_fusion,
            "max_tokens": self.max_tokens,
            "cubins": [
                asdict(cubin) | {"constants": dict(cubin.constants)} for cubin in self.cubins
            ],
        }


def build_command(folder: Path, sms: Iterable[int] = ()) -> str:
    """What to type to have kernels compiled into a folder, in backquotes.

    Args:
        folder: `BUNDLE/engines/TARGET/CODE`; any other stands for a bundle nobody can name.
        sms: Compute capabilities; empty for the build's own choice. Full TensorRT builds for the
            GPU at hand and takes none.
    """
    *above, engines, target, _ = ("", "", "", *folder.parts)
    known = engines == "engines"
    name, target = (str(Path(*above)), target) if known else ("BUNDLE", "rtx")
    listed = ",".join(map(str, sorted(sms)))
    chosen = f" --sm {listed}" if listed and target != "trt" else ""
    return f"`twotower build {name} --target {target}{chosen} --experts kernels --force`"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; the files are checked when they are read.

    Raises:
        BundleError: it is missing, not readable or of another schema.
    """
    path, again = folder / MANIFEST, f"{build_command(folder)} compiles the kernels again"
    try:
        return _from_json(folder, json.loads(path.read_text(encoding="utf-8")))
    except OSError as e:
        raise BundleError(
            "the list of the expert kernels cannot be read",
            found=f"{path}: {e.strerror}",
            do=again,
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BundleError(
            "the list of the expert kernels is damaged", found=f"{path}: {e!r}", do=again
        ) from e


def _from_json(folder: Path, data: Mapping[str, Any]) -> Manifest:
    if data["schema"] != _SCHEMA:
        raise ValueError(f"schema {data['schema']}, this version reads {_SCHEMA}")
    return Manifest(
        folder,
        ExpertShape.from_json(data["shape"]),
        str(data["triton"]),
        bool(data["TRITON_DEFAULT_FP_FUSION"]),
        int(data["max_tokens"]),
        tuple(Cubin.from_json(entry) for entry in data["cubins"]),
    )
