"""Bundles built for the targets of this machine, once a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.gpu import refused
from tests.helpers.graphs import FIXTURES
from twotower.cli.main import main

# Before any CUDA library is loaded: float32 is compared token by token here, and TF32 products keep
# ten bits of 23.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

TINY = FIXTURES.parents[1] / "assets" / "twotower-tiny"


@pytest.fixture(scope="session")
def built_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """A bundle with engines for a target and for ort-cpu; skips what cannot run."""
    bundles: dict[tuple[str, str], Path] = {}

    def build(model: str, dtype: str, target: str) -> Path:
        if why := refused(target):
            pytest.skip(why)
        if (model, dtype) not in bundles:
            path = tmp_path_factory.mktemp("gpu") / f"{model}-{dtype}"
            checkpoint = TINY if model == TINY.name else FIXTURES / model
            assert (
                main(["export", str(checkpoint), "-o", str(path), "--dtype", dtype, "--no-verify"])
                == 0
            )
            assert main(["build", str(path), "--target", "ort-cpu"]) == 0
            bundles[model, dtype] = path
        path = bundles[model, dtype]
        assert main(["build", str(path), "--target", target]) == 0
        return path

    return build
