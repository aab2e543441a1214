"""What is asked of TensorRT is there, in the real library and in the fake."""

from __future__ import annotations

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import Context, Engine, FakeTensorRT
from twotower.bundle import Bundle, engine_folder, load_engine_record
from twotower.errors import EngineMismatchError
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.trt_plan import _DTYPES, PlanLoader
from twotower.tensorrt_library import variant_from_module

CONTEXT = (
    "set_optimization_profile_async",
    "set_input_shape",
    "set_tensor_address",
    "infer_shapes",
    "set_device_memory",
    "update_device_memory_size_for_shapes",
    "nvtx_verbosity",
    "execute_async_v3",
    "is_stream_capturable",
)
ENGINE = (
    "create_runtime_config",
    "create_execution_context",
    "get_tensor_dtype",
    "get_tensor_name",
    "get_aliased_input_tensor",
)
ENGINE_DATA = ("num_io_tensors", "device_memory_size_v2")
CONFIG = (
    "set_execution_context_allocation_strategy",
    "set_runtime_cache",
    "create_runtime_cache",
    "cuda_graph_strategy",
    "dynamic_shapes_kernel_specialization_strategy",
)


@pytest.mark.trt_rtx
def test_every_name_is_in_the_real_library() -> None:
    import tensorrt_rtx as trt

    for owner, names in (
        (trt.IExecutionContext, CONTEXT),
        (trt.ICudaEngine, (*ENGINE, *ENGINE_DATA)),
        (trt.IRuntimeConfig, CONFIG),
        (trt.IRuntimeCache, ("serialize", "deserialize")),
        (trt.Runtime, ("deserialize_cuda_engine",)),
        (trt.ExecutionContextAllocationStrategy, ("USER_MANAGED",)),
        (trt.CudaGraphStrategy, ("DISABLED",)),
        (trt.DynamicShapesKernelSpecializationStrategy, ("EAGER", "NONE")),
        (trt.DataType, tuple(_DTYPES)),
        (trt.ProfilingVerbosity, ("NONE",)),
    ):
        assert [name for name in names if not hasattr(owner, name)] == [], owner


def test_every_name_is_in_the_fake() -> None:
    assert [name for name in CONTEXT if not hasattr(Context, name)] == []
    assert [name for name in ENGINE if not hasattr(Engine, name)] == []
    assert hasattr(FakeTensorRT(FakeCuda()), "Runtime")


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_a_real_engine_is_mapped_and_refused_for_want_of_a_driver(really_built: Bundle) -> None:
    """The library takes the mapped file and says through our logger what is missing."""
    import tensorrt_rtx as trt

    (part,) = load_engine_record(really_built, "rtx").engines["context_head"]
    loader = PlanLoader(variant_from_module(trt), Cuda(FakeCuda()), {})
    with pytest.raises(EngineMismatchError, match="cannot load") as error:
        loader.load(engine_folder(really_built, "rtx") / part.file, part, 0)
    assert "35" in error.value.found, "cudaErrorInsufficientDriver"
