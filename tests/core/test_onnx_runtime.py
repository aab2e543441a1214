"""What importing ONNX Runtime through our adapter writes and sends: nothing, unless asked to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.helpers.processes import run_python
from tests.helpers.source import ROOT
from twotower.onnx_runtime import SWITCH, session_options
from twotower.processors import usable_cores

PATIENCE = 120.0
SESSION = """
import os, sys
from twotower.onnx_runtime import ort, session_options
from onnx import TensorProto, helper
a, b = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "ab")
graph = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "g", [a], [b])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
given = model.SerializeToString(), session_options()
session = ort.InferenceSession(*given, providers=["CPUExecutionProvider"])
session.run(None, {"a": [1.0, 2.0]})
links = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
home = os.environ["HOME"]
print(*(link for link in links if "socket:" in link or link.startswith(home)), flush=True)
sys.stdin.read()
"""


@contextmanager
def process(home: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A session in a process with a new home and a bare environment, which lives until it is left.

    Bare, because the library also keeps quiet where it sees the variables of a continuous
    integration.
    """
    (home / "tmp").mkdir(parents=True)
    bare = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "PYTHONPATH": str(ROOT / "src"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", SESSION],
        env={**bare, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        yield started
        started.communicate("")
        assert started.returncode == 0


def open_files(started: subprocess.Popen[str]) -> list[str]:
    """Sockets, and files in its home, that it has open after its first run."""
    assert started.stdout is not None
    return started.stdout.readline().split()


def written(home: Path) -> list[str]:
    return sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())


class Proxy:
    """A proxy on this machine that notes who is asked for, and refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.spoken = Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                self.asked.append(connection.recv(4096).decode("ascii", "replace").split("\r\n")[0])
                self.spoken.set()
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.slow
def test_the_adapter_keeps_the_library_silent(tmp_path: Path) -> None:
    """Beside a process that lets it speak, to know that this test would notice."""
    silent, loud = Proxy(), Proxy()
    with (
        process(tmp_path / "silent", https_proxy=silent.address) as ours,
        process(tmp_path / "loud", https_proxy=loud.address, **{SWITCH: "0"}) as vendors,
    ):
        assert open_files(ours) == []
        assert any("onnxruntime" in path for path in open_files(vendors))
        assert loud.spoken.wait(PATIENCE), (
            "the library is silent where it may speak: this test would notice nothing"
        )
    assert written(tmp_path / "silent") == []
    assert any("onnxruntime" in path for path in written(tmp_path / "loud"))
    assert silent.asked == []


def test_the_switch_is_the_library_s_own_variable(tmp_path: Path) -> None:
    """Who imports the library first has decided; processes that we start get it all the same."""
    code = "import os, twotower.onnx_runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, want in (("", "1"), ("1", "1"), ("0", "0")):
        before = code if given else f"import os; del os.environ['{SWITCH}']; {code}"
        environment = {"HOME": str(tmp_path), "CI": "true", SWITCH: given or "unset"}
        done = run_python("-c", before, check=True, **environment)
        assert done.stdout.split() == [want]


@pytest.mark.parametrize(
    ("loaded", "given", "want"), [(True, "1", 1), (True, "0", 0), (False, "1", 0)]
)
def test_a_library_that_was_loaded_before_is_told_to_stop(
    loaded: bool, given: str, want: int
) -> None:
    code = f"""
import os, sys
os.environ["{SWITCH}"] = "{given}"
os.environ["CI"] = "true"
calls = []
if {loaded}:
    import onnxruntime
    onnxruntime.disable_telemetry_events = lambda: calls.append(1)
import twotower.onnx_runtime
print(len(calls))
"""
    assert run_python("-c", code, check=True).stdout.split() == [str(want)]


def test_options_are_those_every_session_starts_from(tmp_path: Path) -> None:
    options = session_options(tmp_path, threads=3)
    assert options.intra_op_num_threads == 3
    assert 0 < int(options.get_session_config_entry("session.intra_op.spin_duration_us")) <= 200, (
        "then a thread sleeps"
    )
    assert options.get_session_config_entry("session.force_spinning_stop") == "1", (
        "no thread spins between passes"
    )
    assert options.get_session_config_entry(
        "session.model_external_initializers_file_folder_path"
    ) == str(tmp_path.resolve())
    assert session_options().intra_op_num_threads == usable_cores()
