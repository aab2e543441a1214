"""Expert kernels without a GPU: files that name a kernel, and a driver that runs its NumPy twin."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from twotower.dtypes import carried_dtype
from twotower.kernels.cubin_manifest import MANIFEST, Cubin, Manifest
from twotower.kernels.shape import MOST_TOKENS, ExpertShape
from twotower.kernels.signatures import KernelSpec, kernel_specs, slot_tokens
from twotower.kernels.twin import combine_twin, down_twin, pairs_twin, up_twin

__all__ = ["FakeKernels", "write_kernels"]

_C_TYPES = {"i32": ctypes.c_int32}
_POINTED = {
    "*bf16": np.uint16,
    "*fp16": np.float16,
    "*fp32": np.float32,
    "*i32": np.int32,
    "*i8": np.int8,
    "*u8": np.uint8,
}


def write_kernels(folder: Path, shape: ExpertShape, sms: Sequence[int] = (90,)) -> Manifest:
    """A folder of kernels as `compile_kernels` leaves it; a file holds kernel name and shape."""
    folder.mkdir(parents=True)
    cubins = []
    for sm in sms:
        for spec in kernel_specs(shape, sm):
            text = json.dumps({"kernel": spec.name, "sm": sm, "shape": shape.to_json()}).encode()
            file = f"{spec.name}.sm{sm}.cubin"
            (folder / file).write_bytes(text)
            digest = hashlib.sha256(text).hexdigest()
            sizes = {"shared": 64 << 10, "registers": 128, "stack": 0, "nulls": 2}
            about = (spec.name, sm, file, spec.function, digest, spec.arguments)
            cubins.append(Cubin(*about, threads=32 * spec.warps, **sizes))
    manifest = Manifest(folder, shape, "3.9.0", True, MOST_TOKENS, tuple(cubins))
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    return manifest


class FakeKernels:
    """The driver's functions for kernels; `FakeCuda` is one too.

    Attributes:
        launched: Kernels by name, in the order in which they were put on streams.
        loaded: Libraries that are loaded.
    """

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )

    def __init__(self, *, sm: int = 90) -> None:
        self.sm = sm
        self.launched: list[str] = []
        self.loaded: dict[int, dict[str, Any]] = {}
        self._allowed: dict[int, int] = {}

    def enqueue(self, stream: int, op: Callable[[], None]) -> None:
        raise NotImplementedError

    def device_of(self, address: int, size: int = 1) -> int | None:
        raise NotImplementedError

    def cudaDeviceGetAttribute(self, name: int, device: int) -> tuple[int, int]:
        return 0, self.sm // 10 if name == 75 else self.sm % 10

    def cuLibraryLoadData(self, address: int, *options: Any) -> tuple[int, int]:
        try:
            text = json.loads(ctypes.string_at(address))
        except ValueError:
            return 200, 0  # CUDA_ERROR_INVALID_IMAGE
        if text["sm"] != self.sm:
            return 209, 0  # CUDA_ERROR_NO_BINARY_FOR_GPU
        number = 5000 + len(self.loaded)
        self.loaded[number] = text
        return 0, number

    def cuLibraryUnload(self, library: int) -> tuple[int]:
        del self.loaded[library]
        return (0,)

    def cuLibraryGetKernel(self, library: int, entry: bytes) -> tuple[int, int]:
        assert _spec(self.loaded[library])[1].function == entry.decode()
        return 0, library

    def cuKernelGetFunction(self, kernel: int) -> tuple[int, int]:
        return 0, kernel

    def cuFuncSetAttribute(self, function: int, name: int, value: int) -> tuple[int]:
        assert name == 8
        self._allowed[function] = value
        return (0,)

    def cuLaunchKernel(self, function: int, *args: Any) -> tuple[int]:
        gx, gy, gz, threads, ty, tz, shared, stream, table, extra = args
        shape, spec = _spec(self.loaded[function])
        assert (gz, ty, tz, extra) == (1, 1, 1, 0)
        assert threads == 32 * spec.warps
        assert shared <= self._allowed.get(function, 48 << 10), (
            "more shared memory than was asked for"
        )
        values = _values(spec, table)
        self.launched.append(spec.name)
        self.enqueue(stream, lambda: _Run(self, shape, spec, (gx, gy), values).run())
        return (0,)


def _spec(text: dict[str, Any]) -> tuple[ExpertShape, KernelSpec]:
    shape = ExpertShape.from_json(text["shape"])
    specs = {spec.name: spec for spec in kernel_specs(shape, text["sm"])}
    return shape, specs[text["kernel"]]


def _values(spec: KernelSpec, table: int) -> dict[str, int]:
    """The parameters as the driver reads them at a launch."""
    pointers = (ctypes.c_void_p * (len(spec.arguments) + 2)).from_address(table)
    out = {}
    for (name, kind), pointer in zip(spec.arguments, pointers[: len(spec.arguments)], strict=True):
        assert pointer is not None
        out[name] = int(_C_TYPES.get(kind, ctypes.c_uint64).from_address(pointer).value)
    nulls = [ctypes.c_uint64.from_address(p or 0).value for p in pointers[len(spec.arguments) :]]
    assert nulls == [0, 0], "Triton's own two pointers"
    return out


class _Run:
    """One launch over host memory, with its grid checked against what it has to cover."""

    def __init__(
        self,
        cuda: FakeKernels,
        shape: ExpertShape,
        spec: KernelSpec,
        grid: tuple[int, int],
        values: dict[str, int],
    ) -> None:
        self.cuda, self.shape, self.spec, self.grid, self.values = cuda, shape, spec, grid, values
        self.count = values["N"]
        self.kinds = dict(spec.arguments)

    def run(self) -> None:
        with np.errstate(all="ignore"):
            getattr(self, f"_{self.spec.function}")()

    def array(self, name: str, *shape: int) -> np.ndarray:
        dtype = np.dtype(_POINTED[self.kinds[name]])
        size = math.prod(shape) * dtype.itemsize
        address = self.values[name]
        assert address % 16 == 0, f"{name} is not aligned as the kernels were compiled for"
        self.cuda.device_of(address, size)
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)

    def weights(self, which: str) -> dict[str, np.ndarray]:
        out = {}
        for matrix in (which, f"shared_{which}"):
            how = self.shape.weights.of(matrix)
            if matrix.startswith("shared") and not self.shape.shared_intermediate:
                continue
            *rows, columns = self.shape.stored_shape(matrix)
            out[matrix] = self.array(
                matrix, *rows, columns // 2 if how is not None and how.bits == 4 else columns
            )
            if how is not None:
                out[f"{matrix}_scale"] = self.array(f"{matrix}_scale", *rows, how.groups(columns))
                if how.scale_dtype == "float8e4m3fn":
                    out[f"{matrix}_global_scale"] = self.array(f"{matrix}_global_scale", 1)
        return out

    def experts(self) -> np.ndarray:
        """The expert of each slot, from `order` and `blocks`."""
        experts = np.full(self.count * self.shape.top, -1, np.int32)
        order = self.array("order", len(experts))
        for expert, first, end in self.array("blocks", 3, self.values["BLOCKS"]).T:
            assert expert < 0 or end - first > 0
            rows = self.spec.constants["BM"]
            if expert >= 0:
                experts[order[first : min(end, first + rows)]] = expert
        return experts.reshape(self.count, self.shape.top)

    def write_lists(self, experts: np.ndarray) -> None:
        last = np.where(experts < 0, self.shape.experts, experts).reshape(-1)
        self.array("order", experts.size)[:] = np.argsort(last, kind="stable")
        blocks = self.array("blocks", 3, self.values["BLOCKS"])
        blocks[0] = -1
        at = start = 0
        for expert in range(self.shape.experts):
            own = int((experts == expert).sum())
            for first in range(0, own, self.spec.constants["BM"]):
                blocks[:, at] = expert, start + first, start + own
                at += 1
            start += own

    def _pairs_few(self) -> None:
        assert self.grid == (self.shape.experts, 1)
        shares = self.array("shares", self.shape.experts, self.count)
        experts, share_of = pairs_twin(self.shape, shares)
        self.array("share_of", *share_of.shape)[:] = share_of
        self.write_lists(experts)

    def _pairs_slots(self) -> None:
        own = slot_tokens(self.shape)
        assert self.grid == (-(-self.count // own), 1)
        e = self.shape.experts
        experts, share_of = pairs_twin(self.shape, self.array("shares", e, self.count))
        slots = self.array("slots", e, self.count)
        slots[:] = -1
        for token, slot in np.argwhere(experts >= 0):
            slots[experts[token, slot], token] = slot
        for program, counts in enumerate(self.array("counts", self.grid[0], e)):
            counts[:] = (slots[:, program * own : (program + 1) * own] >= 0).sum(1)
        self.array("share_of", *share_of.shape)[:] = share_of

    def _pairs_order(self) -> None:
        assert self.grid == (self.shape.experts, 1)
        slots = self.array("slots", self.shape.experts, self.count)
        counts = self.array("counts", self.values["PROGRAMS"], self.shape.experts)
        assert (counts.sum(0) == (slots >= 0).sum(1)).all()
        experts = np.full((self.count, self.shape.top), -1, np.int32)
        for expert, token in np.argwhere(slots >= 0):
            experts[token, slots[expert, token]] = expert
        self.write_lists(experts)

    def hidden(self) -> tuple[np.ndarray, np.ndarray]:
        """`h` cut into the rows of pairs and those of the shared experts."""
        s, pairs = self.shape, self.count * self.shape.top
        whole = self.array("h", pairs * s.width + self.count * s.shared_intermediate)
        routed, shared = np.split(whole, [pairs * s.width])
        return routed.reshape(pairs, s.width), shared.reshape(-1, s.shared_width)

    def check_grid(self, columns: int) -> None:
        rows = -(-self.count // self.spec.constants["BM"])
        blocks = self.values["BLOCKS"] + self.shape.shared * rows
        assert self.grid == (-(-columns // self.spec.constants["BN"]), blocks)

    def _up(self) -> None:
        self.check_grid(self.shape.width)
        x = self.array("x", self.count, self.shape.hidden)
        assert x.dtype == carried_dtype(self.shape.dtype)
        h, shared = up_twin(self.shape, x, self.experts(), self.weights("up"))
        for own, made in zip(self.hidden(), (h, shared), strict=True):
            own[:] = made

    def _down(self) -> None:
        self.check_grid(self.shape.hidden)
        share_of = self.array("share_of", self.count, self.shape.top)
        routing = (self.experts(), share_of)
        made = down_twin(self.shape, self.hidden(), routing, self.weights("down"))
        used = np.concatenate([share_of.reshape(-1) != 0, np.ones(len(made) - share_of.size, bool)])
        # A row of a slot that is not used keeps what was there.
        self.array("y", *made.shape)[used] = made[used]

    def _combine(self) -> None:
        share_of = self.array("share_of", self.count, self.shape.top)
        y = self.array("y", self.count * self.shape.slots, self.shape.hidden)
        self.array("out", self.count, self.shape.hidden)[:] = combine_twin(self.shape, y, share_of)
