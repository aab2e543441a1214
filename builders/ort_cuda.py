"""ONNX Runtime on a GPU: the exported graphs, their weights where they are.

Which fusions the CUDA provider knows, and between which operators a copy or a cast must stand, is decided where the provider is:
ONNX Runtime on this machine's CPU would insert casts around every half-width operator that a CPU lacks, and a GPU would then compute
in float32. The session optimises when it is opened.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from twotower.builders.base import BuildConfig, Report
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineRecord, file_records
from twotower.graph_files import attach_weights, load_graph, weight_refs

__all__ = ["OrtCudaBuilder"]

CUDA = "ort-cuda"


class OrtCudaBuilder:
    """Builds the `ort-cuda` target: no GPU is needed, and nothing of the CUDA provider is asked or guessed.

    The engine is tied to the version of ONNX Runtime all the same: a bundle is built and checked with the library it will run on.

    Args:
        library: Name and version of ONNX Runtime.
    """

    def __init__(self, library: dict[str, str]) -> None:
        self._library = library

    def library(self) -> dict[str, str]:
        return dict(self._library)

    def fits(self, record: EngineRecord, bundle: Bundle, config: BuildConfig) -> bool:
        return True

    def describe(self, bundle: Bundle, config: BuildConfig) -> list[str]:
        return [f"the three graphs as they are, in {bundle.dtype}; optimised when they are opened on the GPU"]

    def needed_bytes(self, bundle: Bundle, config: BuildConfig) -> int:
        return sum(bundle.files[graph].size for graph in GRAPH_FILES.values())

    def build(self, bundle: Bundle, folder: Path, config: BuildConfig, *, report: Report) -> EngineRecord:
        bundle.require_weights("an engine of ONNX Runtime")
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
            graphs={name: bundle.program_identity(name) for name in GRAPH_FILES},
            weights={name: file + DATA_SUFFIX for name, file in GRAPH_FILES.items()},
            files=file_records(folder),
            report={"seconds": round(time.perf_counter() - started, 3), "operators": operators},
        )
