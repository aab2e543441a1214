"""Bundles with engines for the TensorRT stand-in, by the builder that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.graphs import FIXTURES
from tests.helpers.tensorrt_stand_in import StandInBuilder, TensorRTStandIn, stand_in_job
from twotower.builders import BuildConfig, build_engines, cut, make_engine
from twotower.bundle import Bundle
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.hardware import Gpu

__all__ = ["GPUS", "stand_in_bundle"]

GPUS = tuple(Gpu(f"stand-in {n}", 89, 1 << 34) for n in range(4))


def stand_in_bundle(folder: str | Path, output: Path, pieces: int = 1, *, max_context: int = 256, dtype: str = "float32") -> Bundle:
    """A bundle with engines for 4 rows.

    Args:
        folder: Name of a fixture, or a checkpoint.
        output: Where it is made.
        pieces: More than 1 cuts each tower into about so many segments.
        max_context: Longest text.
        dtype: Of the graphs.
    """
    bundle = export_bundle(Checkpoint.open(FIXTURES / folder), output, ExportConfig(dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_engine, "run_job", stand_in_job)
        patch.setattr(cut, "BUILD_MEMORY_BASE", 0)  # tiny weights: the library itself would hide them
        weights = bundle.files["denoiser/model.onnx.data"].size
        memory = None if pieces == 1 else round(cut.BUILD_MEMORY_FACTOR * max(weights // pieces, weights // 4))
        builder = StandInBuilder(TensorRTStandIn(CudaStandIn()))
        build_engines(bundle, "rtx", builder, config=BuildConfig(sms=(89,), max_context=max_context, max_batch=4, max_build_memory=memory))
    return bundle
