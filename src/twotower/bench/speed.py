"""Time and memory of generation, passes and exports, as ratios of things measured in one run."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, REPORT_FILE, Bundle
from twotower.checkpoint.reader import Checkpoint
from twotower.checkpoint.synthetic import SyntheticOptions, published_slice, write_checkpoint
from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import BuildError, ConfigError
from twotower.runtime import Generation, StepRecord, TwoTower
from twotower.spec import CONTEXT, DENOISER
from twotower.units import format_bytes


@dataclass(frozen=True, slots=True)
class GenerationSpeed:
    """Medians of one mode, `diffusion` or `ar`.

    `tokens_per_second` are new tokens of the whole batch over the whole time, prefill included.
    `pass_ms` is one denoiser pass, in `ar` mode one token; `extend_ms` the context tower over a
    finished block (0 if there is only one; in `ar` mode as `pass_ms`); `tokens_per_nfe` what a pass
    of one row gave.
    """

    mode: str
    tokens_per_second: float
    prefill_ms: float
    pass_ms: float
    extend_ms: float
    tokens_per_nfe: float
    steps_per_block: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_generation(
    model: TwoTower, config: GenerationConfig, *, prompt_tokens: int, rows: int, runs: int
) -> list[GenerationSpeed]:
    """Measures diffusion and autoregression on the same random prompts.

    The mode of `config` is set here, and end-of-sequence tokens are ignored so that both modes make
    equally many tokens. One run of each mode comes first and is not counted.

    Raises:
        ConfigError: there would be nothing to measure.
    """
    return measure_in_turns([model], config, prompt_tokens=prompt_tokens, rows=rows, runs=runs)[0]


def measure_in_turns(
    models: Sequence[TwoTower],
    config: GenerationConfig,
    *,
    prompt_tokens: int,
    rows: int,
    runs: int,
) -> list[list[GenerationSpeed]]:
    """Measures both modes of several bundles of one vocabulary; see `measure_generation`."""
    for name, value in (("--prompt-tokens", prompt_tokens), ("--rows", rows), ("--runs", runs)):
        if value < 1:
            raise ConfigError(
                "nothing to measure",
                found=f"{name} {value}; allowed: 1 and more",
                do=f"name a larger {name}",
            )
    config = config.seeded()
    prompts = random_prompts(
        models[0].config,
        prompt_tokens,
        rows,
        seed=config.seed,
    )
    configs = [
        replace(config, mode=mode, ignore_eos=True, top_p=1.0) for mode in ("diffusion", "ar")
    ]
    seen: list[dict[str, list[list[Generation]]]] = [{c.mode: [] for c in configs} for _ in models]
    for run in range(runs + 1):
        for options in configs:
            for model, batches in zip(models, seen, strict=True):
                results = model.generate(prompts, options)
                if run:
                    batches[options.mode].append(results)
    return [[_speed(mode, batches) for mode, batches in of_model.items()] for of_model in seen]


def random_prompts(
    config: ModelConfig, length: int, rows: int, *, seed: int | None
) -> list[list[int]]:
    """Prompts of random tokens, special ones left out."""
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(
        np.arange(config.vocab_size),
        [config.mask_token_id, config.pad_token_id, *config.eos_token_ids],
    )
    return [rng.choice(words, length).tolist() for _ in range(rows)]


def _speed(mode: str, batches: list[list[Generation]]) -> GenerationSpeed:
    def per_batch(figure: Callable[[list[Generation]], float]) -> float:
        return float(median(figure(batch) for batch in batches))

    def longest(figure: Callable[[Generation], float]) -> float:
        return per_batch(lambda batch: max(figure(r) for r in batch))

    if mode == "diffusion":
        pass_ms = longest(lambda r: r.timings.denoise / r.usage.nfe)
        # The last block is never read.
        extend_ms = longest(lambda r: r.timings.extend / max(r.usage.blocks - 1, 1))
    else:
        pass_ms = extend_ms = longest(lambda r: r.timings.extend / r.usage.nfe)
    return GenerationSpeed(
        mode=mode,
        tokens_per_second=per_batch(
            lambda b: 1000 * sum(len(r.tokens) for r in b) / max(r.timings.total for r in b)
        ),
        prefill_ms=per_batch(lambda b: b[0].timings.prefill),
        pass_ms=pass_ms,
        extend_ms=extend_ms,
        tokens_per_nfe=per_batch(
            lambda b: sum(r.usage.completion_tokens for r in b) / sum(r.usage.nfe for r in b)
        ),
        steps_per_block=per_batch(lambda b: sum(r.usage.steps_per_block for r in b) / len(b)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Medians of `runs` passes of one row after a context of `context` tokens.

    `denoise_ms` is one denoiser pass, from its launch until its tokens are on the host; `extend_ms`
    the context tower over a block and the head, until the next token is there. Bytes are of the
    weights as stored.
    """

    context: int
    runs: int
    denoise_ms: float
    extend_ms: float
    denoiser_bytes: int
    context_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, with bytes over time."""
        rates = {
            "denoise_gb_per_s": self.denoiser_bytes / self.denoise_ms / 1e6,
            "extend_gb_per_s": self.context_bytes / self.extend_ms / 1e6,
        }
        return asdict(self) | rates


def measure_passes(
    bundle: Bundle, model: TwoTower, *, context: int = 128, runs: int = 30
) -> PassTimes:
    """Times passes by wall clock around work that is waited for, the first of a kind left out."""
    size = bundle.trained_block_size
    (prompt,) = random_prompts(model.config, context, 1, seed=0)
    (chunk,) = random_prompts(model.config, size, 1, seed=1)
    # No prediction is surer than 1, so every block takes as many passes as it has positions.
    blocks = -(-runs // size) + 1
    options = GenerationConfig(
        max_new_tokens=blocks * size,
        block_size=size,
        confidence_threshold=1.0,
        steps_per_block=size,
        ignore_eos=True,
    )
    steps: list[StepRecord] = []
    model.generate(prompt, options, on_step=steps.append)
    one = GenerationConfig(mode="ar", max_new_tokens=1, ignore_eos=True)
    seconds = []
    for _ in range(runs + 2):
        started = time.perf_counter()
        model.generate(chunk, one)
        seconds.append(time.perf_counter() - started)
    counted = [s.ms for s in steps[size:]]
    return PassTimes(
        context=context,
        runs=min(len(counted), runs),
        denoise_ms=median(counted),
        extend_ms=1000 * median(seconds[2:]),
        denoiser_bytes=bundle.files[GRAPH_FILES[DENOISER] + DATA_SUFFIX].size,
        context_bytes=bundle.files[GRAPH_FILES[CONTEXT] + DATA_SUFFIX].size,
    )


def run_measured(work: Callable[..., None], *arguments: Any) -> tuple[float, int]:
    """Seconds of `work(*arguments)` in a fresh process, and its peak anonymous memory in bytes.

    The peak is sampled every 10 ms, without file pages the system can drop; 0 without /proc.
    BuildError if the process fails.
    """
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    began = time.perf_counter()
    process.start()
    peak = 0
    while process.is_alive():
        peak = max(peak, _anonymous(process.pid or 0))
        process.join(0.01)
    seconds = time.perf_counter() - began
    if process.exitcode:
        raise BuildError(
            "a measured process failed",
            found=f"exit code {process.exitcode}",
            do="read its message above",
        )
    return seconds, peak


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


SMALL_CONFIG: dict[str, Any] = {
    **published_slice("MEM*E-"),
    "hidden_size": 512,
    "vocab_size": 8192,
    "n_routed_experts": 16,
    "moe_intermediate_size": 256,
    "intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512,
    "mamba_num_heads": 16,
    "ssm_state_size": 64,
    "num_attention_heads": 8,
    "head_dim": 64,
    "time_step_limit": [0.0, math.inf],
}
"""A model of 100 MB with every layer kind."""


@dataclass(frozen=True, slots=True)
class ExportCost:
    """One measurement.

    The export's time includes hashing but not verification; `verify_seconds` (None if not asked
    for) is the comparison with torch, `largest_error` its largest relative error.
    """

    checkpoint_bytes: int
    copy_seconds: float
    export_seconds: float
    export_peak_bytes: int
    verify_seconds: float | None
    largest_error: float | None

    @property
    def ratio(self) -> float:
        """Export time over copy time."""
        return self.export_seconds / self.copy_seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "export_to_copy": self.ratio}


def measure_export(
    scratch: Path,
    pattern: str | None,
    *,
    verify: bool = False,
    say: Callable[[str], None] = lambda what: None,
) -> ExportCost:
    """Writes a synthetic BF16 checkpoint and measures a copy and an export of it.

    Args:
        scratch: An empty folder on the disk to measure; its content is removed again.
        pattern: Layers at published widths (`ME*` is 8 GB), or None for a model of 100 MB.
        verify: Also compare the result with the torch towers.
        say: Told what is being done.
    """
    say("writing a synthetic checkpoint")
    config = published_slice(pattern) if pattern else SMALL_CONFIG
    source = write_checkpoint(scratch / "checkpoint", config, SyntheticOptions())
    size = sum(p.stat().st_size for p in source.iterdir())
    say(f"copying {format_bytes(size)}")
    copy_seconds, _ = run_measured(shutil.copytree, source, scratch / "copy")
    shutil.rmtree(scratch / "copy")
    say("exporting it")
    export_seconds, peak = run_measured(_export, source, scratch / "bundle", False)
    verify_seconds, error = None, None
    if verify:
        shutil.rmtree(scratch / "bundle")
        say("exporting it again, with verification")
        whole, _ = run_measured(_export, source, scratch / "bundle", True)
        verify_seconds = whole - export_seconds
        report = (scratch / "bundle" / REPORT_FILE).read_text(encoding="utf-8")
        error = json.loads(report).get("largest_error")
    for name in ("checkpoint", "bundle"):
        shutil.rmtree(scratch / name)
    return ExportCost(size, copy_seconds, export_seconds, peak, verify_seconds, error)


def _export(source: Path, target: Path, verified: bool) -> None:
    from twotower.export.exporter import export_bundle
    from twotower.export.verify import verify_bundle

    export_bundle(
        Checkpoint.open(source),
        target,
        verify=verify_bundle if verified else None,
    )
