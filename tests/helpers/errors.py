"""What a user sees of an error."""

from __future__ import annotations


def check_error(err: str, what: str) -> None:
    """stderr says what happened (with `what`), what was found and what to do, without a stack."""
    assert what in err
    assert "\n  found: " in err
    assert "\n  do: " in err
    assert "Traceback" not in err
