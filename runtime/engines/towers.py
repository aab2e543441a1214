"""An opened bundle's engines with their memory and streams, and the options of opening them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from twotower.bundle import EngineLimits, Progress
from twotower.config import ModelConfig
from twotower.hardware import Gpu
from twotower.runtime.cleanup import close_all
from twotower.runtime.device import HostMemory, Memory, Streams
from twotower.runtime.engines.tower_engine import TowerEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """Options of opening engines.

    Attributes:
        threads: Threads a CPU engine computes with; 0 for one a core that this process may use, or
            one for a small model.
        any_sm: `TWOTOWER_RTX_ANY_SM`: engines are opened on GPUs they hold no code for.
        progress: Called with (bytes hashed, bytes to hash) while engine files are checked.
        loading: Called with (bytes loaded, bytes to load) while weights go to a device.
    """

    threads: int = 0
    devices: tuple[int, ...] = ()
    graphs: bool = True
    gpus: tuple[Gpu, ...] = ()
    any_sm: str = ""
    progress: Progress | None = None
    loading: Progress | None = None


@dataclass(frozen=True, slots=True)
class Towers:
    """The three engines of one opened bundle.

    Attributes:
        dtype: Element type of keys, values, convolution state and hidden vectors in their buffers.
        limits: What was fixed when they were built; None for engines of any number of rows and any
            length.
        chunk_widths: Widths of a prompt's chunks they are bound for, ascending; empty for any
            width. Every width costs a binding.
        row_counts: Numbers of rows they are bound for, ascending; empty for any number. A batch is
            padded to the next of them.
        fixed_block: The only block size the denoiser computes; None for any.
        compiles: Kernels are compiled when a shape first runs, so that engines are warmed up.
        keep: Saves what was compiled for the next opening; None where nothing is.
        owned: What else is closed with them, after everything that uses it: the weights on a
            device.
    """

    config: ModelConfig
    dtype: str
    context: TowerEngine
    context_head: TowerEngine
    denoiser: TowerEngine
    memory: Memory = field(default_factory=HostMemory)
    streams: Streams = field(default_factory=Streams)
    limits: EngineLimits | None = None
    chunk_widths: tuple[int, ...] = ()
    row_counts: tuple[int, ...] = ()
    fixed_block: int | None = None
    compiles: bool = False
    keep: Callable[[], None] | None = None
    owned: tuple[Callable[[], None], ...] = ()

    def close(self) -> None:
        """Closes every engine, then streams and memory, also when one of them fails to."""
        engines = (self.context, self.context_head, self.denoiser)
        close_all(
            (
                *(engine.close for engine in engines),
                self.streams.close,
                self.memory.close,
                *self.owned,
            )
        )
