"""Compiles a layer's kernels ahead of time: a cubin each for named compute capabilities.

Needs Triton (the extra `kernels`) and no GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twotower.errors import BuildError
from twotower.extras import require_libraries
from twotower.files import unpublished
from twotower.kernels.cubin_manifest import MANIFEST, Cubin, Manifest
from twotower.kernels.shape import MOST_TOKENS, ExpertShape
from twotower.kernels.signatures import KernelSpec, kernel_specs
from twotower.kernels.tilings import tier_for

FP_FUSION = True
"""Whether a product and a sum may become one instruction: Triton 3.9's default, not 3.10's."""

_FUSION_VARIABLE = "TRITON_DEFAULT_FP_FUSION"
_MATRIX = re.compile(r"\b(wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\S*)")


def compile_kernels(
    shape: ExpertShape,
    sms: Sequence[int],
    folder: Path,
    *,
    max_tokens: int = MOST_TOKENS,
    report: Callable[[str], None] | None = None,
) -> Manifest:
    """Writes the kernels of a layer into a folder, in place of what was there, or not at all.

    Args:
        shape: The layer.
        sms: Compute capabilities.
        folder: Where the files go.
        max_tokens: The most tokens of a launch; kernels only larger counts need are left out.
        report: Called with the name of each file that was made.

    Raises:
        ConfigError: Triton is not installed.
        BuildError: a compute capability there are no kernels for, or the compiler failed.
        RequestError: more tokens than kernels are made for.
    """
    require_libraries("kernels", "triton", what="compiling the expert kernels")
    _refuse_interpreter()
    last = tier_for(max_tokens)
    wanted = [
        (spec, sm) for sm in sms for spec in kernel_specs(shape, sm) if spec.first <= last.tokens
    ]
    with unpublished(folder) as new:
        cubins = []
        with _compiler_settings():
            for spec, sm in wanted:
                cubins.append(compile_kernel(spec, sm, new))
                if report:
                    report(cubins[-1].file)
        manifest = Manifest(folder, shape, _triton_version(), FP_FUSION, last.tokens, tuple(cubins))
        text = json.dumps(manifest.to_json(), indent=1) + "\n"
        (new / MANIFEST).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
    return manifest


@contextmanager
def _compiler_settings() -> Iterator[None]:
    """Triton's settings while we compile: a cache that goes with it, and the fusion we name."""
    names = (_FUSION_VARIABLE, "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    try:
        with tempfile.TemporaryDirectory(prefix="twotower-triton-") as cache:
            os.environ.update(zip(names, (str(int(FP_FUSION)), cache), strict=True))
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _refuse_interpreter() -> None:
    """Triton decides when it is imported whether it interprets; then nothing can be compiled."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise BuildError(
            "the expert kernels cannot be compiled while Triton interprets them",
            found=f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']}; allowed: unset, or 0",
            do="`unset TRITON_INTERPRET`, then the same command again",
        )


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def compile_kernel(spec: KernelSpec, sm: int, folder: Path) -> Cubin:
    """Writes the cubin of one kernel for one compute capability; BuildError on failure."""
    made = _compile(spec, sm)
    code: bytes = made.asm["cubin"]
    file = f"{spec.name}.sm{sm}.cubin"
    (folder / file).write_bytes(code)
    registers, stack = _resources(folder / file, made.metadata.name)
    ptx: str = made.asm["ptx"]
    head = ptx.split(".entry", 1)[1].split(")", 1)[0]
    if getattr(made.metadata, "global_scratch_size", 0):
        raise BuildError(
            f"Triton gave the kernel {spec.name} scratch memory of its own",
            found=f"{made.metadata.global_scratch_size} bytes for SM {sm}; 0 are allowed",
            do="report this: it is a defect of twotower",
        )
    return Cubin(
        kernel=spec.name,
        sm=sm,
        file=file,
        entry=made.metadata.name,
        sha256=hashlib.sha256(code).hexdigest(),
        arguments=spec.arguments,
        nulls=len(re.findall(r"\.param", head)) - len(spec.arguments),
        threads=32 * made.metadata.num_warps,
        shared=made.metadata.shared,
        registers=registers,
        stack=stack,
        matrix_instructions=tuple(sorted({m.rstrip(";") for m in _MATRIX.findall(ptx)})),
        grid=spec.grid,
        constants=dict(spec.constants),
    )


def device_functions() -> Mapping[str, Any]:
    """The functions Triton compiles, by the names that specifications use."""
    from twotower.kernels.device import pairs, product

    return {
        "pairs_few": pairs.pairs_few,
        "pairs_slots": pairs.pairs_slots,
        "pairs_order": pairs.pairs_order,
        "up": product.up,
        "down": product.down,
        "combine": product.combine,
    }


def _compile(spec: KernelSpec, sm: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = device_functions()[spec.function]
    kinds = [kind for _, kind in spec.arguments]
    kinds += ["constexpr"] * (len(function.arg_names) - len(kinds))
    types = dict(zip(function.arg_names, kinds, strict=True))
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if "*" in kind
    }
    source = ASTSource(function, types, constexprs=dict(spec.constants), attrs=aligned)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": FP_FUSION}
    try:
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as e:
        raise BuildError(
            f"Triton {_triton_version()} does not compile the kernel {spec.name} for SM {sm}",
            found=f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[-1]}",
            do="report this with the versions `twotower doctor` prints, or leave this SM out",
        ) from e


def _resources(file: Path, entry: str) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, read from the file by NVIDIA's tool."""
    import triton

    tool = shutil.which(triton.knobs.nvidia.cuobjdump.path) or triton.knobs.nvidia.cuobjdump.path
    done = subprocess.run(
        [tool, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=False
    )
    found = re.search(
        rf"{re.escape(entry)}.*?REG:(\d+)\s+STACK:(\d+).*?LOCAL:(\d+)", done.stdout, re.DOTALL
    )
    if done.returncode or not found:
        raise BuildError(
            "the resources of a compiled expert kernel cannot be read",
            found=(done.stderr or done.stdout).strip()[:200] or "nothing",
            do="`pip install 'twotower[kernels]'`: Triton brings the tool cuobjdump",
        )
    return int(found[1]), int(found[2]) + int(found[3])
