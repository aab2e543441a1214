"""An opened model: engines and buffers under one owner, with `generate` and `stream` on top."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from twotower.bundle import Bundle, Progress, built_targets
from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import ConfigError, DeviceError, RequestError
from twotower.hardware import TARGETS, probe_machine, select_target
from twotower.runtime.auto import AutoMode, PassRecord, PassTimes
from twotower.runtime.cleanup import Cleanup, SessionLock, close_all
from twotower.runtime.engines import STREAMED, OpenOptions, open_towers, require_opener
from twotower.runtime.engines.towers import Towers
from twotower.runtime.loop import BlockLoop
from twotower.runtime.pass_times import (
    measure_pass_times,
    measured_on,
    read_pass_record,
    run_every_pass,
)
from twotower.runtime.requests import (
    Limits,
    Prompt,
    Request,
    as_requests,
    batches,
    row_from_request,
)
from twotower.runtime.results import BlockEvent, Generation, Hooks, StepRecord
from twotower.runtime.rows import Row
from twotower.runtime.schedule import capacity_limit, prefill_plan, row_counts
from twotower.runtime.scoring import Score, scoring_rows
from twotower.runtime.tokenizer import Tokenizer
from twotower.runtime.workspace import Workspaces
from twotower.spec import MAX_CHUNK

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item", bound="str | Request | Sequence[int]")
_Text = TypeVar("_Text", bound=Prompt)


class TwoTower:
    """A model ready to generate: `TwoTower.open(bundle)`, best in a `with` statement.

    Calls from several threads are safe. `generate` calls wait for one another; open streams take
    turns block by block, each with buffers of its own, so a slow reader of one never holds up the
    others. A call that fails or is cancelled leaves the session usable. An iterator can be let go
    of anywhere, also in another thread: its memory is freed when no pass is at work.
    """

    def __init__(self, towers: Towers, limits: Limits, defaults: GenerationConfig) -> None:
        self._towers = towers
        self._limits = limits
        self._defaults = defaults
        largest = capacity_limit(limits.max_context, limits.max_chunk)
        self._workspaces = Workspaces(towers, largest)
        self._auto = AutoMode(self._measured)
        self._lock = SessionLock()
        self._iterators: set[Generator[BlockEvent, None, None]] = set()
        self._closed = False
        self._failed = False  # a call has ended with an error of the GPU, which closing will repeat
        self._target = ""

    @classmethod
    def open(
        cls,
        path: str | Path,
        target: str | None = None,
        *,
        max_batch: int = 8,
        max_context: int | None = None,
        threads: int = 0,
        devices: Sequence[int] = (),
        graphs: bool = True,
        preset: str | None = None,
        progress: Progress | None = None,
        loading: Progress | None = None,
        warm_up: Sequence[int] | None = None,
    ) -> Self:
        """Opens a bundle.

        Args:
            path: The bundle's folder.
            target: The engines to run, e.g. `ort-cpu`; None for the best that fit this machine.
            max_batch: Most requests generated together, where the engines allow as many; longer
                lists are run in turns.
            max_context: Longest text, prompt and answer; None for the limit of model and engines.
            threads: Of a CPU engine; 0 for one a core, or one for a small model.
            devices: GPUs by number: one for both towers, or two, the first for the context tower;
                segments are spread over all. Empty for the first GPU.
            graphs: Whether passes are captured as CUDA graphs and replayed, where a target can.
            preset: Of the bundle, for calls without options, e.g. `fast`; None for its default.
            progress: Called with (bytes checked, bytes to check).
            loading: Called with (bytes loaded, bytes to load) while weights go to a device;
                `progress` where it is None.
            warm_up: Numbers of rows that are made ready to serve; see `warm_up`. None for 1 and
                `max_batch` where a library compiles kernels when they first run.

        Raises:
            BundleError: the folder is not a sound bundle.
            EngineMismatchError: no engine of it fits this machine.
            ConfigError: an option is out of range.
        """
        bundle = Bundle.open(path, contents=False)
        bundle.require_weights("generating")
        if preset is not None and preset not in bundle.presets:
            raise ConfigError(
                f"the bundle has no preset {preset!r}",
                found=f"presets: {', '.join(bundle.presets) or 'none'}",
                do="choose one of them, or make some with `twotower tune`",
            )
        tokenizer = Tokenizer.from_file(bundle.tokenizer_file) if bundle.tokenizer_file else None
        if target is not None and target in TARGETS:
            require_opener(target)
        machine = probe_machine()
        chosen = select_target(machine, built_targets(bundle.path), wanted=target)
        # Weights that go to a device are hashed on their way there: they are read once.
        bundle.check(weights=chosen not in STREAMED, progress=progress)
        _check_option("max_batch", max_batch)
        _check_option("max_context", max_context, bundle.config.max_position_embeddings)
        options = OpenOptions(
            threads=threads,
            devices=tuple(devices),
            graphs=graphs,
            progress=progress,
            loading=loading or progress,
        )
        towers = open_towers(bundle, chosen, options)
        with Cleanup(towers.close) as undo:
            session = cls.from_towers(
                towers,
                tokenizer=tokenizer,
                trained_block_size=bundle.trained_block_size,
                defaults=bundle.presets[preset] if preset else bundle.defaults,
                max_batch=max_batch,
                max_context=max_context,
            )
            usual = (session._limits.max_batch, 1) if towers.compiles else ()
            session.warm_up(usual if warm_up is None else warm_up, optional=warm_up is None)
            undo.pop_all()
        session._target = chosen
        here = measured_on(bundle, chosen, machine, options)
        session._auto.start_from(read_pass_record(bundle.path, here) or PassRecord(here))
        return session

    @classmethod
    def from_towers(
        cls,
        towers: Towers,
        *,
        tokenizer: Tokenizer | None = None,
        trained_block_size: int = 16,
        defaults: GenerationConfig | None = None,
        max_batch: int = 8,
        max_context: int | None = None,
        max_chunk: int = MAX_CHUNK,
    ) -> Self:
        """A session on engines that are already open; it owns and closes them.

        Args:
            towers: The engines.
            tokenizer: None to work on token ids only.
            trained_block_size: Largest block size that needs no override.
            defaults: Options of calls that bring none.
            max_batch: Most requests generated together.
            max_context: Longest text, prompt and answer; None for the limit of the model and the
                engines.
            max_chunk: Most prompt tokens read in one pass.
        """
        longest = towers.config.max_position_embeddings
        if towers.limits is not None:
            longest = min(longest, towers.limits.capacity - MAX_CHUNK)
            max_batch = min(max_batch, towers.limits.max_batch)
        _check_option("max_batch", max_batch)
        _check_option("max_context", max_context, longest)
        _check_option("max_chunk", max_chunk, MAX_CHUNK)
        limits = Limits(
            towers.config,
            tokenizer,
            trained_block_size,
            max_context=max_context or longest,
            max_batch=max_batch,
            max_chunk=max_chunk,
            fixed_block=towers.fixed_block,
        )
        return cls(towers, limits, defaults or GenerationConfig())

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self._limits.model

    @property
    def target(self) -> str:
        """What the engines were built for, e.g. `ort-cpu`; empty for engines handed over open."""
        return self._target

    @property
    def max_context(self) -> int:
        """Longest text, prompt and answer together."""
        return self._limits.max_context

    @property
    def defaults(self) -> GenerationConfig:
        """Options of calls that bring none."""
        return self._defaults

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer, if it has one."""
        return self._limits.tokenizer

    @overload
    def generate(
        self,
        prompts: str | Request | Sequence[int],
        config: GenerationConfig | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: list[_Item],
        config: GenerationConfig | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: Any,
        config: GenerationConfig | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generation | list[Generation]:
        """Generates the continuation of one prompt, or of each of a list.

        Args:
            prompts: Text, token ids, a `Request`, or a list of these; an empty prompt is the
                beginning of a text.
            config: Options of the requests that have none of their own; None for the bundle's
                defaults.
            on_prefill: Called with (tokens read, tokens to read) while prompts are read, once a
                chunk.
            on_step: Called after every denoiser pass.
            cancelled: Asked before every pass.

        Returns:
            One result for one prompt, a list in the order of the prompts for a list.

        Raises:
            RequestError: a request cannot be served; nothing has been run.
            ConfigError: likewise, because of an option.
            EngineOutputError: an engine returned numbers that cannot be right.
            RequestCancelledError: `cancelled` said so.
        """
        rows, single = self._rows(prompts, config)
        results: dict[int, Generation] = {}
        with self._lock:
            for event in self._events(rows, Hooks(on_step, on_prefill, cancelled)):
                if event.result is not None:
                    results[event.row] = event.result
        if single:
            return results[0]
        return [results[i] for i in range(len(rows))]

    def stream(
        self,
        prompts: str | Request | Sequence[int] | Sequence[str | Request | Sequence[int]],
        config: GenerationConfig | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[BlockEvent, None, None]:
        """Generates like `generate` and yields each row's part of a block as it is committed.

        Requests are checked at once, work begins with the first event asked for. Closing the
        iterator stops the work.
        """
        rows, _ = self._rows(prompts, config)
        return self._in_turns(self._events(rows, Hooks(on_step, on_prefill, cancelled)))

    @overload
    def score(
        self,
        pairs: tuple[Prompt, Prompt],
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Score: ...

    @overload
    def score(
        self,
        pairs: list[tuple[_Text, _Text]],
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Score]: ...

    def score(
        self,
        pairs: Any,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Score | list[Score]:
        """Log-likelihood of continuations under the context tower, read token by token.

        Args:
            pairs: A tuple (context, continuation) of two texts or two lists of token ids, or a list
                of such tuples; an empty context is the BOS token.
            on_prefill: Called with (tokens read, tokens to read) while contexts are read.
            cancelled: Asked before every pass.

        Returns:
            A `Score` for one pair, a list of them in the order of the pairs for a list.

        Raises:
            RequestError: a pair cannot be scored; nothing has been run.
            EngineOutputError: an engine returned numbers that cannot be right.
            RequestCancelledError: `cancelled` said so.
        """
        self._check_open()
        single = isinstance(pairs, tuple)
        given, rows = scoring_rows([pairs] if single else pairs, self._limits)
        with self._lock:
            for _ in self._events(rows, Hooks(None, on_prefill, cancelled)):
                pass
        scores = [g.score() for g in given]
        return scores[0] if single else scores

    def warm_up(self, rows: Sequence[int], *, optional: bool = False) -> None:
        """Runs every pass for numbers of rows, so that nothing is compiled while requests wait.

        Batches are padded to the next number of rows that is ready; before any is, to the next of
        1, 2, 4, 8, ... . What was compiled is saved beside the engines and read at the next
        opening.

        Args:
            rows: Each is ready afterwards, or the next number of rows the engines are bound for.
            optional: Goes on, and says so in the log, where there is not enough memory for so many.

        Raises:
            ConfigError: a number is not from 1 to `max_batch`.
            RequestError: there is not enough memory.
        """
        self._check_open()
        limits = self._limits
        for count in rows:
            if not 1 <= count <= limits.max_batch:
                raise ConfigError(
                    f"{count} rows cannot be warmed up",
                    found=f"this session takes 1 to {limits.max_batch} together",
                    do="name others, or open it with a larger max_batch",
                )
        block = limits.fixed_block or limits.trained_block_size
        widths = (limits.max_chunk, min(block, limits.max_chunk), 1)
        run = partial(run_every_pass, widths=widths, block_size=block)
        with self._lock:
            # The smallest last: its buffers are kept for the first request.
            for count in sorted(set(rows), reverse=True):
                started = perf_counter()
                try:
                    self._workspaces.warm_up(count, run)
                except RequestError as e:
                    if not optional:
                        raise
                    logger.warning("%d rows are not warmed up: %s", count, e.found)
                else:
                    logger.info("%d row(s) warmed up in %.2f s", count, perf_counter() - started)
            self._keep_kernels()

    def pass_record(self) -> PassRecord:
        """Pass times for 1, 2, 4, ... and `max_batch` rows that fit, for mode `auto`."""
        self._check_open()
        size = self._limits.fixed_block or self._defaults.block_size
        with self._lock:
            return self._auto.record(row_counts(self._limits.max_batch), size)

    def relocate(self) -> None:
        """Moves keys and values of running calls, as a growing text does; for checks.

        Called between passes: what an engine keeps outside its buffers is lost, and the text
        changes.
        """
        with self._lock:
            self._workspaces.relocate()

    def close(self) -> None:
        """Frees buffers and engines, at the end of a running call's turn; idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                try:
                    close_all((self._workspaces.close, self._towers.close))
                except DeviceError as e:
                    if not self._failed:
                        raise
                    logger.info("closing after the GPU had failed: %s", e)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        Cleanup(self.close).__exit__(kind, error, trace)

    def _rows(self, prompts: Any, config: GenerationConfig | None) -> tuple[list[Row], bool]:
        """The requests ready to run, and whether a single one was passed."""
        self._check_open()
        requests, single = as_requests(prompts, config or self._defaults)
        return [row_from_request(i, r, self._limits) for i, r in enumerate(requests)], single

    def _events(self, rows: Sequence[Row], hooks: Hooks) -> Generator[BlockEvent, None, None]:
        """The events of all rows, batch by batch, each in its mode or the one chosen for it."""
        run = partial(self._batch_events, hooks=hooks)
        try:
            for batch in batches(rows, self._limits.max_batch):
                self._check_open()
                auto = batch[0].config.mode == "auto"
                yield from self._auto.events(batch, run) if auto else run(batch)
        except DeviceError:
            self._failed = True
            raise

    def _batch_events(
        self, batch: Sequence[Row], hooks: Hooks
    ) -> Generator[BlockEvent, None, None]:
        """The events of rows of one mode that run together."""
        lengths = [row.length for row in batch]
        plan = prefill_plan(lengths, self._limits.max_chunk, self._towers.chunk_widths)
        first_extension = max(min(row.length + row.width, row.end) for row in batch)
        with self._workspaces.lent(len(batch), max(plan.peak, first_extension)) as work:
            yield from BlockLoop(work, batch, hooks).run(plan)
        self._keep_kernels()

    def _keep_kernels(self) -> None:
        if self._towers.keep is not None:
            self._towers.keep()

    def _measured(self, rows: int, block_size: int) -> PassTimes:
        """Times passes of scratch rows."""
        with self._workspaces.lent(rows, block_size + 1) as work:
            return measure_pass_times(work, block_size)

    def _in_turns(
        self, events: Generator[BlockEvent, None, None]
    ) -> Generator[BlockEvent, None, None]:
        """The same events; the session is held only while one is computed."""
        # Held by the session too, so that to Python's collector this generator alone is garbage: it
        # would close the inner ones itself, in any thread and in the middle of a pass.
        self._iterators.add(events)
        try:
            while True:
                with self._lock:
                    self._check_open()
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            self._lock.at_the_end(partial(self._let_go, events))

    def _let_go(self, events: Generator[BlockEvent, None, None]) -> None:
        self._iterators.discard(events)
        events.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(
                "this session is closed",
                found="a call after close() or after the end of its `with` statement",
                do="open the bundle again",
            )


def _check_option(name: str, value: int | None, most: int | None = None) -> None:
    if value is not None and (value < 1 or (most is not None and value > most)):
        allowed = f"1 to {most}" if most is not None else "1 or more"
        raise ConfigError(
            f"{name}={value} cannot be used",
            found=f"allowed: {allowed}",
            do=f"choose another {name}",
        )
