"""Import adapter of ONNX Runtime: its telemetry is off, and all sessions share their options.

From version 1.29 on the official builds for Linux and macOS send usage data to the vendor:
importing the library writes an identifier of the machine and a database under the user's cache
folder, and a process that lives for some seconds connects to a server. It reads the environment
variable ORT_DISABLE_TELEMETRY when it is loaded: set to 1 here before the import unless it is set
already, so ORT_DISABLE_TELEMETRY=0 leaves the library as its vendor ships it.
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
    """Options of a session; 0 threads are one for each core that this process may use.

    Threads that wait for work spin for at most `_SPIN_MICROSECONDS`: long enough for the next of a
    pass's many short operators, short enough to leave the cores to others. They stop when a pass
    ends, because a model has three sessions, of which one at a time works.

    Weights are named from `folder`, which may differ from the graph's own only for a graph passed
    as bytes.
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
