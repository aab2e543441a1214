"""GPUs as data: memory, compute capability and bandwidths as the vendor publishes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from twotower.errors import ConfigError
from twotower.hardware import Gpu


@dataclass(frozen=True, slots=True)
class GpuModel:
    """One kind of GPU, or several of a kind; rates are at best, 0 where unknown.

    Attributes:
        name: As it is asked for with `--gpu`.
        memory: Bytes of one.
        sm: Compute capability as e.g. 89.
        bandwidth: Bytes a second of its memory.
        count: How many of them.
        link: Bytes a second PCIe brings to one.
        flops: Multiplications and additions a second of 16-bit matrix products, sums in float32, no
            sparsity. Products of 8-bit numbers run twice as fast.
    """

    name: str
    memory: int
    sm: int
    bandwidth: int = 0
    count: int = 1
    link: int = 0
    flops: float = 0.0

    @property
    def title(self) -> str:
        """The name, with the number in front if there are several."""
        if self.count == 1:
            return self.name
        return f"{self.count}x {self.name}"


PCIE_4, PCIE_5 = 32 * 10**9, 64 * 10**9  # 16 lanes, one direction, before the protocol's own share

# Memory, bandwidth and matrix products a second as public specifications of these cards give them,
# entered by hand. The published memory is counted as 1e9 bytes a GB; a device reports a few percent
# more, so the table errs on the side of "does not fit".
_SPECIFIED = (  # name, GB, SM, GB a second, PCIe, TFLOP a second, how many
    ("RTX 4090", 24, 89, 1008, PCIE_4, 165.2, 1),
    ("RTX 5090", 32, 120, 1792, PCIE_5, 209.5, 1),
    ("RTX PRO 6000 Blackwell", 96, 120, 1792, PCIE_5, 503.8, 1),
    ("H100 80GB", 80, 90, 3350, PCIE_5, 989.4, 1),
    ("H100 80GB", 80, 90, 3350, PCIE_5, 989.4, 2),
    ("H200", 141, 90, 4800, PCIE_5, 989.4, 1),
    ("B200", 180, 100, 8000, PCIE_5, 2250.0, 1),
)
GPUS = tuple(
    GpuModel(
        name,
        gb * 10**9,
        sm,
        rate * 10**9,
        count=count,
        link=link,
        flops=tera * 1e12,
    )
    for name, gb, sm, rate, link, tera, count in _SPECIFIED
)
"""The GPUs a plan is made for when none is named; H100 and H200 are the SXM modules."""


def gpus_named(name: str) -> tuple[GpuModel, ...]:
    """The GPUs of a name such as `RTX 4090`, `h100`, `2x H100` or `all`.

    ConfigError if no GPU of the table, or more than one kind, goes by that name.
    """
    if name.strip().lower() == "all":
        return GPUS
    several = re.fullmatch(r"\s*(\d+)\s*x\s+(.+)", name)
    count, wanted = (int(several[1]), _plain(several[2])) if several else (1, _plain(name))
    single = [gpu for gpu in GPUS if gpu.count == 1]
    exact = [gpu for gpu in single if _plain(gpu.name) == wanted]
    found = exact or [gpu for gpu in single if wanted and wanted in _plain(gpu.name)]
    if len(found) != 1 or count < 1:
        which = "is no GPU" if found else "is unknown"
        if len(found) > 1:
            which = f"could be {' or '.join(gpu.name for gpu in found)}"
        known = ", ".join(gpu.name for gpu in single)
        raise ConfigError(
            f"--gpu {name!r} {which}",
            found=f"known: {known}; also all, or several as e.g. 2x H100",
            do="name one of them",
        )
    return (replace(found[0], count=count),)


def gpu_at_hand(gpus: Sequence[Gpu]) -> tuple[GpuModel, ...]:
    """The kinds of GPU that were probed, with the memory the driver says.

    Rates are those of the table's card of that name, if it has the same words as the driver's: an
    RTX 4090 Laptop or an H100 PCIe is another card.
    """
    others = {"laptop", "pcie", "nvl", "max", "d", "mig", "server"}
    kinds = dict.fromkeys(GpuModel(gpu.name, gpu.memory, gpu.sm) for gpu in gpus)
    out = []
    for kind in kinds:
        words = set(kind.name.lower().replace("-", " ").split())
        for known in GPUS:
            named = set(known.name.lower().replace("80gb", "").split())
            if known.count == 1 and named <= words and not words & others:
                kind = replace(known, name=kind.name, memory=kind.memory, sm=kind.sm)
                break
        out.append(kind)
    return tuple(out)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
