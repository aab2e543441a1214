"""The questions of gpu_first_run.py: each a function of the output folder that returns its answer as plain data."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
TINY = ROOT / "assets" / "twotower-tiny"
GPU_TARGETS = ("ort-cuda", "trt", "rtx")
Ask = Callable[[Path], dict[str, Any]]


def machine(output: Path) -> dict[str, Any]:
    """Facts, and nothing else that could fail."""
    from twotower.hardware import TARGETS, probe_machine

    m = probe_machine()
    targets = {target: _refused(target) or "can run here" for target in TARGETS}
    gpus = [{"name": g.name, "sm": g.sm, "gib": round(g.memory / 2**30)} for g in m.gpus]
    return {"gpus": gpus, "driver": m.driver, "processor": m.processor, "libraries": dict(m.libraries), "targets": targets}


def rtx_runs(output: Path) -> dict[str, Any]:
    """The smallest network through TensorRT for RTX: build for this GPU, deserialize, enqueue, compare."""
    return _smallest("tensorrt_rtx")


def trt_runs(output: Path) -> dict[str, Any]:
    """The same through full TensorRT."""
    return _smallest("tensorrt")


def _smallest(module: str) -> dict[str, Any]:
    import numpy as np
    from cuda.bindings import runtime as cudart

    try:
        trt = importlib.import_module(module)
    except (ImportError, OSError) as e:  # OSError: its Python half is here and its library is not
        return {"skipped": f"{type(e).__name__}: {e}"}
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    x = network.add_input("x", trt.float32, (1, 4))
    w = network.add_constant((4, 4), trt.Weights(weight)).get_output(0)
    y = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, w, trt.MatrixOperation.NONE).get_output(0)
    y.name = "y"
    network.mark_output(y)
    facts: dict[str, Any] = {"library": f"{module} {trt.__version__}"}
    for name, config in _build_configs(trt, builder).items():
        started = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        facts[name] = {"built": plan is not None, "build_seconds": round(time.perf_counter() - started, 3)}
        if plan is not None:
            facts[name] |= _run_plan(trt.Runtime(logger).deserialize_cuda_engine(plan), weight, cudart)
    return facts


def _build_configs(trt: Any, builder: Any) -> dict[str, Any]:
    """For the GPU at hand, and as deployed: ahead of time for every capability listed, Turing excepted, which has no float32 product."""
    configs = {"for this GPU": builder.create_builder_config()}
    listed = [
        c for n, c in getattr(getattr(trt, "ComputeCapability", None), "__members__", {}).items() if n.startswith("SM") and n != "SM75"
    ]
    if listed:
        config = configs["ahead of time"] = builder.create_builder_config()
        config.num_compute_capabilities = len(listed)
        for i, capability in enumerate(listed):
            config.set_compute_capability(capability, i)
    return configs


def _run_plan(engine: Any, weight: Any, cudart: Any) -> dict[str, Any]:
    import numpy as np

    facts: dict[str, Any] = {}
    facts["deserialized"] = engine is not None
    if engine is None:
        return facts
    started = time.perf_counter()
    context = engine.create_execution_context()
    facts |= {"context": context is not None, "context_seconds": round(time.perf_counter() - started, 3)}
    host_in, host_out = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    (_, stream), (_, pointer_in), (_, pointer_out) = cudart.cudaStreamCreate(), cudart.cudaMalloc(16), cudart.cudaMalloc(16)
    cudart.cudaMemcpy(pointer_in, host_in.ctypes.data, 16, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)
    context.set_tensor_address("x", int(pointer_in))
    context.set_tensor_address("y", int(pointer_out))
    facts["enqueued"] = bool(context.execute_async_v3(int(stream)))
    facts["synchronized"] = str(cudart.cudaStreamSynchronize(stream)[0])
    cudart.cudaMemcpy(host_out.ctypes.data, pointer_out, 16, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)
    facts["right"] = bool(np.allclose(host_out, host_in @ weight))
    return facts


def _goldens(target: str) -> Ask:
    def ask(output: Path) -> dict[str, Any]:
        """Tokens of both fixtures, float32, against the recorded ones; TF32 as the library has it."""
        from twotower import GenerationConfig, TwoTower

        if why := _refused(target):
            return {"skipped": why}
        facts: dict[str, Any] = {}
        for folder in ("hybrid-a", "hybrid-b"):
            bundle = _built(FIXTURES / folder, output, "float32", target)
            cases = json.loads((FIXTURES / folder / "golden.json").read_text())
            same = {"diffusion": 0, "ar": 0}
            with TwoTower.open(bundle, target=target) as model:
                for case in cases:
                    options = {k: v for k, v in case["params"].items() if k != "mask_token_id"}
                    out = model.generate(case["prompt"], GenerationConfig(**options, ignore_eos=True))
                    same["diffusion"] += list(out.tokens) == case["diffusion_tokens"]
                    ar = model.generate(case["prompt"], GenerationConfig(mode="ar", max_new_tokens=24, ignore_eos=True))
                    same["ar"] += list(ar.tokens) == case["ar_greedy_tokens"]
            facts[folder] = {"cases": len(cases), **same}
        return facts

    return ask


def _half(target: str) -> Ask:
    def ask(output: Path) -> dict[str, Any]:
        """The trained model in half precision: the known answer with what its symptoms point to, and text kept of 60 prompts."""
        from twotower import TwoTower
        from twotower.bundle import Bundle
        from twotower.evaluate import KEPT_BY, check_answer, known_answer_of, setting_of
        from twotower.evaluate.agreement import measure_agreement
        from twotower.evaluate.suite import load_suite
        from twotower.hardware import probe_machine

        if why := _refused(target):
            return {"skipped": why}
        facts: dict[str, Any] = {}
        wide = _built(TINY, output, "float32", KEPT_BY)
        for dtype in ("float16", "bfloat16"):
            try:
                path = _built(TINY, output, dtype, target)
                _built(TINY, output, dtype, KEPT_BY)
                known, _ = known_answer_of(Bundle.open(path), lambda path=path: TwoTower.open(path, target=KEPT_BY))  # type: ignore[misc]
                assert known is not None
                with TwoTower.open(path, target=target) as model, TwoTower.open(wide, target=KEPT_BY) as reference:
                    gpus = probe_machine().gpus
                    setting = setting_of(Bundle.open(path), target, gpus[0].sm if gpus else None)
                    checks = [{"ok": r.ok, "detail": r.detail} for r in check_answer(known, model, setting)]
                    agreed = measure_agreement(reference, model, load_suite().only(limit=9).problems)
                facts[dtype] = {
                    "checks": checks,
                    "percent of prompts with the float32 tokens": {a.mode: round(a.percent, 2) for a in agreed},
                }
            except Exception as e:  # noqa: BLE001 - one type that fails must not hide the other
                facts[dtype] = {"failed": f"{type(e).__name__}: {e}"[:2000]}
        return facts

    return ask


def _real_widths(target: str) -> Ask:
    def ask(output: Path) -> dict[str, Any]:
        """One layer of each kind at published widths, random bfloat16 weights (float16 where the library lacks kernels): time of a pass."""
        from twotower import TwoTower
        from twotower.bench import measure_passes
        from twotower.bundle import Bundle
        from twotower.export.synthetic import SyntheticOptions, published_slice, write_checkpoint

        if why := _refused(target):
            return {"skipped": why}
        checkpoint = output / "scratch" / "real"
        if not (checkpoint / "config.json").is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
            write_checkpoint(checkpoint, published_slice("ME*"), SyntheticOptions())
        dtype = "float16" if target == "ort-cuda" else "bfloat16"
        started = time.perf_counter()
        path = _built(checkpoint, output, dtype, target)
        facts: dict[str, Any] = {"dtype": dtype, "export_and_build_seconds": round(time.perf_counter() - started, 1)}
        started = time.perf_counter()
        with TwoTower.open(path, target=target) as model:
            facts["open_seconds"] = round(time.perf_counter() - started, 1)
            return facts | measure_passes(Bundle.open(path, contents=False), model).to_json()

    return ask


def report(output: Path) -> dict[str, Any]:
    """The page of this device, from the trained model in float16 with every target that was built above."""
    from twotower.cli.main import main as twotower

    bundle = output / "scratch" / f"{TINY.name}-float16"
    return {"exit_code": twotower(["doctor", str(bundle), "--report", str(output)]), "pages": sorted(p.name for p in output.glob("*.md"))}


def tests(output: Path) -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TWOTOWER_REQUIRE": "gpu"}, capture_output=True, text=True, check=False)
    print(done.stdout)
    return {"exit_code": done.returncode, "end": done.stdout.strip().splitlines()[-12:]}


def _refused(target: str) -> str | None:
    """Why the target cannot run on this machine."""
    from twotower.errors import EngineMismatchError
    from twotower.hardware import TARGETS, probe_machine, select_target

    try:
        select_target(probe_machine(), TARGETS, wanted=target)
    except EngineMismatchError as e:
        return e.found
    return None


def _built(checkpoint: Path, output: Path, dtype: str, target: str) -> Path:
    """A bundle with the target's engines, made by the commands a user types; kept for the questions after this one."""
    from twotower.cli.main import main as twotower

    path = output / "scratch" / f"{checkpoint.name}-{dtype}"
    path.parent.mkdir(exist_ok=True)
    if not path.exists() and twotower(["export", str(checkpoint), "-o", str(path), "--dtype", dtype, "--no-verify"]):
        raise SystemExit(f"{checkpoint} could not be exported")
    if twotower(["build", str(path), "--target", target]):
        raise SystemExit(f"{path} could not be built for {target}")
    return path


QUESTIONS: dict[str, tuple[str, Ask]] = {
    "machine": ("What is this machine?", machine),
    "rtx-runs": ("Does TensorRT for RTX load and run anything on this GPU?", rtx_runs),
    "trt-runs": ("Does full TensorRT?", trt_runs),
    **{f"goldens-{t}": (f"Does {t} write the recorded tokens in float32?", _goldens(t)) for t in GPU_TARGETS},
    **{f"half-{t}": (f"Is {t} right in half precision, and what does it look like if not?", _half(t)) for t in GPU_TARGETS},
    **{
        f"real-{t}": (f"How long is a pass of {t} at published widths, and how fast are weights read?", _real_widths(t))
        for t in GPU_TARGETS
    },
    "report": ("What does the page of this device say?", report),
    "tests": ("Do the tests that need a GPU pass?", tests),
}
LIMIT = {"machine": 30, "rtx-runs": 60, "trt-runs": 60, **{f"real-{t}": 240 for t in GPU_TARGETS}, "tests": 300}
"""Seconds; 120 for the others."""
