"""How long it takes at least until weights are on their devices: from a disk, then across PCIe."""

from __future__ import annotations

from dataclasses import dataclass

ASSUMED_DISK_RATE = 3_000_000_000
"""Bytes a second, assumed for reading large files from one NVMe drive: PCIe 3.0 drives are
specified for 3 to 3.5 GB/s, 4.0 drives for 5 to 7. Network disks of clouds give a tenth of it."""


@dataclass(frozen=True, slots=True)
class LoadTime:
    """Seconds of the two ways weights go, which overlap.

    `disk` reads every byte once; `link` is PCIe at its published rate to the device that gets most,
    as each has a link of its own; None where the rate is not known.
    """

    disk: float
    link: float | None

    @property
    def seconds(self) -> float:
        """Of the slower one."""
        return max(self.disk, self.link or 0.0)

    @property
    def bound(self) -> str:
        """Which one that is: `disk` or `PCIe`."""
        return "disk" if self.disk >= (self.link or 0.0) else "PCIe"


def load_time(
    nbytes: int,
    most: int,
    *,
    disk_rate: float,
    link_rate: float,
) -> LoadTime:
    """The time of loading `nbytes`, of which one device gets `most`; rates in bytes a second.

    A `link_rate` of 0 is not known.
    """
    return LoadTime(nbytes / disk_rate, most / link_rate if link_rate else None)
