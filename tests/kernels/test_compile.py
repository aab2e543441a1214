"""Cubins for every GPU and format: what NVIDIA's assembler says of them. None of them has run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import check_error
from tests.helpers.expert_layers import make_shape
from tests.helpers.source import ROOT
from twotower.errors import BuildError
from twotower.kernels import read_manifest
from twotower.kernels.compile import compile_kernels
from twotower.kernels.tilings import TIERS, shared_memory

pytestmark = pytest.mark.kernels

SMS = (80, 86, 89, 90, 100, 120, 121)
MATRIX_UNITS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Newer ones than `mma.sync`, which all others have."""

MOST_REGISTERS = {"decode": 168, "block": 168, "batch": 200, "prefill": 232}
"""Of a thread: for 128 threads three programs a multiprocessor, two, and for 256 threads one."""

REGISTERS, OWN_SHARED = 64 << 10, 1 << 10
"""Of a multiprocessor; and bytes of shared memory the driver keeps for itself in each program."""

FORMATS = [
    ("bfloat16", "float", "float"),
    ("float16", "float", "float"),
    ("bfloat16", "int8", "int8"),
    ("bfloat16", "int8-groups", "int8-groups"),
    ("bfloat16", "int4-32", "float"),
    ("float16", "int4-64", "int4-64"),
    ("bfloat16", "int4-128", "float"),
    ("bfloat16", "fp8", "fp8"),
    ("bfloat16", "nvfp4", "nvfp4"),
    ("bfloat16", "mxfp4", "float"),
]

IN_FULL = (("float", "bfloat16"), ("int4-32", "bfloat16"), ("int8-groups", "bfloat16"))
"""Compiled for all numbers of tokens; the others for the fewest and the most."""

TIER_NAMES = tuple(tier.name for tier in TIERS)


def python(*words: str) -> str:
    """What a process that compiles prints: Triton interprets in this one."""
    settings = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, *words]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("dtype", "routed", "others"), FORMATS)
def test_every_format_for_every_gpu(dtype: str, routed: str, others: str) -> None:
    tiers = TIER_NAMES if (routed, dtype) in IN_FULL else (TIER_NAMES[0], TIER_NAMES[-1])
    words = (dtype, routed, others, ",".join(map(str, SMS)), ",".join(tiers))
    printed = python("-m", "tests.kernels.compile_child", *words)
    cubins = [json.loads(line) for line in printed.splitlines()]
    assert len(cubins) == 2 * len(tiers) * len(SMS)
    by_product = defaultdict(set)
    for cubin in cubins:
        check_resources(cubin)
        family, depth = matrix_unit(cubin)
        by_product[cubin["kernel"].split("-")[0], cubin["sm"]].add(
            (family, depth, cubin["constants"]["BK"])
        )
        assert family == MATRIX_UNITS.get(cubin["sm"], "mma.sync")
    assert all(len(kinds) == 1 for kinds in by_product.values()), (
        "sums of a row are alike for all numbers of tokens"
    )


def check_resources(cubin: dict[str, Any]) -> None:
    what = f"{cubin['kernel']} for SM {cubin['sm']}"
    assert cubin["stack"] == 0, f"{what} spills registers"
    assert cubin["registers"] <= MOST_REGISTERS[cubin["kernel"].split("-")[1]], what
    assert cubin["registers"] * cubin["threads"] <= REGISTERS, what
    programs = 1 if "prefill" in cubin["kernel"] else 2
    assert programs * (cubin["shared"] + OWN_SHARED) <= shared_memory(cubin["sm"]) + OWN_SHARED, (
        what
    )


def matrix_unit(cubin: dict[str, Any]) -> tuple[str, str]:
    """The kind of matrix instruction, and how many products one adds up."""
    (instruction,) = cubin["matrix_instructions"]
    family = next(
        f for f in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if instruction.startswith(f)
    )
    depth = re.search(r"k\d+", instruction.replace("kind", ""))
    return family, depth[0] if depth else ""


COMPILE = """
import sys
from pathlib import Path
from tests.helpers.expert_layers import make_shape
from twotower.kernels.compile import compile_kernels
sizes = {"shared": 3712, "dtype": "bfloat16", "routed": "int4-32"}
shape = make_shape(2688, 1856, 128, 6, **sizes)
compile_kernels(shape, [80, 90], Path(sys.argv[1]), max_tokens=64, report=print)
"""


def test_a_layer_is_compiled_whole_and_alike_each_time(tmp_path: Path) -> None:
    printed = [python("-c", COMPILE, str(tmp_path / name)) for name in ("a", "b")]
    first, second = (read_manifest(tmp_path / name) for name in ("a", "b"))
    assert first.cubins == second.cubins, (
        "a compiler that makes something else each time has no identity"
    )
    assert printed[0].split() == [cubin.file for cubin in first.cubins]
    assert (first.triton, first.fp_fusion, first.max_tokens, first.sms) == (
        "3.9.0",
        True,
        64,
        (80, 90),
    )
    kernels = [f"{name}-{tier}" for tier in ("decode", "block") for name in ("pairs", "up", "down")]
    assert {cubin.kernel for cubin in first.cubins} == {*kernels, "combine"}
    for cubin in first.cubins:
        assert first.code(cubin)[:4] == b"\x7fELF"
        assert cubin.stack == 0
        assert cubin.nulls == 2
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert left == {"manifest.json", *(cubin.file for cubin in first.cubins)}


PAIRS = """
import sys
from pathlib import Path
from tests.helpers.expert_layers import make_shape
from twotower.kernels.compile import compile_kernel
from twotower.kernels.signatures import kernel_specs
for experts in (8, 128, 512, 1024):
    for spec in kernel_specs(make_shape(2688, 1856, experts, 8), 80):
        if spec.function not in ("up", "down"):
            print(compile_kernel(spec, 80, Path(sys.argv[1])).stack)
"""


def test_lists_of_pairs_spill_nothing_up_to_the_most_experts(tmp_path: Path) -> None:
    assert set(python("-c", PAIRS, str(tmp_path)).split()) == {"0"}


def test_a_process_that_interprets_cannot_compile(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="interprets") as e:
        compile_kernels(make_shape(64, 64, 8, 2), [80], tmp_path / "k")
    check_error(str(e.value), "cannot be compiled")
    assert not list(tmp_path.iterdir())
