"""Section `cuda-layer`: the runtime's CUDA layer on a real GPU, with torch as the engine.

Both fixtures' recorded tokens are written with captured graphs and without, by towers in one piece,
in segments, and as programs with the expert kernels between them, one prompt at a time and in a
batch. Over the tests' fake for CUDA the same runs on a CPU.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cuda.bindings import driver as cuda_driver
from cuda.bindings import runtime as cudart

from tools.gpu.counted import CountedCuda
from tools.gpu.questions import Given
from tools.gpu.recorded_texts import AUTOREGRESSIVE, FIXTURES, recorded_options, recorded_texts
from tools.gpu.timing import need_torch
from tools.gpu.torch_engine import TorchTensorRT, torch_job
from tools.gpu.unpack import unpack
from twotower import TwoTower
from twotower.builders.base import DENSE, KERNELS
from twotower.builders.expert_kernels import Compile
from twotower.bundle import Bundle
from twotower.doctor import Answers
from twotower.doctor.cuda_layer import check_cuda
from twotower.doctor.sections import short
from twotower.errors import TwoTowerError
from twotower.hardware import Gpu
from twotower.runtime import Request
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines import OpenOptions
from twotower.runtime.engines.trt_engine import open_tensorrt
from twotower.tensorrt_library import variant_from_module

__all__ = ["ARCHIVE", "CASES", "Case", "ask", "tokens_of_case", "torch_bundle"]

ARCHIVE = "bundles.tar.xz"
"""Where the pack keeps the bundles of all cases."""

_IN_A_BATCH = 4
_LEAST_SECONDS = 20.0
_HEAD = ("towers", "passes", "as recorded", "graphs made", "seconds", "what went wrong")


@dataclass(frozen=True, slots=True)
class Case:
    """A fixture and how its towers are cut.

    Attributes:
        fixture: Its name.
        pieces: About so many segments each.
        experts: `kernels` for programs with the expert kernels between, as `twotower build` has it.
    """

    fixture: str
    pieces: int = 1
    experts: str = DENSE

    @property
    def name(self) -> str:
        """Of its bundle's folder."""
        return f"{self.fixture}-{self.experts if self.experts == KERNELS else self.pieces}"


CASES = (
    Case("hybrid-a"),
    Case("hybrid-a", experts=KERNELS),
    Case("hybrid-b", experts=KERNELS),
    Case("hybrid-a", 3),
    Case("hybrid-b"),
)
"""What the others need first."""


def ask(answers: Answers, given: Given) -> None:
    need_torch()
    checks = [(check.name, check.ok, check.detail) for check in check_cuda(Cuda(cudart))]
    answers.put(calls=[{"name": name, "ok": ok, "detail": detail} for name, ok, detail in checks])
    answers.table("Calls without an engine", ("check", "right", "what was seen"), checks)
    _unpack(given)
    rows: list[tuple[Any, ...]] = []
    for case in CASES:
        bundle = _bundle(case, given.work)
        for graphs in (True, False):
            trt = TorchTensorRT()
            facts = tokens_of_case(
                bundle, case, trt, cuda=CountedCuda(cudart, driver=cuda_driver), graphs=graphs
            )
            answers.put(**{f"{case.name} {'graphs' if graphs else 'launched'}": facts})
            rows.append(_row(case, facts))
            answers.table("Recorded tokens", _HEAD, rows)
            if "CUDA error" in facts.get("failed", ""):
                answers.say("stopped: an error of the GPU stays with the process")
                return
            if answers.left < _LEAST_SECONDS:
                answers.say("stopped: no time left")
                return
    right = sum(row[2] is True for row in rows)
    answers.say(f"{right} of {len(rows)} ways of running write every recorded token")


