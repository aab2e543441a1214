"""Import adapter of ONNX Runtime: its telemetry is off, and all sessions share their options.

From version 1.29 on the library's official builds for Linux and macOS send usage data to its
vendor: importing it writes an identifier of the machine and a database under the user's cache
folder, and a process that lives for some seconds connects to a server. It decides when it is
loaded, by the environment variable ORT_DISABLE_TELEMETRY: set to 1 here before the import, unless
the variable is set already. ORT_DISABLE_TELEMETRY=0 is therefore the switch that leaves the library
as its vendor ships it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SWITCH = "ORT_DISABLE_TELEMETRY"
_LOADED_BEFORE = "onnxruntime" in sys.modules
os.environ.setdefault(SWITCH, "1")

import onnxruntime as ort  # noqa: E402 - it reads the variable when it is loaded

from twotower.processors import usable_cores  # noqa: E402

__all__ = ["SWITCH", "ort", "session_options"]

_SPIN_MICROSECONDS = 100

# Loaded by the application, too late for the variable: what can still be stopped is.
if _LOADED_BEFORE and os.environ[SWITCH] == "1":
    ort.disable_telemetry_events()


def session_options(folder: Path | None = None, *, threads: int = 0) -> ort.SessionOptions:
    """Options of a session.

    Threads that wait for work spin for at most `_SPIN_MICROSECONDS`, then sleep: long enough for
    the next of a pass's many short operators, and short enough to leave the cores to others. They
    stop when a pass ends: a model has three sessions, one after the other at work, and the threads
    of the other two would take the cores from it.

    Args:
        folder: Where the files of weights are named from. They may lie outside the graph's own
            folder only for a graph passed as bytes.
        threads: Threads to compute with; 0 for one a core that this process may use.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cores()
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
    return options
