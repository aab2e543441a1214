"""ONNX Runtime on a CPU or a GPU: the weights stay where they are.

On a CPU the graph is optimised once and saved. Saving ONNX Runtime's own optimised model would copy every weight. Here the
weights are taken out of the graph first, so that optimisation sees structure only (it fuses the transposes into the products,
which is what matters), and the runtime maps the bundle's own data file. Half-width weights are the exception: a CPU has no
arithmetic for them, so they are widened to float32 into a data file of the engine.

For a GPU the graph stays as it was exported. Which fusions a provider knows, and between which operators a copy or a cast must
stand, is decided where the provider is: ONNX Runtime on this machine's CPU would insert casts around every half-width operator
that a CPU lacks, and a GPU would then compute in float32. The session optimises when it is opened.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort

from twotower.builders.base import BuildConfig, Report
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineRecord, FileRecord, hash_file
from twotower.errors import BuildError
from twotower.graph_files import attach_weights, detach_weights, load_graph, weight_refs, widen_data, widen_to_float32

__all__ = ["OrtCpuBuilder", "OrtCudaBuilder"]

CPU, CUDA = "ort-cpu", "ort-cuda"


class _OrtBuilder:
    """What both targets share: shapes stay free, so any sound engine fits any config."""

    def library(self) -> dict[str, str]:
        return {"name": "onnxruntime", "version": ort.__version__}

    def fits(self, record: EngineRecord, bundle: Bundle, config: BuildConfig) -> bool:
        return True


class OrtCpuBuilder(_OrtBuilder):
    """Builds the `ort-cpu` target."""

    def describe(self, bundle: Bundle, config: BuildConfig) -> list[str]:
        how = "weights stay in the bundle" if bundle.dtype == "float32" else f"weights widened from {bundle.dtype} to float32"
        return [f"three optimised graphs, {how}; any number of rows, any length"]

    def needed_bytes(self, bundle: Bundle, config: BuildConfig) -> int:
        if bundle.dtype == "float32":
            return sum(bundle.files[g].size for g in GRAPH_FILES.values())
        return 2 * sum(bundle.files[g + DATA_SUFFIX].size for g in GRAPH_FILES.values())

    def build(self, bundle: Bundle, folder: Path, config: BuildConfig, *, report: Report) -> EngineRecord:
        started = time.perf_counter()
        weights: dict[str, str] = {}
        operators: dict[str, dict[str, int]] = {}
        for step, name in enumerate(GRAPH_FILES):
            report(f"optimising {name}", step, len(GRAPH_FILES))
            weights[name], ops = self._build_graph(bundle, name, folder, report)
            operators[name] = dict(ops.most_common())
        return EngineRecord(
            target=CPU,
            library=self.library(),
            dtype="float32",
            graphs={name: bundle.graph_identity(name) for name in GRAPH_FILES},
            weights=weights,
            files=_written(folder),
            report={"seconds": round(time.perf_counter() - started, 3), "operators": operators, "widened_from": _widened_from(bundle)},
        )

    def _build_graph(self, bundle: Bundle, name: str, folder: Path, report: Report) -> tuple[str, Counter[str]]:
        """One engine file; returns the file of the bundle its weights lie in, and its operators."""
        model = load_graph(bundle.graph_file(name))
        refs = weight_refs(model)
        location = GRAPH_FILES[name] + DATA_SUFFIX
        if any(ref.dtype != "float32" for ref in refs.values()):
            wide = folder / f"{name}{DATA_SUFFIX}"
            total, done = sum(ref.nbytes for ref in refs.values()), 0

            def tick(count: int) -> None:
                nonlocal done
                done += count
                report(f"widening {name}", done, total)

            refs = widen_data(bundle.path / location, wide, refs, tick)
            location = f"engines/{CPU}/{wide.name}"
            widen_to_float32(model)
        detach_weights(model)
        optimised = _optimised(model, folder / f"{name}.onnx", name)
        attach_weights(optimised, refs, location)  # relative to the bundle: the runtime maps the file from there
        (folder / f"{name}.onnx").write_bytes(optimised.SerializeToString())
        return location, Counter(node.op_type for node in optimised.graph.node)


class OrtCudaBuilder(_OrtBuilder):
    """Builds the `ort-cuda` target: no GPU is needed, and nothing of the CUDA provider is asked or guessed.

    The engine is tied to the version of ONNX Runtime all the same: a bundle is built and checked with the library it will run on.
    """

    def describe(self, bundle: Bundle, config: BuildConfig) -> list[str]:
        return [f"the three graphs as they are, in {bundle.dtype}; optimised when they are opened on the GPU"]

    def needed_bytes(self, bundle: Bundle, config: BuildConfig) -> int:
        return sum(bundle.files[graph].size for graph in GRAPH_FILES.values())

    def build(self, bundle: Bundle, folder: Path, config: BuildConfig, *, report: Report) -> EngineRecord:
        started = time.perf_counter()
        operators: dict[str, dict[str, int]] = {}
        for step, (name, file) in enumerate(GRAPH_FILES.items()):
            report(f"writing {name}", step, len(GRAPH_FILES))
            model = load_graph(bundle.graph_file(name))
            attach_weights(model, weight_refs(model), file + DATA_SUFFIX)  # relative to the bundle: the runtime reads the file from there
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
            operators[name] = dict(Counter(node.op_type for node in model.graph.node).most_common())
        return EngineRecord(
            target=CUDA,
            library=self.library(),
            dtype=bundle.dtype,
            graphs={name: bundle.graph_identity(name) for name in GRAPH_FILES},
            weights={name: file + DATA_SUFFIX for name, file in GRAPH_FILES.items()},
            files=_written(folder),
            report={"seconds": round(time.perf_counter() - started, 3), "operators": operators},
        )


def _written(folder: Path) -> dict[str, FileRecord]:
    return {p.name: FileRecord(p.stat().st_size, hash_file(p)) for p in sorted(folder.iterdir())}


def _optimised(model: onnx.ModelProto, scratch: Path, name: str) -> onnx.ModelProto:
    options = ort.SessionOptions()
    # "Extended" and not "all": the last level lays data out for the CPU at hand, and the engine may run on another.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(scratch)
    options.log_severity_level = 3
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BuildError(
            f"ONNX Runtime {ort.__version__} refuses the {name} graph",
            found=str(e),
            do="use the ONNX Runtime this version of twotower asks for",
        ) from e
    return load_graph(scratch)


def _widened_from(bundle: Bundle) -> str | None:
    return None if bundle.dtype == "float32" else bundle.dtype
