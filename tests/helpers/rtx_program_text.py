"""Program text as TensorRT for RTX 1.7 writes it into its plans, made to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Described", "Launch", "Written", "plan_of", "program"]


@dataclass(frozen=True)
class Described:
    """A tensor; of `dims` a string is a size the host works out, `base` is what it views."""

    name: str
    dims: Sequence[int | str]
    dtype: str = "bf16"
    region: str = ""
    base: str | None = None

    def line(self) -> str:
        dims = " ".join(f'"{d}"' if isinstance(d, str) else str(d) for d in self.dims)
        if self.base is not None:
            place = f'base="{self.base}" const_offset=0 dims={{ {dims} }}'
            return f'  sub_tensor={{ {place} name="{self.name}" type={self.dtype} }}'
        place = f'offset=0 region="{self.region}" type={self.dtype}'
        return f'  tensor={{ alignment=128 dims={{ {dims} }} name="{self.name}" {place} }}'


@dataclass(frozen=True)
class Launch:
    """A statement of `main`."""

    name: str
    reads: Sequence[str] = ()
    writes: Sequence[str] = ()
    nodes: Sequence[str] = ()
    operation: str = "function"
    stream: int = 0

    def line(self) -> str:
        if self.operation in ("signal", "wait"):
            stream = f'stream={self.stream} event=1 layers=""'
            return f'  {self.operation}={{ name="{self.name}" {stream} }}'
        listed = [" ".join(f'"{name}"' for name in names) for names in (self.reads, self.writes)]
        layers = "\x1f".join(f"[ONNX Layer: {node}]" for node in self.nodes)
        keys = (
            ("input", "output")
            if self.operation == "fully_connected"
            else ("input_args", "output_args")
        )
        args = " ".join(f"{key}={{ {names} }}" for key, names in zip(keys, listed, strict=True))
        backbone = " backbone=gemm" if self.operation == "runtime_fusion" else ""
        words = f'name={self.name} {args} stream={self.stream} layers="{layers}"{backbone}'
        return f"  {self.operation}={{ {words} }}"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A whole program.

    `inputs` are bound from outside; `rows` is the greatest value of the size `rows` (proxy
    "rows.1").
    """

    inputs: Sequence[str]
    tensors: Sequence[Described]
    launches: Sequence[Launch]
    outputs: Sequence[str] = ("y.1",)
    regions: Sequence[tuple[str, int]] = (("scratch_0", 4096), ("scratch_1", 1024))
    constants: Sequence[tuple[str, int]] = (("p-consts", 512),)
    streams: int = 1
    layout: int = 5
    capturable: int = 1
    sms: Sequence[int] = (89,)
    rows: int = 8
    host: Sequence[str] = field(default_factory=tuple)

    def text(self) -> str:
        return "".join((self._header(), self._descriptors(), self._main(), self._shapes()))

    def _header(self) -> str:
        place = "alignment=128 instance=0 type=user place=accelerator unified=false"
        regions = [
            f"  region = {{ name={name} size={size} {place} }}" for name, size in self.regions
        ]
        regions += [
            f"  region = {{ name={name} size={size} {place} constant=true }}"
            for name, size in self.constants
        ]
        regions.append(
            "  region = { name=hmem size=640 alignment=128 instance=0 type=system place=host "
            "unified=false }"
        )
        names = [" ".join(f'"{name}"' for name in names) for names in (self.inputs, self.outputs)]
        sms = "".join(f"sm{sm} " for sm in self.sms)
        lines = [
            "header {",
            f"  version = {self.layout}",
            f"  n_streams = {self.streams}",
            "  n_events = 1",
            "  memory_budget = 68719476736",
            *regions,
            f"  inputs={{ {names[0]} }}",
            f"  outputs={{ {names[1]} }}",
            '  shape_inputs={ "rows_shapeInput.1" }',
            f"  stream_capturable={self.capturable}",
            f"  accelerators={{{sms}}}",
            "}",
        ]
        return "\n".join(lines) + "\n"

    def _descriptors(self) -> str:
        sizes = [Described(name, [1], "int64", "hmem") for name in ("rows.1", "rows_value", "c2")]
        return (
            "\n".join(["descriptors {", *(t.line() for t in (*sizes, *self.tensors)), "}"]) + "\n"
        )

    def _main(self) -> str:
        call = '  shape_call={ name="call" stream=0  layers="" subg_id=0 }'
        return (
            "\n".join(
                ["main {", " label bb1: ", call, *(launch.line() for launch in self.launches), "}"]
            )
            + "\n"
        )

    def _shapes(self) -> str:
        bound = f"rows_value: shape input value at index 0 is out of bounds [1, {self.rows}]; "
        lines = [
            "shape_main {",
            " label bb2: ",
            '  copy={ name="in" output={"rows_value" } input={"rows_shapeInput.1" }  stream=0  speculate={ }}',
            '  memset={ name="init" output={"c2" }  src="2i64" stream=0 }',
            *self.host,
            f'  assert={{ name=check input={{"rows_value" }} stream=0 msg="{bound}" }}',
            '  assert={ name=other input={"c2" } stream=0 msg="\nError during shape inference of',
            'v1 : bf16[rows] = slice(v0), name=layers.0.moe/Split\nError is:; " }',
            '  copy={ name="out" output={"rows.1" } input={"rows_value" }  stream=0  speculate={ }}',
            "}",
        ]
        return "\n".join(lines) + "\n"


def program(**changes: object) -> Written:
    """One product of a data input and a weight input, and a kernel after it."""
    made: dict[str, object] = {
        "inputs": ["tokens.1", "tower.layers.0.mixer.up.weight.1", "rows_shapeInput.1"],
        "tensors": [
            Described("tokens.1", ["rows.1", 64]),
            Described("tower.layers.0.mixer.up.weight.1", [32, 64]),
            Described("up^deref", [64, 32], base="tower.layers.0.mixer.up.weight.1"),
            Described("h", ["rows.1", 32], region="scratch_0"),
            Described("y.1", ["rows.1", 32]),
        ],
        "launches": [
            Launch(
                "MatMul",
                ["tokens.1", "up^deref"],
                ["h"],
                ["layers.0.moe/MatMul"],
                "fully_connected",
            ),
            Launch("__myl_Mul", ["h", "rows.1"], ["y.1"], ["layers.0.moe/Mul"]),
        ],
    }
    return Written(**{**made, **changes})  # type: ignore[arg-type]


def plan_of(*texts: str) -> bytes:
    """Plan bytes with these programs, code and weights around them."""
    out = bytearray(b"ptrt" + bytes(300))
    for text in texts:
        code = b"\x7fELF" + bytes(range(256)) + b"header {\n  version = 4\n}\n"
        block = b"NLYM\xa1\xda\x1e\x00" + len(text).to_bytes(8, "little") + text.encode() + code
        out += len(block).to_bytes(8, "little") + block + b"\xb0\x00header"
    return bytes(out)
