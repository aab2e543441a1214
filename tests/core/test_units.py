"""Sizes in words."""

from __future__ import annotations

import pytest

from twotower.units import format_bytes


@pytest.mark.parametrize(
    ("count", "want"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (96.5 * 2**10, "96.5 KiB"),
        (999.6 * 2**20, "0.976 GiB"),
        (118 * 2**30, "118 GiB"),
        (3 * 2**50, "3.07e+03 TiB"),
    ],
)
def test_sizes(count: float, want: str) -> None:
    assert format_bytes(count) == want
