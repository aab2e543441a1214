"""The published layer's expert kernels, compiled ahead of time for GPUs that are elsewhere.

Needs Triton and no GPU: `python -m tools.gpu.expert_cubins FOLDER 80 90`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from twotower.config.formats import FORMATS
from twotower.kernels import ExpertFormats, ExpertShape
from twotower.kernels.compile import compile_kernels

__all__ = ["FORMS", "GROUP", "MOST_TOKENS", "compile_layers", "published"]

FORMS = ("bfloat16", "int4")
"""Of the routed experts' weights; the shared one's are bfloat16."""

GROUP = 32
"""Of int4."""

MOST_TOKENS = 512
"""Of a launch: what is asked of a GPU."""


def published(form: str) -> ExpertShape:
    """The published layer with routed experts in bfloat16 or int4, the shared one in bfloat16."""
    how = replace(FORMATS["int4"], group=GROUP) if form == "int4" else None
    sizes = {"hidden": 2688, "width": 1856, "experts": 128, "top": 6, "shared_intermediate": 3712}
    return ExpertShape(**sizes, dtype="bfloat16", weights=ExpertFormats(up=how, down=how))


def compile_layers(folder: Path, sms: Sequence[int]) -> None:
    """Writes the kernels of the layer in each form into a folder of that name.

    Raises:
        ConfigError: Triton is not installed.
        BuildError: it does not compile them.
    """
    for form in FORMS:
        compile_kernels(published(form), sms, folder / form, max_tokens=MOST_TOKENS)


if __name__ == "__main__":
    compile_layers(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]])
