"""A bundle's weights in the memory of devices, shared by every engine that names them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

from twotower.bundle import FileRecord, Progress
from twotower.errors import EngineMismatchError
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.weights.data_file import DataFile
from twotower.runtime.weights.device_layout import ALIGNMENT, Layout, copies, cut_chunks, lay_out
from twotower.runtime.weights.transfer import DeviceCopy, Ring, Step, open_transfer
from twotower.units import format_bytes
from twotower.weights.refs import WeightRef

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Weights that a device needs.

    Attributes:
        record: Its size and SHA-256, as the bundle has them.
        weights: Those that are needed, by name, as `Bundle.weights` has them. What is there
            already, or is asked for by several engines, is read once.
    """

    file: Path
    record: FileRecord
    weights: Mapping[str, WeightRef]
    device: int


@dataclass(slots=True)
class _File:
    """What is to be read of one file, for each device."""

    record: FileRecord
    wanted: dict[int, dict[str, WeightRef]] = field(default_factory=dict)
    layouts: dict[int, Layout] = field(default_factory=dict)
    bases: dict[int, int] = field(default_factory=dict)


class WeightStore:
    """The weights of one opened bundle; addresses hold until it is closed."""

    def __init__(self, cuda: Cuda, ring: Ring | None = None) -> None:
        self._cuda = cuda
        self._ring = ring or Ring()
        self._addresses: dict[tuple[Path, str, int], int] = {}
        self._blocks: list[int] = []

    def load(
        self,
        requests: Sequence[LoadRequest],
        *,
        hashed: bool = False,
        progress: Progress | None = None,
    ) -> int:
        """Brings weights to devices; all of them, or none and nothing is left of it.

        Args:
            requests: What goes where.
            hashed: Whether each file is read as a whole and its SHA-256 compared on the way;
                several files are read in turns then, and hashed at the same time.
            progress: Called with (bytes arrived, bytes to read).

        Returns:
            Bytes read from files.

        Raises:
            BundleError: a file is missing, unreadable, of another size or content, or shorter than
                its weights.
            EngineMismatchError: a device has not so much memory.
            DeviceError: a copy failed.
        """
        files = self._missing(requests)
        if not files:
            return 0
        begun = time.perf_counter()
        blocks: list[int] = []
        with Cleanup(lambda: self._free(blocks)) as undo:
            with Cleanup() as opened:
                total = self._load(files, blocks, opened, hashed=hashed, progress=progress)
            undo.pop_all()
        self._blocks += blocks
        for path, file in files.items():
            for device, layout in file.layouts.items():
                for name, offset in layout.offsets.items():
                    self._addresses[path, name, device] = file.bases[device] + offset
        seconds = time.perf_counter() - begun
        rate = format_bytes(total / seconds)
        logger.info("weights: %s in %.1f s, %s/s", format_bytes(total), seconds, rate)
        return total

    def address(self, file: Path, name: str, device: int) -> int:
        """A weight's address, a multiple of `ALIGNMENT`; KeyError if it is not loaded there."""
        return self._addresses[file, name, device]

    def close(self) -> None:
        """Frees all it can; idempotent. No engine may use it; DeviceError is raised last."""
        blocks, self._blocks = self._blocks, []
        self._addresses.clear()
        self._free(blocks)

    def _missing(self, requests: Sequence[LoadRequest]) -> dict[Path, _File]:
        """What is not there yet, by file and device."""
        files: dict[Path, _File] = {}
        for request in requests:
            for name, weight in request.weights.items():
                if (request.file, name, request.device) in self._addresses:
                    continue
                file = files.setdefault(request.file, _File(request.record))
                if file.wanted.setdefault(request.device, {}).setdefault(name, weight) != weight:
                    raise ValueError(f"two weights of {request.file} are called {name}")
        return files

    def _load(
        self,
        files: Mapping[Path, _File],
        blocks: list[int],
        opened: Cleanup,
        *,
        hashed: bool,
        progress: Progress | None,
    ) -> int:
        for file in files.values():
            file.layouts = {device: lay_out(some) for device, some in file.wanted.items()}
        data = {path: _opened(path, file, opened) for path, file in files.items()}
        self._allocate(files, blocks)
        by_file = [
            _steps(data[path], file, most=self._ring.slot_bytes, whole=hashed)
            for path, file in files.items()
        ]
        # In turns, so that each file's hashing thread has work; otherwise a file after another.
        steps = list(_in_turns(by_file) if hashed else chain.from_iterable(by_file))
        total, done = sum(step.chunk.stop - step.chunk.start for step in steps), 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if progress:
                progress(done, total)

        devices = dict.fromkeys(device for file in files.values() for device in file.wanted)
        read = data.values() if hashed else ()
        with open_transfer(
            self._cuda,
            tuple(devices),
            self._ring,
            hashed=read,
        ) as transfer:
            transfer.run(iter(steps), tick=tick)
        for file_read in data.values():
            file_read.require_unchanged()
            if hashed:
                file_read.require_content()
        return total

    def _allocate(self, files: Mapping[Path, _File], blocks: list[int]) -> None:
        """One allocation for each file and device; refused at once if there is no room for all."""
        needed: dict[int, dict[Path, int]] = {}
        for path, file in files.items():
            for device, layout in file.layouts.items():
                needed.setdefault(device, {})[path] = max(layout.size, ALIGNMENT)
        for device, sizes in needed.items():
            self._cuda.use(device)
            if sum(sizes.values()) > self._cuda.free_memory()[0]:
                raise self._no_room(device, sizes)
        for device, sizes in needed.items():
            self._cuda.use(device)
            for path, size in sizes.items():
                try:
                    address = self._cuda.allocate(size)
                except MemoryError as e:
                    raise self._no_room(device, sizes) from e
                blocks.append(address)
                files[path].bases[device] = address

    def _no_room(self, device: int, sizes: Mapping[Path, int]) -> EngineMismatchError:
        self._cuda.use(device)
        free, total = self._cuda.free_memory()
        names = {path: f"{path.parent.name}/{path.name}" for path in sizes}
        listed = ", ".join(f"{names[path]} {format_bytes(size)}" for path, size in sizes.items())
        needed = f"{format_bytes(sum(sizes.values()))} needed ({listed})"
        return EngineMismatchError(
            f"the weights do not fit on GPU {device}",
            found=f"{needed}, {format_bytes(free)} of {format_bytes(total)} free",
            do="spread the towers with --devices 0,1, quantize the bundle, or end other programs; "
            "`twotower plan BUNDLE` lists what would fit",
        )

    def _free(self, blocks: Sequence[int]) -> None:
        close_all(partial(self._cuda.free, address) for address in blocks)


def _opened(path: Path, file: _File, opened: Cleanup) -> DataFile:
    data = DataFile(path, file.record)
    opened.callback(data.close)
    for weights in file.wanted.values():
        data.require_within(weights)
    return data


def _in_turns(by_file: Iterable[Iterator[Step]]) -> Iterator[Step]:
    """A chunk of each file, then the next one of each that has more."""
    for some in zip_longest(*by_file):
        yield from (step for step in some if step is not None)


def _steps(
    data: DataFile,
    file: _File,
    *,
    most: int,
    whole: bool,
) -> Iterator[Step]:
    chunks = cut_chunks(
        file.layouts.values(),
        size=file.record.size,
        most=most,
        whole=whole,
    )
    by_device = [(device, copies(chunks, layout)) for device, layout in file.layouts.items()]
    for number, chunk in enumerate(chunks):
        parts = [
            DeviceCopy(
                device,
                file.bases[device] + copy.target,
                copy.source,
                copy.size,
            )
            for device, some in by_device
            for copy in some[number]
        ]
        yield Step(data, chunk, tuple(parts))
