"""Shapes of layers: the shared expert cut, and refusals that name the nearest size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.errors import check_error
from tests.helpers.expert_layers import FORMAT_NAMES, make_shape
from twotower.config.formats import FORMATS, GROUPS
from twotower.errors import BuildError
from twotower.kernels import ExpertFormats, ExpertShape
from twotower.kernels.signatures import kernel_specs
from twotower.kernels.tilings import BUILDABLE_SMS, TIERS, depth

SIZES: dict[str, Any] = {"hidden": 128, "width": 96, "experts": 8, "top": 2}


@pytest.mark.parametrize(
    ("width", "total", "parts"),
    [(1856, 3712, 2), (512, 1024, 2), (96, 128, 2), (64, 64, 1), (64, 32, 1), (100, 201, 3)],
)
def test_a_shared_expert_is_some_experts_everybody_chooses(
    width: int, total: int, parts: int
) -> None:
    shape = ExpertShape(hidden=64, width=width, experts=8, top=2, shared_intermediate=total)
    assert shape.shared == parts
    assert shape.shared * shape.shared_width == total
    assert shape.shared_width <= width


def test_groups_of_a_shared_expert_stay_whole() -> None:
    weights = ExpertFormats(shared_down=replace(FORMATS["int4"], group=64))
    sizes = {**SIZES, "width": 128, "shared_intermediate": 192}
    shape = ExpertShape(**sizes, weights=weights)
    assert (shape.shared, shape.shared_width) == (3, 64)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_plain_data_and_back(name: str) -> None:
    shape = make_shape(128, 256, 8, 2, shared=256, dtype="bfloat16", routed=name, others="int8")
    assert ExpertShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(
    ("changed", "nearest"),
    [
        ({"experts": 2000}, "1024"),
        ({"experts": 0}, "1"),
        ({"top": 9}, "nearest is 8"),
        ({"hidden": 1 << 16}, "32768"),
        ({"dtype": "float64"}, "bfloat16"),
        ({"weights": ExpertFormats(up=replace(FORMATS["int4"], group=96))}, "nearest is 64"),
        ({"weights": ExpertFormats(down=replace(FORMATS["int4"], group=64))}, "groups of 32"),
        ({"hidden": 100, "weights": ExpertFormats(up=FORMATS["int4"])}, "int8 or fp8"),
        ({"weights": ExpertFormats(up=replace(FORMATS["int4"], group=0))}, "16, 32, 64 or 128"),
    ],
)
def test_what_is_not_tiled_is_refused_by_name(changed: dict[str, Any], nearest: str) -> None:
    with pytest.raises(BuildError, match="do not tile") as e:
        ExpertShape(**{**SIZES, **changed})
    check_error(str(e.value), e.value.what)
    assert nearest in e.value.found
    assert "build with --experts dense" in e.value.do
    offered = e.value.do.partition("--group ")[2].partition(",")[0]
    assert not offered or int(offered) in GROUPS


@pytest.mark.parametrize(
    ("sm", "said"), [(75, "bfloat16"), (70, "--sm 80"), (95, "--sm 90"), (103, "--sm 100")]
)
def test_gpus_there_are_no_kernels_for(sm: int, said: str) -> None:
    with pytest.raises(BuildError, match=f"SM {sm}") as e:
        kernel_specs(ExpertShape(**SIZES), sm)
    check_error(str(e.value), e.value.what)
    assert said in str(e.value)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_sums_have_one_order_for_every_number_of_tokens(name: str) -> None:
    """One chain over K in steps of one depth, or a row would depend on how many lie beside it."""
    width = 1920 if "128" in name else 1856
    shape = make_shape(2688, width, 128, 6, shared=3712, dtype="bfloat16", routed=name)
    for sm in BUILDABLE_SMS:
        for which in ("up", "down"):
            specs = [s for s in kernel_specs(shape, sm) if s.function == which]
            assert [s.constants["BK"] for s in specs] == [depth(shape)] * len(TIERS)
