"""Bundles with engines for the TensorRT stand-in, by the builder that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.graphs import FIXTURES
from tests.helpers.tensorrt_stand_in import StandInBuilder, TensorRTStandIn, stand_in_job
from twotower.builders import BuildConfig, build_engines
from twotower.builders.trt import make_engine
from twotower.bundle import Bundle
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.hardware import Gpu

__all__ = ["GPUS", "build_stand_ins", "stand_in_bundle"]

GPUS = tuple(Gpu(f"stand-in {n}", 89, 1 << 34) for n in range(4))


def stand_in_bundle(
    folder: str | Path, output: Path, pieces: int = 1, *, dtype: str = "float32", **options: Any
) -> Bundle:
    """A bundle with engines for 4 rows.

    Args:
        folder: Name of a fixture, or a checkpoint.
        output: Where it is made.
        pieces: More than 1 cuts each tower into about so many segments.
        dtype: Of the graphs.
        options: Of the build: 256 tokens of text and dense experts if nothing else is said.
    """
    bundle = export_bundle(Checkpoint.open(FIXTURES / folder), output, ExportConfig(dtype=dtype))
    build_stand_ins(bundle, segments=pieces, **options)
    return bundle


def build_stand_ins(bundle: Bundle, **options: Any) -> None:
    """Engines for the stand-in in a bundle that is there; options as of `stand_in_bundle`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_engine, "run_job", stand_in_job)
        builder = StandInBuilder(TensorRTStandIn(CudaStandIn()))
        config = BuildConfig(
            **{"sms": (89,), "max_context": 256, "max_batch": 4, "experts": "dense", **options}
        )
        build_engines(bundle, "rtx", builder, config=config)
