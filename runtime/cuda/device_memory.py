"""Device memory of a session: state where engines run, and small arrays that travel in slabs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import prod

import numpy as np

from twotower.dtypes import carried_dtype
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.device import Array, Span, no_memory
from twotower.spec import TensorSpec
from twotower.units import format_bytes

_ALIGNED = 256  # bytes; what cudaMalloc itself keeps, and TensorRT asks of an address


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """One allocation for several small arrays, pinned on the host and on each device."""

    host: int
    addresses: dict[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBuffer:
    """A tensor's place.

    Attributes:
        addresses: Its address on each device that needs it. The first is where it is written; the
            others are copies.
        token: The allocation it belongs to.
        offset: Bytes from the beginning of the slab.
    """

    shape: tuple[int, ...]
    dtype: str
    addresses: dict[int, int]
    token: int
    slab: Slab | None = None
    offset: int = 0
    array: Array | None = None

    @property
    def home(self) -> int:
        """The device it is written on."""
        return next(iter(self.addresses))

    @property
    def itemsize(self) -> int:
        return carried_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize

    def rows(self, span: Span) -> tuple[int, int, int, int]:
        """A span as rows of bytes: offset of the first, pitch, number of rows, bytes of each."""
        inner = prod(self.shape[span.axis + 1 :]) * self.itemsize
        rows = prod(self.shape[: span.axis])
        return (
            span.start * inner,
            self.shape[span.axis] * inner,
            rows,
            (span.stop - span.start) * inner,
        )


@dataclass(slots=True)
class DeviceMemory:
    """The memory of one session on one or several devices.

    Args:
        devices: The devices, the first for whatever no engine claims.
        places: Devices each tensor is needed on, by its name as an input of the graphs; the one
            that writes it first.

    Clearing and copying between runs go through a stream of their own on each device and are waited
    for.
    """

    cuda: Cuda
    devices: tuple[int, ...]
    places: Mapping[str, tuple[int, ...]]
    _streams: dict[int, int] = field(default_factory=dict)
    _owned: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    _tokens: Iterator[int] = field(default_factory=count)

    def state(self, spec: TensorSpec, sizes: Mapping[str, int]) -> DeviceBuffer:
        size = prod(spec.shape(sizes)) * carried_dtype(spec.dtype).itemsize
        addresses, freed = self._allocated(
            size,
            self._devices_of(spec),
            (spec, sizes),
        )
        buffer = DeviceBuffer(
            spec.shape(sizes),
            spec.dtype,
            addresses,
            self._owner(freed),
        )
        self.clear(buffer)
        return buffer

    def small(
        self, specs: Sequence[TensorSpec], sizes: Mapping[str, int]
    ) -> dict[str, DeviceBuffer]:
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += (
                -(-prod(spec.shape(sizes)) * carried_dtype(spec.dtype).itemsize // _ALIGNED)
                * _ALIGNED
            )
        devices = tuple(dict.fromkeys(d for spec in specs for d in self._devices_of(spec)))
        addresses, freed = self._allocated(
            end,
            devices,
            (specs[0], sizes),
        )
        token = self._owner(
            freed
        )  # before more is asked for: whatever fails from here on, closing frees it
        host = self.cuda.allocate_pinned(end)
        freed.append(lambda: self.cuda.free_pinned(host))
        whole = np.frombuffer(self.cuda.bytes_at(host, end), np.uint8)
        whole.fill(0)
        slab = Slab(host, addresses)
        out = {}
        for spec, offset in zip(specs, offsets, strict=True):
            shape, dtype = spec.shape(sizes), carried_dtype(spec.dtype)
            array = whole[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            where = {device: addresses[device] + offset for device in self._devices_of(spec)}
            out[spec.name] = DeviceBuffer(shape, spec.dtype, where, token, slab, offset, array)
        self._cleared(addresses, end)
        return out

    def host(self, buffer: DeviceBuffer) -> Array:
        assert buffer.array is not None, "the host never looks at a state"
        return buffer.array

    def view(self, buffer: DeviceBuffer, shape: tuple[int, ...]) -> DeviceBuffer:
        array = (
            None if buffer.array is None else buffer.array.reshape(-1)[: prod(shape)].reshape(shape)
        )
        return replace(buffer, shape=shape, array=array)

    def clear(self, buffer: DeviceBuffer, span: Span | None = None) -> None:
        if span is None:
            self._cleared(buffer.addresses, buffer.nbytes)
            return
        start, pitch, rows, width = buffer.rows(span)
        if width:
            for device, address in buffer.addresses.items():
                self.cuda.clear_rows(
                    (address + start, pitch), (rows, width), stream=self.stream(device)
                )
                self.cuda.synchronize(self.stream(device))

    def copy(self, source: DeviceBuffer, target: DeviceBuffer, span: Span) -> None:
        start, pitch, rows, width = source.rows(span)
        there, wider, _, _ = target.rows(span)
        if width:
            for device, address in source.addresses.items():
                to = (target.addresses[device] + there, wider)
                self.cuda.copy_rows(
                    to, (address + start, pitch), (rows, width), stream=self.stream(device)
                )
                self.cuda.synchronize(self.stream(device))

    def release(self, buffers: Sequence[DeviceBuffer]) -> None:
        close_all(free for buffer in buffers for free in self._owned.pop(buffer.token, ()))

    def close(self) -> None:
        frees = [free for some in self._owned.values() for free in some]
        streams = [partial(self.cuda.destroy_stream, stream) for stream in self._streams.values()]
        self._owned.clear()
        self._streams.clear()
        close_all([*frees, *streams])

    def scratch(self, size: int, device: int) -> int:
        """Address of memory held until the session closes; MemoryError if there is none."""
        self.cuda.use(device)
        address = self.cuda.allocate(max(size, _ALIGNED))
        self._owner([partial(self.cuda.free, address)])
        return address

    def _owner(self, freed: list[Callable[[], None]]) -> int:
        """Notes what frees an allocation; returns its token."""
        token = next(self._tokens)
        self._owned[token] = freed
        return token

    def _devices_of(self, spec: TensorSpec) -> tuple[int, ...]:
        return self.places.get(spec.name) or self.devices[:1]

    def _allocated(
        self, size: int, devices: Sequence[int], what: tuple[TensorSpec, Mapping[str, int]]
    ) -> tuple[dict[int, int], list[Callable[[], None]]]:
        """Addresses on devices, and what frees them; all or nothing."""
        addresses: dict[int, int] = {}
        with Cleanup() as undo:
            for device in devices:
                self.cuda.use(device)
                try:
                    addresses[device] = self.cuda.allocate(max(size, _ALIGNED))
                except MemoryError as e:
                    free, total = self.cuda.free_memory()
                    known = f"{format_bytes(free)} of {format_bytes(total)} free on device {device}"
                    raise no_memory(*what, free=known) from e
                undo.callback(partial(self.cuda.free, addresses[device]))
            undo.pop_all()
        return addresses, [partial(self.cuda.free, address) for address in addresses.values()]

    def _cleared(self, addresses: Mapping[int, int], size: int) -> None:
        for device, address in addresses.items():
            self.cuda.clear(address, size, stream=self.stream(device))
            self.cuda.synchronize(self.stream(device))

    def stream(self, device: int) -> int:
        """The stream of a device for what happens between runs."""
        self.cuda.use(device)
        if device not in self._streams:
            self._streams[device] = self.cuda.create_stream()
        return self._streams[device]