def tokens_of_case(
    bundle: Bundle,
    case: Case,
    trt: TorchTensorRT,
    *,
    cuda: CountedCuda,
    graphs: bool,
    most: int | None = None,
) -> dict[str, Any]:
    """Writes every recorded text of a fixture and counts those that are as recorded.

    Args:
        bundle: Of the case, by `torch_bundle`.
        case: The case.
        trt: The library.
        cuda: The calls.
        graphs: Whether passes are captured.
        most: Write so many of the texts only; None for all.

    Returns:
        Plain data; `right` is whether everything is, `failed` an error that ended it.
    """
    size = bundle.trained_block_size  # engines have one block size
    recorded = recorded_texts(case.fixture)
    texts = [t for t in recorded if t["params"]["block_size"] == size][:most]
    options = OpenOptions(devices=(0,), graphs=graphs, gpus=(Gpu("torch", 89, 1 << 34),))
    began, counts = time.monotonic(), dict.fromkeys(("diffusion", "ar", "in a batch", "again"), 0)
    facts: dict[str, Any] = {"graphs": graphs, "texts": len(texts)}
    try:
        towers = open_tensorrt(bundle, variant_from_module(trt), cuda, options)
        with TwoTower.from_towers(towers, trained_block_size=size) as model:
            for name, right in _compared(model, texts):
                counts[name] += right
    except TwoTowerError as e:
        facts["failed"] = f"{e.what}: {e.found}"
    except Exception as e:  # noqa: BLE001 - of the library or the GPU: the answer to this case
        facts["failed"] = f"{type(e).__name__}: {e}"
    wanted = (len(texts), len(texts), min(_IN_A_BATCH, len(texts)), 1)
    return {
        **facts,
        **counts,
        "right": tuple(counts.values()) == wanted and "failed" not in facts,
        "captures": [cuda.made, cuda.begun],
        "executions": trt.executions,
        "captured executions": trt.captures,
        "refused": trt.failures[:3],
        "seconds": short(time.monotonic() - began),
    }


def torch_bundle(case: Case, output: Path, compiler: Compile | None = None) -> Bundle:
    """A bundle with torch engines for 4 rows and texts of 256 tokens, by the project's builder.

    Args:
        case: Of what, and how it is cut.
        output: The bundle.
        compiler: What compiles expert kernels; None for Triton.
    """
    # Exporting needs more than running: a machine with a pack may lack it.
    from twotower.builders import BuildConfig, build_engines
    from twotower.builders.trt import make_engine
    from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
    from twotower.export import Checkpoint, ExportConfig, export_bundle

    checkpoint = Checkpoint.open(FIXTURES / case.fixture)
    bundle = export_bundle(checkpoint, output, ExportConfig(dtype="float32"))
    variant = variant_from_module(TorchTensorRT("cpu"))
    builder = TensorRTBuilder(variant, compiler)
    sms = variant.sms if case.experts == KERNELS else (89,)  # an engine of torch's runs anywhere
    options = {"sms": sms, "max_context": 256, "max_batch": _IN_A_BATCH}
    config = BuildConfig(**options, segments=case.pieces, experts=case.experts)
    with patch.object(make_engine, "run_job", torch_job):
        build_engines(bundle, "rtx", builder, config=config)
    return bundle


def _compared(model: TwoTower, texts: list[dict[str, Any]]) -> Iterator[tuple[str, bool]]:
    """What was written, and whether it is what was recorded."""
    for text in texts:
        out = model.generate(text["prompt"], recorded_options(text))
        same = list(out.tokens) == text["diffusion_tokens"] and out.usage.nfe == text["nfe"]
        yield "diffusion", same
        yield (
            "ar",
            list(model.generate(text["prompt"], AUTOREGRESSIVE).tokens) == text["ar_greedy_tokens"],
        )
    some = texts[:_IN_A_BATCH]
    together = model.generate([Request(text["prompt"], recorded_options(text)) for text in some])
    for text, out in zip(some, together, strict=True):
        yield "in a batch", list(out.tokens) == text["diffusion_tokens"]
    again = model.generate(texts[0]["prompt"], recorded_options(texts[0]))
    yield "again", list(again.tokens) == texts[0]["diffusion_tokens"]


def _unpack(given: Given) -> None:
    archive = given.find(ARCHIVE)
    if archive is not None:
        with tarfile.open(archive) as packed:
            unpack(packed, given.work / "bundles")


def _bundle(case: Case, work: Path) -> Bundle:
    folder = work / "bundles" / case.name
    return Bundle.open(folder) if folder.is_dir() else torch_bundle(case, folder)


def _row(case: Case, facts: dict[str, Any]) -> tuple[Any, ...]:
    pieces = "one piece" if case.pieces == 1 else f"about {case.pieces} segments"
    if case.experts == KERNELS:
        pieces = "programs and expert kernels"
    made, begun = facts["captures"]
    wrong = "; ".join(filter(None, (facts.get("failed"), *facts["refused"])))
    passes = "replayed" if facts["graphs"] else "launched"
    return (
        f"{case.fixture}, {pieces}",
        passes,
        facts["right"],
        f"{made} of {begun}",
        facts["seconds"],
        wrong[:300],
    )
