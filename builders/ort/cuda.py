"""ONNX Runtime on a GPU: the exported graphs, with experts fused, between programs, or as they are.

Weights stay in the bundle's data files.

Which fusions the CUDA provider knows, and between which operators a copy or a cast must stand, is
decided where the provider is: ONNX Runtime on this machine's CPU would insert casts around every
half-precision operator that a CPU lacks, and a GPU would then compute in float32. The session
optimises when it is opened. What no optimiser does is done here: experts that nobody chose are left
out. They are one operator a layer (`fused_experts`), or our kernels between programs: the list of
steps is then that of the TensorRT targets, and each program is a graph of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import (
    DENSE,
    FUSED,
    KERNELS,
    BuildConfig,
    BuildPlan,
    Report,
    engine_record,
)
from twotower.builders.cache import kernel_source
from twotower.builders.expert_cut import ExpertCut, experts_of, exported_cut
from twotower.builders.expert_kernels import (
    ASKED,
    DENSE_COST,
    Compile,
    ExpertChoice,
    compile_code,
    require_compiler,
    require_kernels,
)
from twotower.builders.ort.engine_weights import EngineWeight, write_engine_data
from twotower.builders.ort.fusable import require_fusable
from twotower.builders.ort.fused_experts import fuse_experts
from twotower.builders.ort.quantized_products import UNSIGNED
from twotower.builders.profiles import cache_capacity
from twotower.builders.segment import BundleGraphs, Segment
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineFile,
    EngineLimits,
    EngineRecord,
    ExpertsStep,
    FileRecord,
    Step,
    file_records,
)
from twotower.config import LayerKind
from twotower.dtypes import DTYPES
from twotower.errors import BuildError
from twotower.files import byte_counter
from twotower.hardware import probe_machine
from twotower.kernels.compile import compile_kernels
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.spec import CONTEXT_HEAD
from twotower.units import format_bytes
from twotower.weights.external import attach_weights, weight_refs
from twotower.weights.refs import WeightRef

CUDA = "ort-cuda"


class OrtBuilder:
    """Builds a target of ONNX Runtime, for a GPU without one: shapes stay free.

    The engine is tied to the version of the library: a bundle is built and checked with the one it
    will run on. `make_plan` is `OrtCpuPlan` or `OrtCudaPlan`.
    """

    def __init__(self, library: dict[str, str], make_plan: Callable[..., BuildPlan]) -> None:
        self._library, self._make_plan = library, make_plan

    def library(self) -> dict[str, str]:
        return self._library

    def asked(self, bundle: Bundle, config: BuildConfig) -> str:
        return ""

    def plan(self, bundle: Bundle, config: BuildConfig) -> BuildPlan:
        return self._make_plan(bundle, config, self._library)


class OrtCudaPlan:
    """What one build makes of a bundle; see `BuildPlan`.

    The `compiler` of expert kernels is Triton if None.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: BuildConfig,
        library: dict[str, str],
        *,
        compiler: Compile | None = None,
    ) -> None:
        self._bundle, self._config = bundle, config
        self._library, self._compiler = library, compiler
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
        lines = [f"the three graphs in {self._bundle.dtype}, optimised when opened on the GPU"]
        experts = ""
        if choice.why:
            experts = f"dense: {choice.why}; {DENSE_COST}"
        elif choice.experts == KERNELS:
            require_compiler(self._compiler)
            sms = ", ".join(map(str, self._limits.sms))
            experts = f"kernels between programs for SM {sms}, {self._limits.max_batch} rows"
        elif choice.experts == FUSED:
            experts = "one operator a layer, which computes the chosen ones"
            if self._moved:
                copied = sum(ref.nbytes for ref in self._moved)
                experts += f"; {format_bytes(copied)} of integers are written anew"
        if experts:
            return [*lines, f"{'experts':<22}{experts}"]
        return lines

    @property
    def needed_bytes(self) -> int:
        graphs = sum(self._bundle.files[graph].size for graph in GRAPH_FILES.values())
        if self._choice.experts == KERNELS:
            require_compiler(self._compiler)
        if self._choice.experts == FUSED:
            graphs += sum(ref.nbytes for ref in self._moved)
        return graphs

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        self._bundle.require_weights("an engine of ONNX Runtime")
        started, choice = time.perf_counter(), self._choice
        if choice.experts == KERNELS:
            facts = self._with_kernels(folder, report)
        else:
            facts = self._whole(folder, report, fused=choice.experts == FUSED)
        seconds = round(time.perf_counter() - started, 3)
        told = {
            "seconds": seconds,
            **facts["report"],
            "choice_of_experts": choice.to_json(),
        }
        return engine_record(
            self._bundle,
            CUDA,
            self._library,
            **{**facts, "report": told},
        )

    def _whole(self, folder: Path, report: Report, *, fused: bool) -> dict[str, Any]:
        """Writes every graph in one piece; what the record says of them."""
        operators: dict[str, dict[str, int]] = {}
        holds: dict[str, str] = {}
        written: dict[str, FileRecord] = {}
        for step, name in enumerate(GRAPH_FILES):
            report(f"writing {name}", step, len(GRAPH_FILES))
            model = self._graphs.copied(name)
            moved = fuse_experts(model, self._experts_of(name)) if fused else {}
            refs = weight_refs(model)
            kept = {weight: ref for weight, ref in refs.items() if weight not in moved}
            attach_weights(model, kept, GRAPH_FILES[name] + DATA_SUFFIX)
            if moved:
                own = f"{name}{DATA_SUFFIX}"
                places, written[own] = self._write_unsigned(name, moved, folder / own, report)
                attach_weights(
                    model,
                    places,
                    f"engines/{CUDA}/{own}",
                )
                holds[name] = self._bundle.data_identity(name)
            operators[name] = _write_graph(model, folder / f"{name}.onnx")
        files = file_records(folder, written)
        return {"holds": holds, "files": files, "report": {"operators": operators}}

    def _write_unsigned(
        self, name: str, moved: dict[str, WeightRef], path: Path, report: Report
    ) -> tuple[dict[str, WeightRef], FileRecord]:
        """Writes integers as the fused operators read them; their places, as bytes."""
        weights = {weight: EngineWeight(ref, UNSIGNED[ref.dtype]) for weight, ref in moved.items()}
        tick = byte_counter(
            report, f"writing experts of {name}", sum(ref.nbytes for ref in moved.values())
        )
        source = self._bundle.data_file(name)
        places, record = write_engine_data(source, path, weights, tick)
        for weight, ref in places.items():
            columns = ref.shape[-1] * DTYPES[ref.dtype].bits // 8
            places[weight] = replace(
                ref,
                dtype="uint8",
                shape=(*ref.shape[:-1], columns),
            )
        return places, record

    def _with_kernels(self, folder: Path, report: Report) -> dict[str, Any]:
        """Writes programs, and kernels for the experts between them; what the record says."""
        require_compiler(self._compiler)
        limits = self._limits
        steps: dict[str, tuple[Step, ...]] = {}
        operators: dict[str, dict[str, int]] = {}
        for name in GRAPH_FILES:
            steps[name] = tuple(self._write_programs(name, folder, operators, report))
        every = [step for some in steps.values() for step in some]
        about = compile_code(
            [step for step in every if isinstance(step, ExpertsStep)],
            limits.sms,
            folder,
            max_batch=limits.max_batch,
            compiler=self._compiler or compile_kernels,
            report=report,
        )
        facts = {"operators": operators, "experts": about}
        files = file_records(folder)
        return {"files": files, "report": facts, "limits": limits, "steps": steps}

    def _write_programs(
        self, name: str, folder: Path, operators: dict[str, dict[str, int]], report: Report
    ) -> list[Step]:
        """Writes a graph's programs and notes operators by file; its steps."""
        cut = self._cut(name)
        count = 1 if cut is None else cut.programs
        steps: list[Step] = []
        for number in range(count):
            file = f"{name}.onnx" if count == 1 else f"{name}.{number}.onnx"
            report(f"writing {file}", number, count)
            if cut is None:
                model, signature = self._graphs.copied(name), self._bundle.signatures[name]
                layers = (0, len(self._bundle.config.layers))
                made = Segment(model, layers, signature.inputs, signature.outputs)
            else:
                made = cut.program(number)
            weights = weight_refs(made.model)
            attach_weights(made.model, weights, GRAPH_FILES[name] + DATA_SUFFIX)
            operators[file] = _write_graph(made.model, folder / file)
            step = EngineFile(
                file, made.layers, made.inputs, made.outputs, (), constants=tuple(weights)
            )
            steps.append(step)
            if cut is not None and number < count - 1:
                steps.append(cut.experts(number))
        return steps

    @property
    def _limits(self) -> EngineLimits:
        return kernel_limits(self._bundle, self._config)

    @cached_property
    def _choice(self) -> ExpertChoice:
        """What computes the experts; BuildError if the option cannot be met."""
        bundle, config = self._bundle, self._config
        if not bundle.config.indices(LayerKind.MOE):
            return ExpertChoice(DENSE)
        if config.experts == DENSE:
            return ExpertChoice(DENSE, ASKED)
        if config.experts == KERNELS:
            limits = self._limits
            for step in experts_of(self._graphs):
                require_kernels(step, limits.sms, max_batch=limits.max_batch)
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
        cut = self._cut(name)
        if cut is None:
            return []
        return [cut.found(number) for number in range(cut.programs - 1)]

    def _cut(self, name: str) -> ExpertCut | None:
        """A tower's cut at its experts; None for the head, which has no layers."""
        if name == CONTEXT_HEAD:
            return None
        return exported_cut(self._graphs, name)


def kernel_limits(bundle: Bundle, config: BuildConfig) -> EngineLimits:
    """What kernels fix: rows, and GPUs (those at hand, or all supported); any text length."""
    longest = bundle.config.max_position_embeddings
    capacity = cache_capacity(config.max_context or longest, longest)
    here = tuple(sorted({gpu.sm for gpu in probe_machine().gpus}.intersection(BUILDABLE_SMS)))
    return EngineLimits(capacity, config.max_batch, config.sms or here or BUILDABLE_SMS)


def _write_graph(model: onnx.ModelProto, path: Path) -> dict[str, int]:
    """Writes a graph; how many operators of each kind it has, the most frequent first."""
    path.write_bytes(model.SerializeToString())
    return dict(Counter(node.op_type for node in model.graph.node).most_common())
