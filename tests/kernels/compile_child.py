"""A process that compiles a layer's products and prints what became of each, as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.helpers.expert_layers import make_shape
from twotower.kernels.compile import compile_kernel
from twotower.kernels.signatures import kernel_specs


def main(dtype: str, routed: str, others: str, sms: str, tiers: str) -> None:
    """Published sizes; a width that groups of 128 divide where there are such."""
    width = 1920 if "128" in routed else 1856
    shape = make_shape(
        2688, width, 128, 6, shared=2 * width, dtype=dtype, routed=routed, others=others
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/cache"
        for sm in map(int, sms.split(",")):
            for spec in kernel_specs(shape, sm):
                if spec.function in ("up", "down") and spec.name.split("-")[1] in tiers.split(","):
                    cubin = asdict(compile_kernel(spec, sm, Path(folder)))
                    print(json.dumps({**cubin, "constants": dict(cubin["constants"])}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
