"""Whether ONNX Runtime's quantized products compute a row alike, alone and beside others."""

from __future__ import annotations

import numpy as np

from twotower.onnx_runtime import ort, session_options

EVEN_ROWS = "even_rows"
"""Property of an engine's model: its products compute rows alike if their number is even."""

PROBE_FILE = "products.onnx"
"""In the folder of an engine that has such products: the graph to run."""

_ROWS = 17
_COUNTS = (2, 3, 4, 5, 8, 16, 17)


def rows_are_alike(graph: bytes) -> bool:
    """Whether a model's rows, input [M,K], give the same bits alone and among others."""
    session = ort.InferenceSession(
        graph, session_options(threads=2), providers=["CPUExecutionProvider"]
    )
    (x,) = session.get_inputs()
    rows = np.random.default_rng(0).standard_normal((_ROWS, x.shape[1]), dtype=np.float32)
    alone = [session.run(None, {x.name: row[None]}) for row in rows]
    for count in _COUNTS:
        for first in (0, _ROWS - count):
            together = session.run(None, {x.name: rows[first : first + count]})
            for i, output in enumerate(together):
                want = np.concatenate([values[i] for values in alone[first : first + count]])
                if not np.array_equal(output, want):
                    return False
    return True
