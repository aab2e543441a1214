"""ONNX Runtime on a CPU: the graph is optimised once and saved, the weights stay where they are.

Saving ONNX Runtime's own optimised model would copy every weight. Here the weights are taken out of the graph first, so
that optimisation sees structure only (it fuses the transposes into the products, which is what matters), and the runtime
maps the bundle's own data file. Half-width weights are the exception: a CPU has no arithmetic for them, so they are
widened to float32 into a data file of the engine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from twotower.builders.base import Report
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineRecord, FileRecord, hash_file
from twotower.errors import BuildError
from twotower.graph_files import WeightRef, aligned, attach_weights, detach_weights, load_graph, read_weight, weight_refs, widen_to_float32

__all__ = ["OrtCpuBuilder"]

TARGET = "ort-cpu"
_PIECE = 4 << 20  # elements widened at a time: 16 MiB of float32


class OrtCpuBuilder:
    """Builds the `ort-cpu` target."""

    def library(self) -> dict[str, str]:
        return {"name": "onnxruntime", "version": ort.__version__}

    def needed_bytes(self, bundle: Bundle) -> int:
        if bundle.dtype == "float32":
            return sum(bundle.files[g].size for g in GRAPH_FILES.values())
        return 2 * sum(bundle.files[g + DATA_SUFFIX].size for g in GRAPH_FILES.values())

    def build(self, bundle: Bundle, folder: Path, report: Report) -> EngineRecord:
        started = time.perf_counter()
        weights: dict[str, str] = {}
        tables: dict[str, dict[str, list[object]]] = {}
        operators: dict[str, dict[str, int]] = {}
        for step, name in enumerate(GRAPH_FILES):
            report(f"optimising {name}", step, len(GRAPH_FILES))
            refs, weights[name], ops = self._build_graph(bundle, name, folder, report)
            tables[name] = {k: [r.dtype, list(r.shape), r.offset] for k, r in refs.items()}
            operators[name] = dict(ops.most_common())
        files = {p.name: FileRecord(p.stat().st_size, hash_file(p)) for p in sorted(folder.iterdir())}
        return EngineRecord(
            target=TARGET,
            library=self.library(),
            dtype="float32",
            graphs={name: bundle.graph_identity(name) for name in GRAPH_FILES},
            weights=weights,
            tables=tables,
            files=files,
            report={"seconds": round(time.perf_counter() - started, 3), "operators": operators, "widened_from": _widened_from(bundle)},
        )

    def _build_graph(self, bundle: Bundle, name: str, folder: Path, report: Report) -> tuple[dict[str, WeightRef], str, Counter[str]]:
        """One engine file; returns where its weights lie, in which file of the bundle, and its operators."""
        model = load_graph(bundle.graph_file(name))
        refs = weight_refs(model)
        location = GRAPH_FILES[name] + DATA_SUFFIX
        if any(ref.dtype != "float32" for ref in refs.values()):
            wide = folder / f"{name}{DATA_SUFFIX}"
            refs = _widen(bundle.path / location, wide, refs, lambda done, total: report(f"widening {name}", done, total))
            location = f"engines/{TARGET}/{wide.name}"
            widen_to_float32(model)
        detach_weights(model)
        optimised = _optimised(model, folder / f"{name}.onnx", name)
        attach_weights(optimised, refs, "weights are mapped by the runtime")
        (folder / f"{name}.onnx").write_bytes(optimised.SerializeToString())
        return refs, location, Counter(node.op_type for node in optimised.graph.node)


def _optimised(model: onnx.ModelProto, scratch: Path, name: str) -> onnx.ModelProto:
    options = ort.SessionOptions()
    # "Extended" and not "all": the last level lays data out for the CPU at hand, and the engine may run on another.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(scratch)
    options.log_severity_level = 3
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # noqa: BLE001 - ONNX Runtime's exceptions share no other base
        raise BuildError(
            f"ONNX Runtime {ort.__version__} refuses the {name} graph", found=str(e), do="use the ONNX Runtime this version of twotower asks for"
        ) from e
    return load_graph(scratch)


def _widen(source: Path, target: Path, refs: dict[str, WeightRef], progress: Callable[[int, int], None]) -> dict[str, WeightRef]:
    """Copies weights into a float32 data file, a bounded piece at a time."""
    data = np.memmap(source, dtype=np.uint8, mode="r")
    out: dict[str, WeightRef] = {}
    end, done, total = 0, 0, sum(r.nbytes for r in refs.values())
    with target.open("wb") as file:
        for name, ref in sorted(refs.items(), key=lambda item: item[1].offset):
            out[name] = WeightRef("float32", ref.shape, aligned(end))
            file.seek(out[name].offset)
            size = 4 if ref.dtype == "float32" else 2
            count = ref.nbytes // size
            for first in range(0, count, _PIECE):
                piece = WeightRef(ref.dtype, (min(_PIECE, count - first),), ref.offset + first * size)
                read_weight(data, piece).astype(np.float32, copy=False).tofile(file)
                done += piece.nbytes
                progress(done, total)
            end = out[name].offset + out[name].nbytes
    return out


def _widened_from(bundle: Bundle) -> str | None:
    return None if bundle.dtype == "float32" else bundle.dtype
