"""ONNX Runtime on a GPU: the exported graphs, with experts fused, between programs, or as they are.

Weights stay in the bundle's data files.

Which fusions the CUDA provider knows, and between which operators a copy or a cast must stand, is
decided where the provider is: ONNX Runtime on this machine's CPU would insert casts around every
half-width operator that a CPU lacks, and a GPU would then compute in float32. The session optimises
when it is opened. What no optimiser does is done here: experts that nobody chose are left out
(`fused_experts`, `programs`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import onnx

from twotower.builders.base import DENSE, FUSED, KERNELS, BuildConfig, Report
from twotower.builders.cache import kernel_source
from twotower.builders.expert_cut import exported_cut
from twotower.builders.expert_kernels import (
    ASKED,
    DENSE_COST,
    Compile,
    ExpertChoice,
    compile_code,
    require_compiler,
)
from twotower.builders.ort.engine_weights import unsigned_data
from twotower.builders.ort.fusable import require_fusable
from twotower.builders.ort.fused_experts import fuse_experts
from twotower.builders.ort.programs import kernel_limits, require_programs, write_programs
from twotower.builders.segment import BundleGraphs
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineLimits,
    EngineRecord,
    ExpertsStep,
    file_records,
)
from twotower.config import LayerKind
from twotower.errors import BuildError
from twotower.kernels.compile import compile_kernels
from twotower.spec import CONTEXT_HEAD
from twotower.weights.external import attach_weights, weight_refs
from twotower.weights.refs import WeightRef

__all__ = ["OrtCudaBuilder", "OrtCudaPlan"]

CUDA = "ort-cuda"


class OrtCudaBuilder:
    """Builds the `ort-cuda` target: no GPU is needed, and nothing of the provider is guessed.

    Shapes stay free. The engine is tied to the version of ONNX Runtime all the same: a bundle is
    built and checked with the library it will run on.

    Args:
        library: Name and version of ONNX Runtime.
        compiler: What compiles the kernels of experts; None for Triton, which may be missing.
    """

    def __init__(self, library: dict[str, str], compiler: Compile | None = None) -> None:
        self._library, self._compiler = library, compiler

    def library(self) -> dict[str, str]:
        return dict(self._library)

    def asked(self, bundle: Bundle, config: BuildConfig) -> str:
        return ""

    def plan(self, bundle: Bundle, config: BuildConfig) -> OrtCudaPlan:
        return OrtCudaPlan(bundle, config, library=self.library(), compiler=self._compiler)


class OrtCudaPlan:
    """What one build makes of a bundle; see `BuildPlan`.

    Args:
        bundle: The graphs.
        config: What is asked for.
        library: Name and version of ONNX Runtime.
        compiler: What compiles the kernels of experts; None for Triton, which may be missing.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: BuildConfig,
        *,
        library: dict[str, str],
        compiler: Compile | None,
    ) -> None:
        self._bundle, self._config, self._library, self._compiler = (
            bundle,
            config,
            library,
            compiler,
        )
        self._graphs = BundleGraphs(bundle)

    def keeps(self, record: EngineRecord) -> bool:
        choice = self._choice
        if record.report.get("choice_of_experts") != choice.to_json():
            return False
        if choice.experts != KERNELS:
            return True
        sources = {about.get("source") for about in record.report["experts"].values()}
        return record.limits == self._limits and sources == {kernel_source()}

    def describe(self) -> list[str]:
        choice = self._choice
        graphs = (
            f"the three graphs in {self._bundle.dtype}, optimised when they are opened on the GPU"
        )
        if choice.why:
            return [graphs, f"{'experts':<22}dense: {choice.why}; {DENSE_COST}"]
        if choice.experts == KERNELS:
            self._require_compiler()
            limits = self._limits
            sms = ", ".join(map(str, limits.sms))
            return [
                graphs,
                f"{'experts':<22}kernels between programs for SM {sms}, {limits.max_batch} rows",
            ]
        if choice.experts != FUSED:
            return [graphs]
        copied = sum(ref.nbytes for ref in self._moved)
        data = f"; {copied / 1e9:.2f} GB of integers are written anew" if copied else ""
        return [
            graphs,
            f"{'experts':<22}one operator a layer, which computes the chosen ones{data}",
        ]

    @property
    def needed_bytes(self) -> int:
        graphs = sum(self._bundle.files[graph].size for graph in GRAPH_FILES.values())
        choice = self._choice
        if choice.experts == KERNELS:
            self._require_compiler()
        if choice.experts != FUSED:
            return graphs
        return graphs + sum(ref.nbytes for ref in self._moved)

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        self._bundle.require_weights("an engine of ONNX Runtime")
        started, choice = time.perf_counter(), self._choice
        if choice.experts == KERNELS:
            record = self._with_kernels(folder, report)
        else:
            record = self._whole(folder, report, fused=choice.experts == FUSED)
        seconds = round(time.perf_counter() - started, 3)
        facts = {"seconds": seconds, **record.report, "choice_of_experts": choice.to_json()}
        return replace(record, report=facts)

    def _whole(self, folder: Path, report: Report, *, fused: bool) -> EngineRecord:
        """Every graph in one piece."""
        bundle = self._bundle
        operators: dict[str, dict[str, int]] = {}
        holds: dict[str, str] = {}
        for step, name in enumerate(GRAPH_FILES):
            report(f"writing {name}", step, len(GRAPH_FILES))
            model = self._graphs.copied(name)
            moved = fuse_experts(model, self._experts_of(name)) if fused else {}
            _place_weights(bundle, model, moved, name=name, folder=folder, report=report)
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
            operators[name] = dict(Counter(n.op_type for n in model.graph.node).most_common())
            holds |= {name: bundle.data_identity(name)} if moved else {}
        return replace(
            self._record(),
            holds=holds,
            files=file_records(folder),
            report={"operators": operators},
        )

    def _with_kernels(self, folder: Path, report: Report) -> EngineRecord:
        """Programs, and kernels for the experts between them."""
        self._require_compiler()
        limits = self._limits
        written = write_programs(self._graphs, folder, report)
        files = file_records(folder)
        code, about = compile_code(
            written.experts,
            limits.sms,
            folder,
            max_batch=limits.max_batch,
            compiler=self._compiler or compile_kernels,
            report=report,
        )
        facts = {"operators": written.operators, "experts": about}
        return replace(
            self._record(),
            files=files | code,
            report=facts,
            limits=limits,
            steps=written.steps,
        )

    def _record(self) -> EngineRecord:
        """What is the same of all engines."""
        bundle = self._bundle
        return EngineRecord(
            target=CUDA,
            library=dict(self._library),
            dtype=bundle.dtype,
            graphs={name: bundle.program_identity(name) for name in GRAPH_FILES},
            weights={name: file + DATA_SUFFIX for name, file in GRAPH_FILES.items()},
            files={},
        )

    def _require_compiler(self) -> None:
        if self._compiler is None:
            require_compiler()

    @property
    def _limits(self) -> EngineLimits:
        return kernel_limits(self._bundle, self._config)

    @cached_property
    def _choice(self) -> ExpertChoice:
        """What computes the experts.

        Raises:
            BuildError: what was asked for cannot be had.
        """
        bundle, config = self._bundle, self._config
        if not bundle.config.indices(LayerKind.MOE):
            return ExpertChoice(DENSE)
        if config.experts == DENSE:
            return ExpertChoice(DENSE, ASKED)
        if config.experts == KERNELS:
            require_programs(self._graphs, self._limits)
            return ExpertChoice(KERNELS)
        try:
            for name in GRAPH_FILES:
                for step in self._experts_of(name):
                    require_fusable(step, self._library["version"])
        except BuildError as e:
            if config.experts == FUSED:
                raise
            why = f"{e.what} ({e.found}); --experts kernels takes every format"
            return ExpertChoice(DENSE, why)
        return ExpertChoice(FUSED)

    @cached_property
    def _moved(self) -> list[WeightRef]:
        """Weights that fused engines hold themselves, as they lie in the bundle."""
        out: list[WeightRef] = []
        for name in GRAPH_FILES:
            out += fuse_experts(self._graphs.copied(name), self._experts_of(name)).values()
        return out

    def _experts_of(self, name: str) -> list[ExpertsStep]:
        """The layers of experts of a graph."""
        if name == CONTEXT_HEAD:
            return []
        cut = exported_cut(self._graphs, name)
        return [cut.found(number) for number in range(cut.programs - 1)]


def _place_weights(
    bundle: Bundle,
    model: onnx.ModelProto,
    moved: Mapping[str, WeightRef],
    *,
    name: str,
    folder: Path,
    report: Report,
) -> None:
    """Says where a graph's weights lie, relative to the bundle.

    That is its data file, and one of the engine, which is written here.
    """
    data = GRAPH_FILES[name] + DATA_SUFFIX
    attach_weights(model, {w: ref for w, ref in weight_refs(model).items() if w not in moved}, data)
    if not moved:
        return
    total, done = sum(ref.nbytes for ref in moved.values()), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        report(f"writing experts of {name}", done, total)

    own = f"{name}{DATA_SUFFIX}"
    placed = unsigned_data(bundle.path / data, folder / own, moved, tick)
    attach_weights(model, placed, f"engines/{CUDA}/{own}")
