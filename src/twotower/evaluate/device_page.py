"""What a device showed, as a page of Markdown: its facts, the checks of every target that runs on it, the time of a pass."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError

__all__ = ["device_page", "page_name", "write_device_page"]

_MARK = {True: "ok", False: "**FAILED**", None: "note"}


def page_name(device: str) -> str:
    """The file of a device: its name in lower case, words joined by hyphens."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower())) + ".md"


def device_page(facts: dict[str, Any], device: str, day: date) -> str:
    """The page.

    Args:
        facts: What `twotower doctor --json` prints.
        device: The name of what the engines ran on.
        day: When.
    """
    gpus = [f"{g['name']}, SM {g['sm']}, {g['memory_bytes'] / 2**30:.0f} GiB" for g in facts["gpus"]]
    lines = [
        f"# {device}",
        "",
        f"Written by `twotower doctor --report` of version {facts['twotower']} on {day.isoformat()}. Nothing here is typed by hand.",
        "",
        *_table(
            ("", ""),
            [
                ("GPUs", "; ".join(gpus) or "none"),
                ("driver", facts.get("driver") or "none"),
                ("processor", f"{facts['processor']}, {facts['cpus']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB"),
                ("system", f"{facts['system']}, Python {facts['python']}"),
                ("libraries", ", ".join(f"{k} {v}" for k, v in facts["libraries"].items()) or "none"),
                ("bundle", facts.get("bundle") or "a small random model, made for the check"),
            ],
        ),
        "",
        "## Targets",
        "",
        *_table(("target", "on this machine"), list(facts["targets"].items())),
        "",
        "## Checks",
        "",
        *_table(("target", "check", "", "what was seen"), [(c["target"], c["name"], _MARK[c["ok"]], c["detail"]) for c in facts["checks"]]),
    ]
    if facts.get("passes"):
        lines += ["", "## Time of a pass", "", *_table(_PASS_HEAD, [_pass_row(p) for p in facts["passes"]]), "", _PASS_NOTE]
    return "\n".join(lines) + "\n"


_PASS_HEAD = (
    "target",
    "type",
    "context",
    "denoiser pass",
    "weights read",
    "GB/s",
    "16-token extension and head",
    "weights read",
    "GB/s",
    "runs",
)
_PASS_NOTE = (
    "Medians of wall-clock times from the launch until the result is on the host, one row. Weights read are all weights of the\n"
    "tower as the bundle stores them, and GB/s is that over the time, as if a pass read every weight once. No limit is claimed."
)


def write_device_page(folder: Path, facts: dict[str, Any], device: str, *, day: date | None = None) -> Path:
    """Writes the page into a folder that exists, over an older one of the same device.

    Raises:
        ConfigError: the page cannot be written there.
    """
    file = folder / page_name(device)
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(device_page(facts, device, day or date.today()), encoding="utf-8")
        partial.replace(file)
    except OSError as e:
        raise ConfigError(f"the page {file} cannot be written", found=str(e), do="name a folder that exists and can be written to") from e
    return file


def _pass_row(p: dict[str, Any]) -> tuple[str, ...]:
    return (
        p["target"],
        p["dtype"],
        f"{p['context']}",
        f"{p['denoise_ms']:.3f} ms",
        f"{p['denoiser_bytes'] / 1e6:.1f} MB",
        f"{p['denoise_gb_per_s']:.1f}",
        f"{p['extend_ms']:.3f} ms",
        f"{p['context_bytes'] / 1e6:.1f} MB",
        f"{p['extend_gb_per_s']:.1f}",
        f"{p['runs']}",
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*head], ["---"] * len(head), *cells)]
