"""The kernels of a build's experts, compiled into the target's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from twotower.builders.base import Report
from twotower.builders.own_code import kernel_source
from twotower.bundle import ExpertsStep, FileRecord, hash_file
from twotower.errors import BuildError
from twotower.kernels import MOST_TOKENS, ExpertShape, Manifest, launches
from twotower.kernels.shape import shape_of
from twotower.kernels.signatures import refuse_sm
from twotower.kernels.tilings import TIERS
from twotower.spec import MAX_CHUNK

__all__ = ["Compile", "compile_code", "require_kernels"]

Compile = Callable[..., Manifest]
"""`compile_kernels`, or something like it."""


def require_kernels(step: ExpertsStep, sms: Sequence[int], *, max_tokens: int) -> None:
    """Refuses experts that no kernel computes, before anything is built.

    Raises:
        BuildError: there are no kernels for a compute capability, or not for so many tokens.
    """
    shape = shape_of(step)
    if max_tokens > MOST_TOKENS:
        raise BuildError(
            "the kernels of experts do not take so many rows",
            found=f"--max-batch {max_tokens // MAX_CHUNK}, {max_tokens} tokens in a chunk of a prompt; at most {MOST_TOKENS}",
            do=f"build with --max-batch {MOST_TOKENS // MAX_CHUNK} or less, or with --experts dense",
        )
    for sm in sms:
        refuse_sm(shape, sm)


def compile_code(
    steps: Iterable[ExpertsStep],
    sms: Sequence[int],
    folder: Path,
    *,
    max_tokens: int,
    compiler: Compile,
    report: Report,
) -> tuple[dict[str, FileRecord], dict[str, Any]]:
    """Compiles the kernels of every shape of experts there is, each into a folder of its own.

    Args:
        steps: The experts of all towers.
        sms: Compute capabilities.
        folder: The target's folder.
        max_tokens: Most tokens of a pass.
        compiler: What compiles.
        report: Called with the progress.

    Returns:
        The files, and what is to be known of them: by folder.

    Raises:
        BuildError: there are no kernels for a shape or a compute capability.
    """
    files: dict[str, FileRecord] = {}
    facts: dict[str, Any] = {}
    shapes: dict[str, ExpertShape] = {step.code: shape_of(step) for step in steps}
    for code, shape in shapes.items():

        def tell(file: str, code: str = code) -> None:
            report(f"{code}: {file}", 0, 0)

        manifest = compiler(shape, sms, folder / code, max_tokens=max_tokens, report=tell)
        for file in sorted((folder / code).iterdir()):
            files[f"{code}/{file.name}"] = FileRecord(file.stat().st_size, hash_file(file))
        facts[code] = {
            "triton": manifest.triton,
            "fp_fusion": manifest.fp_fusion,
            "sms": list(manifest.sms),
            "max_tokens": manifest.max_tokens,
            "kernels": len(manifest.cubins),
            "launches": [
                [tier.tokens, len(launches(shape, tier.tokens, sms[0], manifest))]
                for tier in TIERS
                if tier.tokens <= manifest.max_tokens
            ],
            "source": kernel_source(),
        }
    return files, facts
