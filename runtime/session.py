"""TwoTower: an opened bundle that generates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from twotower.bundle import BUILD_FILE, Bundle, Progress
from twotower.config import GenerationConfig
from twotower.errors import ConfigError, RequestError
from twotower.hardware import probe_machine, select_target
from twotower.runtime.engines import OpenOptions, open_towers
from twotower.runtime.engines.base import Towers
from twotower.runtime.loop import Hooks, Row, StepRecord, run_rows
from twotower.runtime.results import BlockEvent, Generation, Usage
from twotower.runtime.schedule import capacity_bucket, plan_prefill, prefill_peak
from twotower.runtime.stopping import RowText
from twotower.runtime.tokenizer import Tokenizer
from twotower.runtime.workspace import Workspace

__all__ = ["Prompt", "Request", "SessionOptions", "TwoTower"]

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt with options of its own; None takes those of the call."""

    prompt: Prompt
    config: GenerationConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What a session is opened with.

    Attributes:
        max_batch: Rows generated together at most; a longer list is served in parts.
        max_context: Longest text, prompt and answer together.
        trained_block_size: Largest block size allowed without the override.
        defaults: Options of requests that bring none.
    """

    max_batch: int = 8
    max_context: int = 262144
    trained_block_size: int = 16
    defaults: GenerationConfig = GenerationConfig()

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} cannot be used", found="allowed: a whole number above 0", do=f"raise {name}")


class TwoTower:
    """Two engines and the block loop that drives them.

    Use it as a context manager. Calls from several threads wait for one another: a session has one set of buffers.

    Args:
        towers: Opened engines; the session closes them.
        tokenizer: For text; None for token ids alone.
        options: Limits and defaults.
    """

    def __init__(self, towers: Towers, *, tokenizer: Tokenizer | None = None, options: SessionOptions | None = None) -> None:
        self._towers: Towers | None = towers
        self._config = towers.config
        self._tokenizer = tokenizer
        self._options = options or SessionOptions(max_context=towers.config.max_position_embeddings)
        self._workspace: Workspace | None = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        target: str | None = None,
        max_batch: int = 8,
        max_context: int | None = None,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> Self:
        """Opens a bundle and its engines.

        Args:
            path: The bundle's folder.
            target: Which engines; None takes the best that are built and fit this machine.
            max_batch: Rows generated together at most.
            max_context: Longest text; None for the model's own limit, which also is the most allowed.
            threads: Threads of a CPU engine, 0 for the library's choice.
            progress: Called with (bytes, of bytes) while files are checked for the first time.

        Raises:
            BundleError, EngineMismatchError: the bundle is damaged or has no engine that fits.
        """
        bundle = Bundle.open(path, progress=progress)
        built = [p.parent.name for p in (bundle.path / "engines").glob(f"*/{BUILD_FILE}")]
        chosen = target if target is not None and target not in built else select_target(probe_machine(), built, wanted=target).target
        if max_context is not None and max_context > bundle.max_context:
            raise ConfigError(
                f"max_context={max_context} is more than the model was made for", found=f"allowed: up to {bundle.max_context}", do="lower it"
            )
        options = SessionOptions(
            max_batch=max_batch,
            max_context=bundle.max_context if max_context is None else max_context,
            trained_block_size=bundle.trained_block_size,
            defaults=bundle.defaults,
        )
        tokenizer = Tokenizer(bundle.tokenizer_file) if bundle.tokenizer_file else None
        towers = open_towers(bundle, chosen, OpenOptions(threads=threads, progress=progress))
        return cls(towers, tokenizer=tokenizer, options=options)

    @property
    def defaults(self) -> GenerationConfig:
        """Options of requests that bring none."""
        return self._options.defaults

    @overload
    def generate(self, prompt: Prompt | Request, config: GenerationConfig | None = None, **watch: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[Prompt | Request], config: GenerationConfig | None = None, **watch: Any) -> list[Generation]: ...
    def generate(self, prompt: Any, config: GenerationConfig | None = None, **watch: Any) -> Any:
        """Generates to the end.

        Args:
            prompt: Text, token ids or a `Request`; or a list of these. An empty prompt is the beginning-of-sequence token.
            config: Options of prompts that bring none; None for the bundle's defaults.
            watch: `on_prefill(done, total)`, `on_step(StepRecord)`, `cancelled() -> bool`.

        Returns:
            One `Generation`, or a list of them in the order of the prompts.

        Raises:
            RequestError, ConfigError: a request cannot be served; found before any work.
            EngineOutputError, RequestCancelledError: the session stays usable.
        """
        single = _is_single(prompt)
        requests = [prompt] if single else list(prompt)
        results: list[Generation | None] = [None] * len(requests)
        for event in self.stream(requests, config, **watch):
            if event.result is not None:
                results[event.row] = event.result
        return results[0] if single else results

    def stream(
        self,
        prompts: Prompt | Request | Sequence[Prompt | Request],
        config: GenerationConfig | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[BlockEvent]:
        """Like `generate`, but yields every committed block of every row as it comes. Closing the iterator frees the rows."""
        requests: Sequence[Any] = [prompts] if _is_single(prompts) else list(prompts)  # type: ignore[list-item]
        rows = [self._row(r if isinstance(r, Request) else Request(r), config) for r in requests]
        return self._events(rows, Hooks(on_prefill=on_prefill, on_step=on_step, cancelled=cancelled))

    def close(self) -> None:
        """Frees engines and buffers; idempotent."""
        with self._lock:
            towers, self._towers, self._workspace = self._towers, None, None
        if towers is not None:
            towers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _events(self, rows: Sequence[Row], hooks: Hooks) -> Iterator[BlockEvent]:
        groups: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(rows):
            # Rows of one run share the block; autoregressive rows have none.
            size = self._options.trained_block_size if row.config.mode == "ar" else row.config.block_size
            groups.setdefault((row.config.mode, size), []).append(i)
        for (_, size), members in groups.items():
            for first in range(0, len(members), self._options.max_batch):
                part = members[first : first + self._options.max_batch]
                with self._lock:
                    yield from self._run(rows, part, size, hooks)

    def _run(self, rows: Sequence[Row], members: Sequence[int], block_size: int, hooks: Hooks) -> Iterator[BlockEvent]:
        batch = [rows[i] for i in members]
        place = {id(row): i for i, row in zip(members, batch, strict=True)}
        work = self._prepared(batch, block_size)
        for row, tokens, text in run_rows(work, batch, mask_token=self._config.mask_token_id, hooks=hooks):
            yield BlockEvent(row=place[id(row)], tokens=tokens, text=text, result=None if row.live else _result(row))

    def _prepared(self, batch: Sequence[Row], block_size: int) -> Workspace:
        """Buffers for this batch: those of the last one if they have the right shape."""
        if self._towers is None:
            raise RequestError("the session is closed", found="generate after close()", do="open the bundle again")
        capacity = capacity_bucket(prefill_peak(plan_prefill([len(row.prompt) for row in batch])))
        work = self._workspace
        if work is None or (work.rows, work.block_size, work.capacity) != (len(batch), block_size, capacity):
            self._workspace = None  # frees the old buffers before the new ones are made
            self._workspace = work = Workspace(self._towers, rows=len(batch), block_size=block_size, capacity=capacity)
        return work

    def _row(self, request: Request, config: GenerationConfig | None) -> Row:
        """A checked request."""
        options = request.config or config or self._options.defaults
        if options.mode == "diffusion" and options.block_size > self._options.trained_block_size and not options.allow_untrained_block_size:
            raise ConfigError(
                f"block_size={options.block_size} is above the {self._options.trained_block_size} the denoiser was trained with",
                found="quality collapses without a warning: the published model's HumanEval falls from 76.4 to 19.9 at 64",
                do=f"use {self._options.trained_block_size} or less, or insist with --allow-untrained-block-size",
            )
        if options.stop and self._tokenizer is None:
            raise RequestError("stop strings need text", found="this bundle has no tokenizer", do="leave them out, or export with tokenizer.json")
        prompt = self._ids(request.prompt) or (self._config.bos_token_id,)
        limit = self._options.max_context
        if len(prompt) + options.max_new_tokens > limit:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {options.max_new_tokens} new ones do not fit",
                found=f"the capacity is {limit} tokens together",
                do="shorten the prompt, lower max_new_tokens, or raise max_context if the model allows it",
            )
        return Row(prompt, replace(options), RowText(options, self._config.eos_token_ids, self._tokenizer))

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    "a text prompt needs a tokenizer", found="this bundle has none", do="give token ids (--tokens), or export with tokenizer.json"
                )
            return self._tokenizer.encode(prompt)
        size = self._config.vocab_size
        wrong = [t for t in prompt if isinstance(t, bool) or not hasattr(t, "__index__") or not 0 <= t < size]
        if wrong:
            raise RequestError(
                f"the prompt has {len(wrong)} token(s) that do not exist",
                found=f"{', '.join(map(repr, wrong[:8]))}; allowed: 0 to {size - 1}",
                do="use the tokenizer this model was trained with",
            )
        return tuple(int(t) for t in prompt)


def _is_single(prompt: Any) -> bool:
    """Text, one request, or one list of token ids; an empty list is no prompts."""
    if isinstance(prompt, (str, Request)):
        return True
    return len(prompt) > 0 and all(hasattr(t, "__index__") for t in prompt)


def _result(row: Row) -> Generation:
    answer = row.answer
    assert answer.finish_reason is not None
    usage = Usage(prompt_tokens=len(row.prompt), completion_tokens=len(answer.tokens), nfe=row.nfe, blocks=row.blocks)
    return Generation(
        tokens=tuple(answer.tokens), text=answer.text, finish_reason=answer.finish_reason, usage=usage, timings=replace(row.timings)
    )
