"""Chooses what computes a build's experts, and compiles kernels into the target's folder.

Kernels compute the chosen experts; where there are none the engine computes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.builders.base import AUTO, DENSE, FUSED, KERNELS, BuildConfig, Report
from twotower.builders.cache import kernel_source
from twotower.bundle import Bundle, ExpertsStep
from twotower.config import LayerKind
from twotower.errors import BuildError, ConfigError
from twotower.extras import require_libraries
from twotower.kernels import MOST_TOKENS, Manifest, launches
from twotower.kernels.shape import shape_of
from twotower.kernels.signatures import refuse_sm
from twotower.kernels.tilings import TIERS
from twotower.spec import MAX_CHUNK

Compile = Callable[..., Manifest]
"""`compile_kernels`, or something like it."""

DENSE_COST = (
    "every expert computes for every token: "
    "one token at a time takes about 10 times as long at published size, by arithmetic"
)
"""Of engines that compute their experts."""

ASKED = "--experts dense asked for it"
"""Why experts are dense where `dense` was asked for."""


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """What computes experts: `dense`, `kernels` or `fused`, and why not the others."""

    experts: str
    why: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain data, as `build.json` keeps it."""
        out = {"computed_by": self.experts}
        if self.why:
            return {**out, "why": self.why, "cost": DENSE_COST}
        return out


def choose_path(
    bundle: Bundle, config: BuildConfig, sms: Sequence[int], steps: Iterable[ExpertsStep]
) -> ExpertChoice:
    """What computes the experts in engines of TensorRT.

    `sms` are the kernels' compute capabilities; `steps` is read only where it decides. Raises
    ConfigError if the option is of another target.
    """
    if config.experts == FUSED:
        raise ConfigError(
            "TensorRT has no operator for these experts",
            found=f"--experts {FUSED}, which is of ort-cuda; allowed: {AUTO}, {KERNELS}, {DENSE}",
            do=f"leave --experts out, or build with --experts {KERNELS}",
        )
    if not bundle.config.indices(LayerKind.MOE):
        return ExpertChoice(DENSE if config.experts == AUTO else config.experts)
    if config.experts != AUTO:
        return ExpertChoice(config.experts, ASKED if config.experts == DENSE else "")
    if config.segments > 1:
        why = f"--segments {config.segments} cuts engines that compute their experts"
        return ExpertChoice(DENSE, why)
    try:
        for step in steps:
            require_kernels(step, sms, max_batch=config.max_batch)
    except BuildError as e:
        return ExpertChoice(DENSE, f"{e.what} ({e.found})")
    return ExpertChoice(KERNELS)


def require_kernels(step: ExpertsStep, sms: Sequence[int], *, max_batch: int) -> None:
    """Refuses, by BuildError before building, compute capabilities or rows without kernels."""
    shape = shape_of(step)
    if max_batch * MAX_CHUNK > MOST_TOKENS:
        tokens = f"{max_batch * MAX_CHUNK} tokens in a chunk of a prompt; at most {MOST_TOKENS}"
        most = MOST_TOKENS // MAX_CHUNK
        raise BuildError(
            "the kernels of experts do not take so many rows",
            found=f"--max-batch {max_batch}, {tokens}",
            do=f"build with --max-batch {most} or less, or with --experts dense",
        )
    for sm in sms:
        refuse_sm(shape, sm)


def require_compiler(given: Compile | None) -> None:
    """Raises ConfigError where Triton is to compile and is not there: dense engines are slow."""
    if given is not None:
        return
    try:
        require_libraries("kernels", "triton", what="compiling the kernels of experts")
    except ConfigError as e:
        do = f"{e.do}; or build with --experts dense, where {DENSE_COST}"
        raise ConfigError(e.what, found=e.found, do=do) from e


def compile_code(
    steps: Iterable[ExpertsStep],
    sms: Sequence[int],
    folder: Path,
    *,
    max_batch: int,
    compiler: Compile,
    report: Report,
) -> dict[str, Any]:
    """Compiles the kernels of every shape of experts there is, each into a folder of its own.

    Returns what the build record keeps of each folder. BuildError if there are no kernels for a
    shape or a compute capability.
    """
    facts: dict[str, Any] = {}
    for code, shape in {step.code: shape_of(step) for step in steps}.items():

        def tell(file: str, code: str = code) -> None:
            report(f"{code}: {file}", 0, 0)

        tokens = max_batch * MAX_CHUNK
        manifest = compiler(shape, sms, folder / code, max_tokens=tokens, report=tell)
        tiers = [tier.tokens for tier in TIERS if tier.tokens <= manifest.max_tokens]
        facts[code] = {
            "triton": manifest.triton,
            "fp_fusion": manifest.fp_fusion,
            "sms": list(manifest.sms),
            "max_tokens": manifest.max_tokens,
            "kernels": len(manifest.cubins),
            "launches": [[n, len(launches(shape, n, sms[0], manifest))] for n in tiers],
            "source": kernel_source(),
        }
    return facts
