"""ONNX Runtime on a CPU: the weights stay where they are.

The graph is optimised once and saved. Saving ONNX Runtime's own optimised model would copy every weight. Here the
weights are taken out of the graph first, so that optimisation sees structure only (it fuses the transposes into the products,
which is what matters), and the runtime maps the bundle's own data file. Half-width weights are the exception: a CPU has no
arithmetic for them, so they are widened to float32 into a data file of the engine. Quantized weights stay in the bundle and are expanded
by each pass, but for 4-bit floats, which ONNX Runtime has no kernel for: those are expanded into the engine's file. Of the experts
only those are computed, and read, that a token chose (`ort_experts`), unless the graph is wanted as it was exported.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx

from twotower.builders.base import STANDARD, BuildConfig, Report
from twotower.builders.ort_cuda import OrtCudaBuilder
from twotower.builders.ort_experts import choose_experts, stacked_places
from twotower.builders.ort_products import PACK_BELOW_BYTES, compute_rows_alike, with_branches
from twotower.builders.ort_weights import expand_data, expand_float4, hide_dequantization, places_of, show_dequantization
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineRecord, engine_folder, file_records
from twotower.config.formats import BITS
from twotower.config.weights import WeightRef
from twotower.errors import BuildError
from twotower.graph_files import attach_weights, detach_weights, load_graph, located_weights, widen_to_float32
from twotower.onnx_runtime import ort, session_options

__all__ = ["OrtCpuBuilder", "engine_places", "make_cuda_builder", "write_engine"]

CPU = "ort-cpu"


def make_cuda_builder() -> OrtCudaBuilder:
    """The builder of `ort-cuda` engines for the installed ONNX Runtime."""
    return OrtCudaBuilder(_library())


class OrtCpuBuilder:
    """Builds the `ort-cpu` target: shapes stay free, so any sound engine of the dialect fits any config."""

    def library(self) -> dict[str, str]:
        return _library()

    def fits(self, record: EngineRecord, bundle: Bundle, config: BuildConfig) -> bool:
        return bool(record.report.get("dialect") == config.dialect)

    def describe(self, bundle: Bundle, config: BuildConfig) -> list[str]:
        how = "weights stay in the bundle" if bundle.dtype == "float32" else f"weights widened from {bundle.dtype} to float32"
        if bundle.quantization is not None:
            how = f"{how}; quantized ones stay as they are and every pass expands them, 4-bit floats are expanded once"
        experts = "every expert computes every token" if config.dialect == STANDARD else "of experts only the chosen ones compute"
        return [f"three optimised graphs, {how}; {experts}; any number of rows, any length"]

    def needed_bytes(self, bundle: Bundle, config: BuildConfig) -> int:
        written = sum(place.written for name in GRAPH_FILES for place in places_of(load_graph(bundle.graph_file(name))).values())
        return written + sum(bundle.files[graph].size for graph in GRAPH_FILES.values())

    def build(self, bundle: Bundle, folder: Path, config: BuildConfig, *, report: Report) -> EngineRecord:
        bundle.require_weights("an engine of ONNX Runtime")
        started = time.perf_counter()
        weights: dict[str, str] = {}
        operators: dict[str, dict[str, int]] = {}
        for step, name in enumerate(GRAPH_FILES):
            report(f"optimising {name}", step, len(GRAPH_FILES))
            weights[name], ops = self._build_graph(bundle, name, folder, config, report)
            operators[name] = dict(ops.most_common())
        return EngineRecord(
            target=CPU,
            library=self.library(),
            dtype="float32",
            graphs={name: bundle.program_identity(name) for name in GRAPH_FILES},
            weights=weights,
            holds={name: bundle.data_identity(name) for name, file in weights.items() if file.startswith("engines/")},
            files=file_records(folder),
            report={
                "seconds": round(time.perf_counter() - started, 3),
                "operators": operators,
                "widened_from": _widened_from(bundle),
                "dialect": config.dialect,
            },
        )

    def _build_graph(self, bundle: Bundle, name: str, folder: Path, config: BuildConfig, report: Report) -> tuple[str, Counter[str]]:
        """One engine file; returns the file of the bundle its weights lie in, and its operators."""
        model = load_graph(bundle.graph_file(name))
        places = places_of(model)
        own, data = f"engines/{CPU}/{name}{DATA_SUFFIX}", GRAPH_FILES[name] + DATA_SUFFIX
        located = {weight: (data, place.ref) for weight, place in places.items() if not place.written and not place.dropped}
        if any(place.written for place in places.values()):
            total, done = sum(place.written for place in places.values()), 0

            def tick(count: int) -> None:
                nonlocal done
                done += count
                report(f"widening {name}", done, total)

            written = expand_data(bundle.path / data, folder / f"{name}{DATA_SUFFIX}", places, tick)
            located |= {weight: (own, ref) for weight, ref in written.items()}
        top = None if config.dialect == STANDARD else bundle.config.num_experts_per_tok
        operators = write_engine(model, located, folder / f"{name}.onnx", name, top=top)
        return own if (folder / f"{name}{DATA_SUFFIX}").is_file() else data, operators


def write_engine(
    model: onnx.ModelProto, located: Mapping[str, tuple[str, WeightRef]], path: Path, name: str, *, top: int | None = None
) -> Counter[str]:
    """Optimises a graph for a CPU and writes it; its weights stay where they are.

    Args:
        model: The graph as it was recorded; changed.
        located: For each of its weights the file, relative to the folder the engine will be opened with, and the place in it: float32, and
            quantized types ONNX Runtime reads. 4-bit floats are expected expanded, under the weight's name.
        path: The file to write.
        name: Of the graph, for errors.
        top: Experts a token chooses, to compute only those; None for the graph as it was recorded, in which all compute.

    Returns:
        How many operators of each kind it has, branches included.
    """
    widen_to_float32(model)
    expand_float4(model)
    hidden = hide_dequantization(model)
    detach_weights(model)
    optimised = _optimised(model, path, name)
    show_dequantization(optimised, hidden)
    if top is not None:
        small = sum(ref.nbytes for _, ref in located.values()) < PACK_BELOW_BYTES
        located = choose_experts(optimised, located, top, matrices=small)
    compute_rows_alike(optimised, [w for w, (_, ref) in located.items() if len(ref.shape) != 2 or ref.dtype in BITS])
    for location in {location for location, _ in located.values()}:
        attach_weights(optimised, {w: ref for w, (where, ref) in located.items() if where == location}, location)
    path.write_bytes(optimised.SerializeToString())
    return Counter(node.op_type for graph in with_branches(optimised.graph) for node in graph.node)


def engine_places(bundle: Bundle, name: str) -> dict[str, tuple[str, WeightRef]]:
    """Where the weights of a built engine lie: by name in the exported graph the file, relative to the bundle, and the place in it."""
    return stacked_places(located_weights(load_graph(engine_folder(bundle, CPU) / f"{name}.onnx")))


def _optimised(model: onnx.ModelProto, scratch: Path, name: str) -> onnx.ModelProto:
    options = session_options()
    # "Extended" and not "all": the last level lays data out for the CPU at hand, and the engine may run on another.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(scratch)
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # inputs are rounded where the graph says, and products stay float32
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BuildError(
            f"ONNX Runtime {ort.__version__} refuses the {name} graph",
            found=str(e),
            do="use the ONNX Runtime this version of twotower asks for",
        ) from e
    return load_graph(scratch)


def _library() -> dict[str, str]:
    return {"name": "onnxruntime", "version": ort.__version__}


def _widened_from(bundle: Bundle) -> str | None:
    return None if bundle.dtype == "float32" else bundle.dtype
