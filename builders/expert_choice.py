"""What computes a build's experts where nobody said.

Kernels compute the chosen ones, wherever there are such kernels; else the engine computes all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower.builders.base import AUTO, DENSE, FUSED, KERNELS, BuildConfig
from twotower.builders.bundle_graphs import BundleGraphs
from twotower.builders.expert_code import require_kernels
from twotower.builders.expert_cut import ExpertCut
from twotower.bundle import ExpertsStep
from twotower.config import LayerKind
from twotower.errors import BuildError, ConfigError
from twotower.extras import require_libraries
from twotower.spec import CONTEXT, DENOISER, MAX_CHUNK

__all__ = ["ASKED", "DENSE_COST", "ExpertChoice", "choose_experts", "require_compiler"]

_SLOWER = "one token at a time takes about 10 times as long at published size, by arithmetic"

DENSE_COST = f"every expert computes for every token: {_SLOWER}"
"""Of engines that compute their experts."""

ASKED = "--experts dense asked for it"
"""Why experts are dense where somebody said so."""


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """What computes the experts of a build.

    Attributes:
        experts: `dense`, `kernels` or `fused`.
        why: Of `dense`, why not the others; empty for them, and for a model without experts.
    """

    experts: str
    why: str = ""

    def to_json(self) -> dict[str, str]:
        """Plain data, as `build.json` keeps it."""
        out = {"computed_by": self.experts}
        return {**out, "why": self.why, "cost": DENSE_COST} if self.why else out


def choose_experts(graphs: BundleGraphs, config: BuildConfig, sms: Sequence[int]) -> ExpertChoice:
    """What computes the experts.

    Args:
        graphs: The graphs.
        config: What is asked for.
        sms: Compute capabilities that kernels would be compiled for.

    Raises:
        ConfigError: what was asked for is of another target.
    """
    if config.experts == FUSED:
        raise ConfigError(
            "TensorRT has no operator for these experts",
            found=f"--experts {FUSED}, which is of ort-cuda; allowed: {AUTO}, {KERNELS}, {DENSE}",
            do=f"leave --experts out, or build with --experts {KERNELS}",
        )
    if not graphs.bundle.config.indices(LayerKind.MOE):
        return ExpertChoice(DENSE if config.experts == AUTO else config.experts)
    if config.experts != AUTO:
        return ExpertChoice(config.experts, ASKED if config.experts == DENSE else "")
    if config.segments > 1:
        return ExpertChoice(
            DENSE,
            f"--segments {config.segments} cuts engines that compute their experts",
        )
    try:
        for step in _experts_of(graphs):
            require_kernels(step, sms, max_tokens=config.max_batch * MAX_CHUNK)
    except BuildError as e:
        return ExpertChoice(DENSE, f"{e.what} ({e.found})")
    return ExpertChoice(KERNELS)


def require_compiler() -> None:
    """Refuses a build of kernels where their compiler is missing.

    Dense engines in their place would be slow without a word.

    Raises:
        ConfigError: Triton is not installed.
    """
    try:
        require_libraries("kernels", "triton", what="compiling the kernels of experts")
    except ConfigError as e:
        do = f"{e.do}; or build with --experts dense, where {DENSE_COST}"
        raise ConfigError(e.what, found=e.found, do=do) from e


def _experts_of(graphs: BundleGraphs) -> Iterator[ExpertsStep]:
    """The experts of both towers.

    Raises:
        BuildError: a graph cannot be cut at them, or the kernels do not tile them.
    """
    bundle = graphs.bundle
    for name in (CONTEXT, DENOISER):
        cut = ExpertCut(
            graphs.shared(name),
            bundle.signatures[name],
            bundle.config,
            dtype=bundle.dtype,
        )
        for number in range(cut.programs - 1):
            yield cut.experts(number)
