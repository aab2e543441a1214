"""The shape of experts as a build writes it down."""

from __future__ import annotations

from dataclasses import replace

from twotower.bundle import ExpertsStep
from twotower.config.formats import FORMATS, WeightFormat
from twotower.kernels.shape import MATRICES, ExpertFormats, ExpertShape

__all__ = ["shape_of"]


def shape_of(step: ExpertsStep) -> ExpertShape:
    """What the kernels of a step are compiled for.

    Raises:
        BuildError: the kernels do not tile it.
    """
    formats: dict[str, WeightFormat] = {}
    for matrix in MATRICES:
        if matrix in step.formats:
            name, group = step.formats[matrix]
            formats[matrix] = replace(FORMATS[name], group=group)
    return ExpertShape(
        hidden=step.hidden,
        width=step.width,
        experts=step.experts,
        top=step.top,
        shared_intermediate=step.shared_intermediate,
        dtype=step.dtype,
        weights=ExpertFormats(**formats),
    )
