"""The time to load is that of the slower way, and every device has a link of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config.model import parse_model_config
from twotower.errors import ConfigError
from twotower.hardware import Gpu
from twotower.planning import GPUS, PlanOptions, fit, gpu_at_hand, gpus_named
from twotower.planning.load_time import ASSUMED_DISK_RATE, LoadTime, load_time

PUBLISHED = parse_model_config(PUBLISHED_CONFIG, "published")
TRT = PlanOptions(target="trt")
WEIGHTS = 126.4e9  # of both towers in bfloat16
LINK = 64e9  # 16 lanes of PCIe 5.0, one way


def load(options: PlanOptions, gpu: str) -> LoadTime:
    (found,) = fit(PUBLISHED, options, gpus_named(gpu))
    assert found.load is not None
    return found.load


def test_the_slower_way_counts() -> None:
    assert load_time(100, 100, disk_rate=10, link_rate=50) == LoadTime(10, 2)
    assert LoadTime(10, 2).seconds == LoadTime(2, 10).seconds == 10
    assert [LoadTime(10, 2).bound, LoadTime(2, 10).bound] == ["disk", "PCIe"]
    unknown = load_time(100, 100, disk_rate=10, link_rate=0)
    assert (unknown.link, unknown.seconds, unknown.bound) == (None, 10, "disk")


def test_the_published_model_from_a_disk_and_from_a_faster_one() -> None:
    slow = load(TRT, "H200")
    assert slow.seconds == pytest.approx(WEIGHTS / ASSUMED_DISK_RATE, rel=1e-3)
    fast = load(replace(TRT, disk_rate=10**12), "H200")
    assert (fast.bound, fast.seconds) == ("PCIe", pytest.approx(WEIGHTS / LINK, rel=1e-3))


def test_two_devices_read_the_disk_once_and_have_two_links() -> None:
    one, two = load(TRT, "H100"), load(TRT, "2x H100")
    assert two.disk == one.disk
    assert two.link == pytest.approx(one.link / 2, rel=0.02) if one.link else False
    three = load(TRT, "3x H100")
    assert three.disk == one.disk, "every byte is read once, however the layers are spread"


def test_only_the_weights_of_the_mode_count() -> None:
    assert load(replace(TRT, mode="ar"), "H200").disk == pytest.approx(63.2e9 / 3e9, rel=1e-2)
    assert load(replace(TRT, experts="int4"), "H200").disk < 0.4 * load(TRT, "H200").disk


def test_what_is_mapped_is_not_loaded() -> None:
    (found,) = fit(PUBLISHED, PlanOptions(target="ort-cpu"), [GPUS[0]])
    assert found.load is None
    assert found.to_json()["load"] is None


def test_a_card_at_hand_has_the_link_of_its_name() -> None:
    known = Gpu("NVIDIA GeForce RTX 4090", 89, 24 * 10**9)
    other = Gpu("NVIDIA GeForce RTX 4090 Laptop GPU", 89, 16 * 10**9)
    assert [gpu.link for gpu in gpu_at_hand([known, other])] == [32 * 10**9, 0]


def test_a_rate_is_at_least_one_byte_a_second() -> None:
    with pytest.raises(ConfigError, match="--disk-rate cannot be 0"):
        PlanOptions(disk_rate=0)
