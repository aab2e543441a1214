"""Commands as they are typed, run in this process."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.errors import check_error


class Output(NamedTuple):
    out: str
    err: str


class Commands:
    """`twotower` with some words: a string is split as a shell does it, a path is one word."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path, code: int = 0) -> Output:
        """Runs a command and checks its exit code."""
        from twotower.cli.main import main

        line = " ".join(word if isinstance(word, str) else shlex.quote(str(word)) for word in words)
        self._capsys.readouterr()
        exited = main(shlex.split(line))
        output = Output(*self._capsys.readouterr())
        assert exited == code, output
        return output

    def json(self, *words: str | Path, code: int = 0) -> Any:
        """What it prints with `--json`."""
        return json.loads(self(*words, "--json", code=code).out)

    def refused(self, *words: str | Path, what: str) -> str:
        """Checks that it prints nothing but an error of three parts; returns that."""
        out, err = self(*words, code=2)
        assert out == ""
        check_error(err, what)
        return err
