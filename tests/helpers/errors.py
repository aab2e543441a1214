"""What a user sees of an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

Texts = str | Sequence[str]


def check_error(err: str, what: str) -> None:
    """stderr says what happened (with `what`), what was found and what to do, without a stack."""
    assert what in err
    assert "\n  found: " in err
    assert "\n  do: " in err
    assert "Traceback" not in err


@contextmanager
def fails(
    kind: type[Exception], match: str = "", *, what: Texts = (), found: Texts = (), do: Texts = ()
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """The block raises such an error, and its three parts contain these texts."""
    with pytest.raises(kind, match=match or None) as caught:
        yield caught
    for part, texts in (("what", what), ("found", found), ("do", do)):
        for text in (texts,) if isinstance(texts, str) else texts:
            assert text in getattr(caught.value, part)
