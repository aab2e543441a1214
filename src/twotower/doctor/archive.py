"""The archive of a report: `results.json`, the logs of its sections, and the page made from it."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from twotower import __version__
from twotower.doctor.page import device_page, page_name
from twotower.doctor.scrub import Scrubber
from twotower.doctor.sections import NOT_ASKED
from twotower.errors import ConfigError
from twotower.files import write_output

RESULTS_FILE, LOGS_FILE = "results.json", "logs.tar.gz"
SCHEMA = 1


@dataclass(slots=True)
class Archive:
    """An archive that is written while its sections are asked.

    `device` is the name of what was looked at and the page's; `scrubber` takes private text out of
    everything that is written.
    """

    folder: Path
    device: str
    made_by: str
    scrubber: Scrubber = field(default_factory=Scrubber)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Adds the result of a section (see `ask_section`) and writes `results.json` anew.

        ConfigError if it cannot be written.
        """
        self.sections[name] = self.scrubber.data(result)
        text = json.dumps(self.results, indent=1) + "\n"
        write_output(self.folder / RESULTS_FILE, text, error=ConfigError)

    @property
    def results(self) -> dict[str, Any]:
        """What `results.json` holds."""
        return {
            "schema": SCHEMA,
            "made_by": self.made_by,
            "twotower": __version__,
            "date": date.today().isoformat(),
            "device": self.device,
            "sections": self.sections,
        }

    def finish(self, work: Path) -> None:
        """Writes the logs found in a folder and the page; ConfigError if one cannot be written."""
        logs = _packed_logs(sorted(work.glob("*.log")), self.scrubber)
        write_output(self.folder / LOGS_FILE, logs, error=ConfigError)
        write_page(self.folder, self.results)


def _packed_logs(logs: Iterable[Path], scrubber: Scrubber) -> bytes:
    """Log files as one compressed tar, without private text, owners or times."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for log in logs:
            text = scrubber.text(log.read_text(encoding="utf-8", errors="replace")).encode()
            entry = tarfile.TarInfo(log.name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    return out.getvalue()


def read_results(file: Path) -> dict[str, Any]:
    """Reads a `results.json`; ConfigError if there is none this version reads."""
    do = f"name the {RESULTS_FILE} that `make gpu-first-hour` or `twotower doctor --report` wrote"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{file} cannot be read",
            found=f"{type(e).__name__}: {e}",
            do=do,
        ) from e
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA or not isinstance(results.get("sections"), dict):
        found = f"schema {schema!r}, this version reads {SCHEMA}"
        raise ConfigError(f"{file} holds no results of this version", found=found, do=do)
    return dict(results)


def merge_results(some: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of several runs on one device as one; of two answers of a section the later counts.

    ConfigError if they are of different devices.
    """
    runs = list(some)
    devices = sorted({run["device"] for run in runs})
    if len(devices) > 1:
        raise ConfigError(
            "results of different devices make no page",
            found=", ".join(devices),
            do="name the results of one device",
        )
    sections: dict[str, Any] = {}
    for run in runs:
        for name, result in run["sections"].items():
            if name not in sections or result["state"] != NOT_ASKED:
                sections[name] = result
    return {**runs[-1], "sections": sections}


def write_page(folder: Path, results: Mapping[str, Any]) -> Path:
    """Writes the page of a device into a folder, over an older one; ConfigError if it cannot."""
    file = folder / page_name(results["device"])
    write_output(file, device_page(results), error=ConfigError)
    return file
