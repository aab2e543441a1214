"""Opening TensorRT engines: what does not fit is refused before anything is loaded."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import flip_byte
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import FakeTensorRT, engines_changed
from tests.helpers.trt.install import GPUS, open_fake
from twotower import GenerationConfig
from twotower.bundle import BUILD_FILE, Bundle, engine_folder, load_engine_record
from twotower.errors import ConfigError, EngineMismatchError, RequestError, TwoTowerError
from twotower.hardware import probe_machine
from twotower.runtime import TwoTower
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines import open_towers
from twotower.runtime.engines.trt_plan import PlanLoader
from twotower.tensorrt_library import variant_from_module

GPU = GPUS[0]


def open_(
    bundle: Bundle,
    change: Callable[[FakeTensorRT], None] | None = None,
    *,
    cuda: FakeCuda | None = None,
    **options: Any,
) -> Any:
    api = cuda or FakeCuda()
    trt = FakeTensorRT(api)
    if change:
        change(trt)
    try:
        return open_fake(bundle, trt, **options)
    except TwoTowerError:
        assert not api.leaked, "a failed opening leaves nothing"
        raise


def truncated(bundle: Bundle) -> None:
    file = engine_folder(bundle, "rtx") / "denoiser.engine"
    file.write_bytes(file.read_bytes()[:-10])


def of_another_graph(bundle: Bundle) -> None:
    file = engine_folder(bundle, "rtx") / BUILD_FILE
    data = json.loads(file.read_text())
    data["graphs"]["denoiser"] = "0" * 64
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("harm", "options", "says"),
    [
        (lambda b: shutil.rmtree(engine_folder(b, "rtx")), {}, "has no engine"),
        (truncated, {}, "does not fit"),
        (lambda b: flip_byte(engine_folder(b, "rtx") / "context.engine"), {}, "does not fit"),
        (of_another_graph, {}, "does not fit"),
        (None, {"change": lambda trt: setattr(trt, "__version__", "2.0")}, "does not fit"),
        (None, {"gpus": (replace(GPU, sm=90, name="H100"),)}, "no code for H100"),
        (None, {"cuda": FakeCuda(memory=10_000)}, "do not fit on GPU 0"),
    ],
)
def test_what_does_not_fit_is_named(
    copied: Bundle, harm: Any, options: dict[str, Any], says: str
) -> None:
    if harm:
        harm(copied)
    with pytest.raises(EngineMismatchError, match=says) as error:
        open_(copied, **options)
    assert "twotower" in error.value.do


def test_the_command_that_mends_a_foreign_engine_keeps_what_was_built_for(copied: Bundle) -> None:
    with pytest.raises(EngineMismatchError) as error:
        open_(copied, gpus=(replace(GPU, sm=120),))
    assert "--sm 89,120" in error.value.do


@pytest.mark.parametrize("how", ["default", "current"])
def test_a_gpu_that_is_not_listed_is_tried_when_it_is_asked_for(
    copied: Bundle, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    h100 = replace(GPU, sm=90, name="H100")
    with TwoTower.from_towers(open_(copied, gpus=(h100,), any_sm=how)) as model:
        assert model.generate([5], GenerationConfig(max_new_tokens=1)).tokens
    assert "SM 90: NVIDIA does not support it there, and it was never tried by us" in caplog.text
    assert "built for SM 89" in caplog.text


def test_a_file_the_library_refuses_is_named_with_its_words(copied: Bundle) -> None:
    """Hashes fit, so the build itself was of something else."""

    def refuse(data: bytes, logger: Any) -> Any:
        return logger.log(logger.Severity.ERROR, "the magic tag does not match")

    with pytest.raises(EngineMismatchError, match="cannot load") as error:
        open_(copied, change=lambda trt: setattr(trt, "_engine", refuse))
    assert "magic tag" in error.value.found


INT8 = SimpleNamespace(name="INT8")
OTHER = r"is not the engine its build\.json describes"


@pytest.mark.parametrize(
    ("attribute", "value", "says"),
    [
        ("num_io_tensors", 1, OTHER),
        ("get_tensor_dtype", lambda name: INT8, OTHER),
        ("get_aliased_input_tensor", lambda name: None, OTHER),
        ("device_memory_size_v2", 1 << 40, "no room for the engines' activations"),
    ],
)
def test_another_engine_than_the_recorded_one_is_refused(
    copied: Bundle, attribute: str, value: Any, says: str
) -> None:
    change = engines_changed(lambda engine: setattr(engine, attribute, value))
    with pytest.raises(EngineMismatchError, match=says):
        open_(copied, change=change)


@pytest.mark.parametrize("devices", [(3,), (0, 0), (-1,)])
def test_devices_that_are_not_there(copied: Bundle, devices: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="GPU"):
        open_(copied, devices=devices)


@pytest.mark.parametrize(("code", "says"), [(35, "driver"), (100, "no NVIDIA GPU")])
def test_no_driver_and_no_gpu_are_told_apart(copied: Bundle, code: int, says: str) -> None:
    api = FakeCuda()
    api.fail["cudaGetDeviceCount"] = (1, code)
    with pytest.raises(EngineMismatchError, match=says) as error:
        open_(copied, cuda=api)
    assert "ort-cpu" in error.value.do
    assert (code == 35) == ("supports CUDA 12.4, this environment needs 13.5" in error.value.found)


def test_what_an_engine_takes_of_a_gpu_is_logged(
    copied: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """A library may hold more than the file has; only a GPU shows what."""
    api = FakeCuda()

    def enlarge(engine: Any) -> None:
        api._blocks[-len(api.calls)] = (np.zeros(5000, np.uint8), 0)  # of the library's own

    with caplog.at_level("INFO"):
        open_(copied, cuda=api, change=engines_changed(enlarge)).close()
    assert caplog.text.count("took 5000 bytes of GPU 0") == 3


def test_limits_of_the_engines_are_limits_of_the_session(copied: Bundle) -> None:
    with TwoTower.from_towers(open_(copied)) as model:
        with pytest.raises(RequestError, match="too long") as error:
            model.generate([5] * 250, GenerationConfig(max_new_tokens=10))
        assert "256 tokens a text" in error.value.found
        with pytest.raises(ConfigError, match="block_size=8 cannot be used"):
            model.generate([5], GenerationConfig(block_size=8))
        assert len(model.generate([[5]] * 6, GenerationConfig(max_new_tokens=1))) == 6, (
            "more rows than the engines take run in turns"
        )
    towers = open_(copied)
    with pytest.raises(ConfigError, match="max_context=512"):
        TwoTower.from_towers(towers, max_context=512)
    towers.close()


def test_capacity_beyond_memory_is_said_with_what_is_free(copied: Bundle) -> None:
    api = FakeCuda()
    with TwoTower.from_towers(open_(copied, cuda=api)) as model:
        api._memory = (1 << 34) - api._free(0) + 5000
        before = dict(api.leaked)
        with pytest.raises(RequestError, match="not enough memory for 4 row") as error:
            model.generate([[5], [6], [7]], GenerationConfig(max_new_tokens=1))
        assert "free on device 0" in error.value.found
        assert api.leaked["memory"] == before["memory"], (
            "what was allocated before the failure is given back at once"
        )
        api._memory = 1 << 34
        assert model.generate([5], GenerationConfig(max_new_tokens=1)).tokens, "the session goes on"
    assert not api.leaked


def test_compiled_kernels_are_kept_for_the_next_opening(copied: Bundle) -> None:
    compiled: list[str] = []
    counts = []
    for _ in range(2):
        with TwoTower.from_towers(
            open_(copied, change=lambda trt: setattr(trt, "kernels", compiled))
        ) as model:
            model.generate([5], GenerationConfig(max_new_tokens=1))
        counts.append(len(compiled))
    made_by = f"{load_engine_record(copied, 'rtx').library['version']}-sm89"
    kept = sorted(p.name for p in engine_folder(copied, "rtx").glob(".*.kernels"))
    assert kept == [f".context.engine.{made_by}.kernels", f".denoiser.engine.{made_by}.kernels"]
    assert counts[0] > 0
    assert counts[1] == counts[0], "nothing is compiled again by the second session"
    Bundle.open(copied.path)  # they are no part of what is checked


def generate_once(bundle: Bundle) -> None:
    with TwoTower.from_towers(open_(bundle)) as model:
        model.generate([5], GenerationConfig(max_new_tokens=1))


def test_kernels_are_written_where_they_differ_only(copied: Bundle) -> None:
    """Damaged ones of the right length are written anew."""
    generate_once(copied)
    damaged, other = sorted(engine_folder(copied, "rtx").glob(".*.kernels"))
    content, before = damaged.read_bytes(), other.stat().st_ino
    damaged.write_bytes(b"?" * len(content))
    generate_once(copied)
    assert damaged.read_bytes() == content
    assert other.stat().st_ino == before


def test_a_full_disk_leaves_no_part_of_kernels(
    copied: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    generate_once(copied)
    left = [file.name for file in engine_folder(copied, "rtx").glob(".*")]
    assert not [name for name in left if "kernels" in name or "partial" in name]


def test_kernels_of_another_gpu_or_library_lie_beside(copied: Bundle) -> None:
    def kept_at(version: str, sm: int) -> Path | None:
        known = variant_from_module(FakeTensorRT(FakeCuda()))
        variant = replace(known, version=version)
        (part,) = load_engine_record(copied, "rtx").engines["context"]
        file = engine_folder(copied, "rtx") / part.file
        return PlanLoader(variant, Cuda(FakeCuda()), {}, {0: sm}).load(file, part, 0).cache_file

    files = [kept_at("1.7.1", 89), kept_at("1.7.1", 120), kept_at("1.8.0", 89)]
    assert len(set(files)) == 3
    assert kept_at("1.7.1", 89) == files[0]


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_the_real_library_gets_as_far_as_the_driver(really_built: Bundle) -> None:
    """Libraries are imported, the engine is read and checked, and then there is no driver."""
    with pytest.raises(EngineMismatchError, match="driver is missing") as error:
        open_towers(really_built, "rtx")
    assert error.value.found == "no driver"


def test_a_library_that_is_not_installed_is_named_with_its_extra(copied: Bundle) -> None:
    if "tensorrt" in probe_machine().libraries:
        pytest.skip("full TensorRT is here")
    with pytest.raises(EngineMismatchError, match="target trt cannot run here") as error:
        open_towers(copied, "trt")
    assert "twotower[gpu]" in error.value.do
