"""Commands in processes that have imported everything beforehand, so that hundreds of them are quick.

`Worker` starts this file as a process with the shim loaded; that process imports the command line and
its libraries once, and forks for every command.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.faults.control import Control, Fault
from twotower.cli.main import build_parser, main

ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = ("numpy", "onnx", "onnx_ir", "onnxruntime", "safetensors.numpy", "tokenizers", "torch")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        seconds: How long it took.
        calls: System calls of the fault's kinds.
        fired: Whether the fault's call was reached.
        words: What it wrote to stdout and stderr.
    """

    code: int
    seconds: float
    calls: int
    fired: bool
    words: str


class Worker:
    """Runs commands one after the other."""

    def __init__(self, scratch: Path, shim: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._scratch = scratch
        self._control = Control(scratch / "control")
        environment = {
            **os.environ,
            "FAULT_CONTROL": str(self._control.file),
            "LD_PRELOAD": str(shim),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            "XDG_CACHE_HOME": str(scratch / "cache"),
        }
        command = [sys.executable, "-m", "tools.faults.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self,
        arguments: Sequence[str],
        fault: Fault | None = None,
        *,
        kill_after: float | None = None,
    ) -> Ended:
        """Runs `twotower ARGUMENTS`, with a fault, or killed after some seconds."""
        log = self._scratch / "log"
        self._ask({"arguments": list(arguments), "log": str(log)})
        process = self._answer()["process"]
        if fault is not None:
            self._control.arm(fault, process)
        begin = time.monotonic()
        self._ask({"go": True})
        if kill_after is not None:
            self._wait_and_kill(process, kill_after)
        code = self._answer()["code"]
        seconds = time.monotonic() - begin
        calls, fired = self._control.count, self._control.fired
        self._control.disarm()
        return Ended(code, seconds, calls, fired, log.read_text(errors="replace"))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _wait_and_kill(self, process: int, seconds: float) -> None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it was quicker, and has been waited for
            os.kill(process, signal.SIGKILL)

    def _ask(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def serve() -> None:
    """The process's side: reads commands, forks for each, tells how it ended."""
    for name in _LIBRARIES:
        __import__(name)
    build_parser(None)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        command = json.loads(line)
        ready, go = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(go)
            os.read(ready, 1)
            _command(command["arguments"], command["log"])
        os.close(ready)
        print(json.dumps({"process": process}), file=answers, flush=True)
        sys.stdin.readline()
        os.close(go)  # the child reads the end of the pipe
        _, status = os.waitpid(process, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code}), file=answers, flush=True)


def _command(arguments: Sequence[str], log: str) -> None:
    """Runs one command in this process and ends it."""
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
    os.dup2(1, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        code = main(arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:  # noqa: BLE001 - what the interpreter would do: a stack, and exit code 1
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
