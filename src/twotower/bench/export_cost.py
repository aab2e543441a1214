"""Time and memory of an export beside a plain copy of the same bytes, and its error if verified."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twotower.bundle import REPORT_FILE
from twotower.checkpoint.reader import Checkpoint
from twotower.checkpoint.synthetic import SyntheticOptions, published_slice, write_checkpoint
from twotower.errors import BuildError
from twotower.export.exporter import export_bundle
from twotower.export.verify import verify_bundle
from twotower.units import format_bytes

_EVERY = 0.01


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
        process.join(_EVERY)
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
    source = write_checkpoint(
        scratch / "checkpoint",
        published_slice(pattern) if pattern else SMALL_CONFIG,
        SyntheticOptions(),
    )
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
    export_bundle(Checkpoint.open(source), target, verify=verify_bundle if verified else None)
