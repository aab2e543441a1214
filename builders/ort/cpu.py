"""ONNX Runtime on a CPU: the weights stay where they are.

The graph is optimised once and saved. Saving ONNX Runtime's own optimised model would copy every
weight. Here the weights are taken out of the graph first, so that optimisation sees structure only
(it fuses the transposes into the products, which is what matters), and the runtime maps the
bundle's own data file. Exceptions go into a data file of the engine: half-width weights, because a
CPU has no arithmetic for them; 4-bit floats, which ONNX Runtime has no kernel for; and integers in
few bits, which its products read in another form (`few_bits`). Of the experts only those are
computed, and read, that a token chose (`chosen_experts`), unless the graph is wanted as it was
exported: then quantized weights stay in the bundle and every pass expands them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import onnx

from twotower.builders.base import STANDARD, BuildConfig, Report
from twotower.builders.ort.chosen_experts import choose_experts, stacked_places
from twotower.builders.ort.cuda import OrtCudaBuilder
from twotower.builders.ort.engine_weights import (
    Place,
    expand_data,
    expand_float4,
    hide_dequantization,
    places_of,
    show_dequantization,
)
from twotower.builders.ort.few_bits import UNSIGNED, from_blocks, probe_graph, read_as_stored
from twotower.builders.ort.products import compute_rows_alike, experts_are_packed, with_branches
from twotower.builders.ort.routing import choose_by_topk
from twotower.builders.segment import BundleGraphs
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineRecord,
    engine_folder,
    file_records,
)
from twotower.errors import BuildError
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

__all__ = ["OrtCpuBuilder", "OrtCpuPlan", "engine_places", "make_cuda_builder", "write_engine"]

CPU = "ort-cpu"
PACKED, MAPPED = "packed", "mapped"
AS_STORED, EXPANDED = "as stored", "expanded"

Located = Mapping[str, tuple[str, WeightRef]]


def make_cuda_builder() -> OrtCudaBuilder:
    """The builder of `ort-cuda` engines for the installed ONNX Runtime."""
    return OrtCudaBuilder(_library())


class OrtCpuBuilder:
    """Builds the `ort-cpu` target: shapes stay free, so any sound engine of the dialect fits any config."""

    def library(self) -> dict[str, str]:
        return _library()

    def asked(self, bundle: Bundle, config: BuildConfig) -> str:
        return ""

    def plan(self, bundle: Bundle, config: BuildConfig) -> OrtCpuPlan:
        return OrtCpuPlan(bundle, config)


class OrtCpuPlan:
    """What one build makes of a bundle; see `BuildPlan`.

    Args:
        bundle: The graphs.
        config: What is asked for.
    """

    def __init__(self, bundle: Bundle, config: BuildConfig) -> None:
        self._bundle, self._config, self._graphs = bundle, config, BundleGraphs(bundle)

    @cached_property
    def _form(self) -> _Form:
        return _form_of(self._bundle, self._config)

    @cached_property
    def _places(self) -> dict[str, dict[str, Place]]:
        """By graph, what becomes of its weights."""
        as_stored = self._form.products == AS_STORED
        return {
            name: places_of(
                self._graphs.shared(name), as_stored=as_stored, even_rows=name == DENOISER
            )
            for name in GRAPH_FILES
        }

    def keeps(self, record: EngineRecord) -> bool:
        return bool(
            record.report.get("dialect") == self._config.dialect
            and record.report.get("form") == self._form.to_json()
        )

    def describe(self) -> list[str]:
        bundle = self._bundle
        how = (
            "weights stay in the bundle"
            if bundle.dtype == "float32"
            else f"weights widened from {bundle.dtype} to float32"
        )
        if bundle.quantization is not None:
            as_stored = self._form.products == AS_STORED
            few = (
                "integers in few bits are multiplied as they are stored"
                if as_stored
                else "quantized ones are expanded by every pass"
            )
            how = f"{how}; {few}, 4-bit floats are expanded once"
        standard = self._config.dialect == STANDARD
        experts = (
            "every expert computes every token"
            if standard
            else "of experts only the chosen ones compute"
        )
        return [f"three optimised graphs, {how}; {experts}; any number of rows, any length"]

    @property
    def needed_bytes(self) -> int:
        written = sum(
            place.written for places in self._places.values() for place in places.values()
        )
        return written + sum(self._bundle.files[graph].size for graph in GRAPH_FILES.values())

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        bundle = self._bundle
        bundle.require_weights("an engine of ONNX Runtime")
        started = time.perf_counter()
        weights: dict[str, str] = {}
        operators: dict[str, dict[str, int]] = {}
        for step, name in enumerate(GRAPH_FILES):
            report(f"optimising {name}", step, len(GRAPH_FILES))
            weights[name], ops = self._build_graph(name, folder, report)
            operators[name] = dict(ops.most_common())
        if any("MatMulNBits" in counts for counts in operators.values()):
            (folder / PROBE_FILE).write_bytes(probe_graph())
        return EngineRecord(
            target=CPU,
            library=_library(),
            dtype="float32",
            graphs={name: bundle.program_identity(name) for name in GRAPH_FILES},
            weights=weights,
            holds={
                name: bundle.data_identity(name)
                for name, file in weights.items()
                if file.startswith("engines/")
            },
            files=file_records(folder),
            report={
                "seconds": round(time.perf_counter() - started, 3),
                "operators": operators,
                "widened_from": _widened_from(bundle),
                "dialect": self._config.dialect,
                "form": self._form.to_json(),
            },
        )

    def _build_graph(self, name: str, folder: Path, report: Report) -> tuple[str, Counter[str]]:
        """One engine file; returns the file of the bundle its weights lie in, and its operators."""
        bundle, places = self._bundle, self._places[name]
        own, data = f"engines/{CPU}/{name}{DATA_SUFFIX}", GRAPH_FILES[name] + DATA_SUFFIX
        located = {
            weight: (data, place.ref)
            for weight, place in places.items()
            if not place.stored and not place.dropped
        }
        if any(place.stored for place in places.values()):
            total, done = sum(place.written for place in places.values()), 0

            def tick(count: int) -> None:
                nonlocal done
                done += count
                report(f"writing weights of {name}", done, total)

            written = expand_data(bundle.path / data, folder / f"{name}{DATA_SUFFIX}", places, tick)
            located |= {weight: (own, ref) for weight, ref in written.items()}
        top = None if self._config.dialect == STANDARD else bundle.config.num_experts_per_tok
        packed = self._form.experts == PACKED
        model = self._graphs.copied(name)
        operators = write_engine(
            model, located, folder / f"{name}.onnx", name=name, top=top, packed=packed
        )
        return own if (folder / f"{name}{DATA_SUFFIX}").is_file() else data, operators


@dataclass(frozen=True, slots=True)
class _Form:
    """How an engine for a CPU computes.

    Attributes:
        products: Of weights in few bits: `as stored`, or `expanded` by every pass; empty where
            there are none.
        experts: `packed` or `mapped`, see `experts_are_packed`; empty where every expert computes
            every token.
    """

    products: str
    experts: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def _form_of(bundle: Bundle, config: BuildConfig) -> _Form:
    """What suits a bundle on this machine."""
    if config.dialect == STANDARD:
        return _Form("" if bundle.quantization is None else EXPANDED, "")
    refs = [ref for name in GRAPH_FILES for ref in bundle.weights(name).values()]
    wide = sum(4 * math.prod(ref.shape) if ref.narrow else ref.nbytes for ref in refs)
    products = ""
    if any(ref.dtype in UNSIGNED for ref in refs):
        products = AS_STORED if _products_compute_rows_alike() else EXPANDED
    return _Form(products, PACKED if experts_are_packed(wide, usable_memory()) else MAPPED)


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
        located = read_as_stored(
            optimised, choose_experts(optimised, located, top, matrices=packed)
        )
    compute_rows_alike(
        optimised,
        [w for w, (_, ref) in located.items() if len(ref.shape) != 2 or ref.dtype != "float32"],
    )
    for location in {location for location, _ in located.values()}:
        attach_weights(
            optimised,
            {w: ref for w, (where, ref) in located.items() if where == location},
            location,
        )
    path.write_bytes(optimised.SerializeToString())
    return Counter(node.op_type for graph in with_branches(optimised.graph) for node in graph.node)


def engine_places(bundle: Bundle, name: str) -> dict[str, tuple[str, WeightRef]]:
    """Where the weights of a built engine lie: by name in the exported graph the file, relative to the bundle, and the place in it."""
    model = load_graph(engine_folder(bundle, CPU) / f"{name}.onnx")
    return stacked_places(from_blocks(model, located_weights(model)))


def _optimised(model: onnx.ModelProto, scratch: Path, name: str) -> onnx.ModelProto:
    options = session_options()
    # "Extended" and not "all": the last level lays data out for the CPU at hand, and the engine may
    # run on another.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(scratch)
    options.add_session_config_entry(
        "session.disable_quant_qdq", "1"
    )  # inputs are rounded where the graph says, and products stay float32
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
