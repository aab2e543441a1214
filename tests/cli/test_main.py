"""The command tree: help that teaches, errors that name the way out, exit codes to trust."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.source import ROOT
from twotower import __version__
from twotower.cli.main import VERBS, build_parser, main
from twotower.errors import ConfigError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """`inspect` does nothing until a test gives it something to do."""
    monkeypatch.setattr("twotower.cli.inspect.run", lambda args: 0)
    return monkeypatch


def test_help_lists_every_verb_and_a_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "twotower inspect CHECKPOINT" in out
    for verb, summary in VERBS.items():
        assert verb in out
        assert summary.split()[0] in out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_option_and_shows_an_example(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"example: twotower {verb}" in capsys.readouterr().out
    tree = next(a for a in build_parser(verb)._actions if isinstance(a, argparse._SubParsersAction))
    unexplained = [a.dest for a in tree.choices[verb]._actions if not a.help]
    assert not unexplained


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"twotower {__version__}\n"


@pytest.mark.parametrize(
    "words", ["", "destroy", "build", "generate b", "generate b text --tokens 5", "build b -x"]
)
def test_words_it_does_not_know_exit_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert "usage: twotower" in capsys.readouterr().err


def test_an_error_has_three_parts_and_debug_shows_its_stack(
    failing: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise ConfigError("it broke", found="this", do="that")

    failing.setattr("twotower.cli.inspect.run", run)
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == "ConfigError: it broke\n  found: this\n  do: that\n"
    with pytest.raises(ConfigError):
        main(["inspect", "x", "--debug"])


@pytest.mark.parametrize("how", ["key", "signal"])
def test_interruption_exits_with_130(
    failing: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    def run(args: argparse.Namespace) -> int:
        if how == "key":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        return 0

    before = signal.getsignal(signal.SIGTERM)
    failing.setattr("twotower.cli.inspect.run", run)
    assert main(["inspect", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_programming_errors_are_not_dressed_up_and_logging_stays_out_of_stdout(
    failing: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        logging.getLogger("twotower.test").warning("careful")
        return {}["nothing"]

    failing.setattr("twotower.cli.inspect.run", run)
    with pytest.raises(KeyError):
        main(["inspect", "x"])
    assert capsys.readouterr().out == ""


def test_a_reader_that_goes_away_is_no_error(built_bundle: Path) -> None:
    """`twotower inspect bundle | head -0`: nobody reads the pipe when the command writes."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "twotower.cli", "inspect", str(built_bundle)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
        )
    assert done.returncode == 0
    assert "Broken" not in done.stderr
