"""Fixtures of the tests of commands."""

import pytest

from tests.helpers.commands import Commands


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)
