"""How sizes are written wherever people read them: binary units, three significant digits."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float) -> str:
    """A number of bytes as `96.5 KiB` or `118 GiB`; 1 GiB is 2^30 bytes.

    From 1000 of a unit on the next larger one is used, so that no number has four digits.
    """
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    if unit == 0:
        return f"{count:.0f} B"
    return f"{count:.3g} {_UNITS[unit]}"
