"""ONNX Runtime's GPU engines on the fake CUDA: CPU sessions run when the stream's turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.fused_experts import with_bodies
from tests.helpers.goldens import AR, check_goldens, golden_cases
from tests.helpers.quantized import TINY
from tests.helpers.towers import golden_config
from tests.helpers.trt.execution import fake_kernels
from twotower import GenerationConfig
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.ort.cuda import OrtBuilder, OrtCudaPlan
from twotower.calibration import builtin_recipes, plan_quantization, quantize_bundle
from twotower.errors import ConfigError, EngineMismatchError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.runtime import Request, TwoTower
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines import OpenOptions, open_towers
from twotower.runtime.engines.ort import CudaLibrary, open_ort_cpu
from twotower.runtime.engines.ort_cuda import open_ort_cuda
from twotower.weights.external import load_graph


class CpuLibrary:
    """The library, computing on the CPU in place of the CUDA provider."""

    version = ort.__version__
    device_type = "cpu"

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def session(self, graph: Path, folder: Path, *, device: int, stream: int) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        model = with_bodies(load_graph(graph))  # a CPU's fused experts know no squared ReLU
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return _Deferred(session, self.cuda, stream)

    def run_options(self) -> Any:
        return CudaLibrary().run_options()


class _Deferred:
    """A session whose passes are work on a stream."""

    def __init__(self, session: Any, cuda: FakeCuda, stream: int) -> None:
        self.session, self.cuda, self.stream = session, cuda, stream
        self.io_binding = session.io_binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.cuda.enqueue(self.stream, lambda: self.session.run_with_iobinding(binding, options))


def kernel_builder() -> OrtBuilder:
    """The builder that ships, with a fake for what compiles kernels."""
    return OrtBuilder(
        builder_for("ort-cuda").library(), partial(OrtCudaPlan, compiler=fake_kernels)
    )


@pytest.fixture
def opened_ort(built: Any) -> Callable[..., Any]:
    """Opens a session on a fixture's engines; yields it and the fake beneath it."""

    @contextmanager
    def open_(
        folder: str = "hybrid-a",
        *,
        devices: tuple[int, ...] = (0,),
        seed: int | None = None,
        memory: int = 1 << 34,
        experts: str = "fused",
    ) -> Iterator[Any]:
        bundle, api = built(folder), FakeCuda(devices=4, seed=seed, memory=memory)
        config = BuildConfig(experts=experts)
        record = build_engines(bundle, "ort-cuda", kernel_builder(), config=config)
        assert record.report["choice_of_experts"]["computed_by"] == experts
        with TwoTower.from_towers(
            open_ort_cuda(bundle, CpuLibrary(api), Cuda(api), OpenOptions(devices=devices))
        ) as model:
            yield model, api
        assert not api.leaked
        assert not api.loaded, "libraries of kernels"

    return open_


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "seed"), [((0,), None), ((0,), 1), ((0, 1), 2), ((1, 0), None)]
)
@pytest.mark.parametrize("folder", ["hybrid-a", pytest.param("hybrid-b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("experts", ["fused", "dense"])
def test_the_goldens(
    opened_ort: Any, experts: str, folder: str, devices: tuple[int, ...], seed: int | None
) -> None:
    with opened_ort(folder, devices=devices, seed=seed, experts=experts) as (model, _):
        check_goldens(model, golden_cases(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "devices", "seed"),
    [("hybrid-a", (0,), None), ("hybrid-b", (1, 0), 2), ("hybrid-a", (0, 1, 2, 3), 3)],
)
def test_the_goldens_with_kernels_between(
    opened_ort: Any, folder: str, devices: tuple[int, ...], seed: int | None
) -> None:
    """Programs and experts on the towers' streams; of four devices each tower has two."""
    with opened_ort(folder, devices=devices, seed=seed, experts="kernels") as (model, api):
        check_goldens(model, golden_cases(folder)[:1])
        case = golden_cases(folder)[0]
        mixed = model.generate([Request(case["prompt"], golden_config(case)), Request([5], AR)])
        assert list(mixed[0].tokens) == case["diffusion_tokens"]
        assert api.launched, "kernels"


def test_kernels_between_have_limits(opened_ort: Any) -> None:
    """Of the block: what steps hand over has its room."""
    with (
        opened_ort(experts="kernels") as (model, _),
        pytest.raises(ConfigError, match="block_size=8 cannot be used with these engines") as error,
    ):
        model.generate([5, 6, 7], GenerationConfig(block_size=8, allow_untrained_block_size=True))
    assert "built for blocks of 16" in error.value.found


@pytest.mark.slow
def test_experts_in_a_format_onnx_runtime_has_no_kernel_for(tmp_path: Path) -> None:
    """NVFP4 between float32 programs: the text is that of the graph that expands them."""
    whole = export_bundle(Checkpoint.open(TINY), tmp_path / "float", ExportConfig(dtype="float32"))
    bundle = quantize_bundle(
        whole, plan_quantization(whole, builtin_recipes()["nvfp4-experts"]), tmp_path / "nvfp4"
    )
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"), config=BuildConfig(dialect="standard"))
    build_engines(bundle, "ort-cuda", kernel_builder(), config=BuildConfig(experts="kernels"))
    config = GenerationConfig(max_new_tokens=16, ignore_eos=True)
    api = FakeCuda()
    texts = []
    for towers in (open_ort_cpu(bundle), open_ort_cuda(bundle, CpuLibrary(api), Cuda(api))):
        with TwoTower.from_towers(towers, trained_block_size=bundle.trained_block_size) as model:
            configs = [replace(config, mode=mode) for mode in ("diffusion", "ar")]
            texts.append([model.generate([5, 6, 7], c).tokens for c in configs])
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_text_that_outgrows_its_cache_keeps_it(opened_ort: Any, mode: str) -> None:
    """From 256 positions to 512: keys and values move, and passes are bound again."""
    prompt = [4 + n % 200 for n in range(210)]
    config = GenerationConfig(mode=mode, max_new_tokens=96, ignore_eos=True)
    roomy = [prompt, [5] * 300]  # in a batch with a longer text there is room from the beginning
    with opened_ort(seed=8) as (model, _):
        assert model.generate(prompt, config).tokens == model.generate(roomy, config)[0].tokens


def test_no_memory_is_named_with_what_is_free(opened_ort: Any) -> None:
    with (
        pytest.raises(EngineMismatchError, match=r"do not fit on GPU 0") as error,
        opened_ort(memory=1000),
    ):
        raise AssertionError("it was opened")
    assert "MiB needed" in error.value.found


def test_without_a_driver_the_target_says_so(built: Any) -> None:
    bundle = built("hybrid-a")
    build_engines(bundle, "ort-cuda", builder_for("ort-cuda"))
    with pytest.raises(EngineMismatchError, match=r"driver|GPU|cannot run here") as error:
        open_towers(bundle, "ort-cuda", OpenOptions())
    assert "ort-cpu" in error.value.do or "pip install" in error.value.do
