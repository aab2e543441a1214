"""ONNX Runtime on a CPU: the weights stay where they are.

The graph is optimised once and saved. Saving ONNX Runtime's own optimised model would copy every
weight. Here the weights are taken out of the graph first, so that optimisation sees structure only
(it fuses the transposes into the products, which is what matters), and the runtime maps the
bundle's own data file. Exceptions go into a data file of the engine: half-precision weights,
because a CPU has no arithmetic for them; 4-bit floats, which ONNX Runtime has no kernel for; and
quantized integers, which its products read in another form (`quantized_products`). Of the experts
only those are computed, and read, that a token chose (`chosen_experts`), unless the graph is wanted
as it was exported: then quantized weights stay in the bundle and every pass expands them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from functools import cache, cached_property
from pathlib import Path

import onnx

from twotower.builders.base import STANDARD, BuildConfig, Report, engine_record
from twotower.builders.ort.chosen_experts import Located, choose_experts, stacked_places
from twotower.builders.ort.cpu_graph import (
    choose_by_topk,
    compute_rows_alike,
    expand_float4,
    hide_dequantization,
    show_dequantization,
)
from twotower.builders.ort.cuda import CUDA, OrtBuilder, OrtCudaPlan
from twotower.builders.ort.engine_weights import EngineWeight, cpu_weights, write_engine_data
from twotower.builders.ort.nodes import with_branches
from twotower.builders.ort.quantized_products import (
    UNSIGNED,
    as_matrices,
    probe_graph,
    read_as_stored,
)
from twotower.builders.segment import BundleGraphs
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineRecord,
    FileRecord,
    engine_folder,
    file_records,
)
from twotower.errors import BuildError
from twotower.files import byte_counter
from twotower.onnx_runtime import ort, session_options
from twotower.processors import usable_memory
from twotower.product_probe import PROBE_FILE, rows_are_alike
from twotower.spec import DENOISER
from twotower.weights.external import (
    attach_weights,
    detach_weights,
    load_graph,
    located_weights,
    widen_to_float32,
)
from twotower.weights.refs import WeightRef

CPU = "ort-cpu"
PACKED, MAPPED = "packed", "mapped"
AS_STORED, EXPANDED = "as stored", "expanded"

_SHARE_OF_MEMORY = 2


def make_builder(target: str) -> OrtBuilder:
    """The builder of `ort-cpu` or `ort-cuda` engines for the installed ONNX Runtime."""
    plans = {CPU: OrtCpuPlan, CUDA: OrtCudaPlan}
    return OrtBuilder({"name": "onnxruntime", "version": ort.__version__}, plans[target])


class OrtCpuPlan:
    """What one build makes of a bundle: any sound engine of the dialect fits; see `BuildPlan`."""

    def __init__(self, bundle: Bundle, config: BuildConfig, library: dict[str, str]) -> None:
        self._bundle, self._graphs, self._library = bundle, BundleGraphs(bundle), library
        self._dialect, self._is_standard = config.dialect, config.dialect == STANDARD

    @cached_property
    def _form(self) -> dict[str, str]:
        """What suits the bundle on this machine, as the record has it.

        `products` of quantized weights are `as stored`, or `expanded` by every pass; empty where
        there are none. `experts` are `packed` or `mapped`, see `experts_are_packed`; empty where
        every expert computes every token.
        """
        if self._is_standard:
            return {"products": EXPANDED if self._bundle.quantization else "", "experts": ""}
        refs = [ref for name in GRAPH_FILES for ref in self._bundle.weights(name).values()]
        products = ""
        if any(ref.dtype in UNSIGNED for ref in refs):
            products = AS_STORED if _products_compute_rows_alike() else EXPANDED
        wide = sum(4 * math.prod(r.shape) if r.half_precision else r.nbytes for r in refs)
        packed = experts_are_packed(wide, usable_memory())
        return {"products": products, "experts": PACKED if packed else MAPPED}

    @cached_property
    def _weights(self) -> dict[str, dict[str, EngineWeight]]:
        """By graph, what becomes of its weights."""
        as_stored = self._form["products"] == AS_STORED
        out = {}
        for name in GRAPH_FILES:
            graph = self._graphs.shared(name)
            out[name] = cpu_weights(graph, as_stored=as_stored, even_rows=name == DENOISER)
        return out

    def keeps(self, record: EngineRecord) -> bool:
        report = record.report
        return report.get("dialect") == self._dialect and report.get("form") == self._form

    def describe(self) -> list[str]:
        dtype = self._bundle.dtype
        how = "weights stay in the bundle"
        if dtype != "float32":
            how = f"weights widened from {dtype} to float32"
        if self._bundle.quantization is not None:
            quantized = "quantized ones are expanded by every pass"
            if self._form["products"] == AS_STORED:
                quantized = "quantized integers are multiplied as they are stored"
            how = f"{how}; {quantized}, 4-bit floats are expanded once"
        experts = "of experts only the chosen ones compute"
        if self._is_standard:
            experts = "every expert computes every token"
        return [f"three optimised graphs, {how}; {experts}; any number of rows, any length"]

    @property
    def needed_bytes(self) -> int:
        written = sum(w.written for weights in self._weights.values() for w in weights.values())
        return written + sum(self._bundle.files[graph].size for graph in GRAPH_FILES.values())

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        bundle = self._bundle
        bundle.require_weights("an engine of ONNX Runtime")
        started = time.perf_counter()
        written: dict[str, FileRecord] = {}
        weights: dict[str, str] = {}
        holds: dict[str, str] = {}
        operators: dict[str, dict[str, int]] = {}
        for step, name in enumerate(GRAPH_FILES):
            report(f"optimising {name}", step, len(GRAPH_FILES))
            data, own = GRAPH_FILES[name] + DATA_SUFFIX, f"{name}{DATA_SUFFIX}"
            located, record = self._place_weights(name, folder / own, report)
            weights[name] = data
            if record is not None:
                weights[name], written[own] = f"engines/{CPU}/{own}", record
                holds[name] = bundle.data_identity(name)
            counts = write_engine(
                self._graphs.copied(name),
                located,
                folder / f"{name}.onnx",
                name=name,
                top=None if self._is_standard else bundle.config.num_experts_per_tok,
                packed=self._form["experts"] == PACKED,
            )
            operators[name] = dict(counts.most_common())
        if any("MatMulNBits" in counts for counts in operators.values()):
            (folder / PROBE_FILE).write_bytes(probe_graph())
        return engine_record(
            bundle,
            CPU,
            self._library,
            dtype="float32",
            weights=weights,
            holds=holds,
            files=file_records(folder, written),
            report={
                "seconds": round(time.perf_counter() - started, 3),
                "operators": operators,
                "widened_from": None if bundle.dtype == "float32" else bundle.dtype,
                "dialect": self._dialect,
                "form": self._form,
            },
        )

    def _place_weights(
        self, name: str, own: Path, report: Report
    ) -> tuple[dict[str, tuple[str, WeightRef]], FileRecord | None]:
        """Writes what the engine of a graph keeps itself, if anything, and says where each lies."""
        data, weights = GRAPH_FILES[name] + DATA_SUFFIX, self._weights[name]
        located = {}
        for weight, made in weights.items():
            if not made.stored and not made.dropped:
                located[weight] = (data, made.ref)
        if not any(made.stored for made in weights.values()):
            return located, None
        total = sum(made.written for made in weights.values())
        tick = byte_counter(report, f"writing weights of {name}", total)
        places, record = write_engine_data(
            self._bundle.path / data,
            own,
            weights,
            tick,
        )
        for weight, ref in places.items():
            located[weight] = (f"engines/{CPU}/{own.name}", ref)
        return located, record


def experts_are_packed(weight_bytes: int, memory: int) -> bool:
    """Whether experts are packed for the product when an engine is opened.

    That is twice as fast, and a copy in anonymous memory. They are where all weights take half of
    the memory or less; else they are read where they lie, in the mapped file. All other matrices
    always are packed. A packed product is cut into sums of its own in one way only; one that is not
    packed in a way that depends on the columns each thread computes, where these are fewer than
    128: a router has so few, an expert has not.
    """
    return _SHARE_OF_MEMORY * weight_bytes <= memory


@cache
def _products_compute_rows_alike() -> bool:
    return rows_are_alike(probe_graph())


def write_engine(
    model: onnx.ModelProto,
    located: Located,
    path: Path,
    *,
    name: str,
    top: int | None = None,
    packed: bool = True,
) -> Counter[str]:
    """Optimises a graph for a CPU and writes it; its weights stay where they are.

    Args:
        model: The graph as it was recorded; changed.
        located: For each of its weights the file, relative to the folder the engine will be opened
            with, and the place in it: float32, and quantized types ONNX Runtime reads. 4-bit floats
            are expected expanded, and integers that products read as they are stored unsigned,
            under the weight's name.
        path: The file to write.
        name: Of the graph, for errors.
        top: Experts a token chooses, to compute only those; None for the graph as it was recorded,
            in which all compute.
        packed: Whether experts are packed for the product when the engine is opened.

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
        choose_by_topk(optimised)
        located = choose_experts(optimised, located, top, matrices=packed)
        located = read_as_stored(optimised, located)
    unpacked = set()
    by_file: dict[str, dict[str, WeightRef]] = {}
    for weight, (file, ref) in located.items():
        by_file.setdefault(file, {})[weight] = ref
        if len(ref.shape) != 2 or ref.dtype != "float32":
            unpacked.add(weight)
    compute_rows_alike(optimised, unpacked)
    for file, refs in by_file.items():
        attach_weights(optimised, refs, file)
    path.write_bytes(optimised.SerializeToString())
    return Counter(node.op_type for graph in with_branches(optimised.graph) for node in graph.node)


def engine_places(bundle: Bundle, name: str) -> dict[str, tuple[str, WeightRef]]:
    """Place of each weight in a built engine, with its file relative to the bundle."""
    model = load_graph(engine_folder(bundle, CPU) / f"{name}.onnx")
    return stacked_places(as_matrices(model, located_weights(model)))


def _optimised(model: onnx.ModelProto, scratch: Path, name: str) -> onnx.ModelProto:
    options = session_options()
    # "Extended" and not "all": the last level lays data out for the CPU at hand, and the engine may
    # run on another.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(scratch)
    # Inputs are quantized where the graph says, and products stay float32.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise BuildError(
            f"ONNX Runtime {ort.__version__} refuses the {name} graph",
            found=str(e),
            do="use the ONNX Runtime this version of twotower asks for",
        ) from e
    return load_graph(scratch)
