"""Cleaning up: everything is tried, and what is seen is what failed first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from twotower.runtime.cleanup import Cleanup, close_all


def actions(done: list[str]) -> list[Callable[[], None]]:
    """a, b, c and d, of which b and d fail."""

    def action(name: str) -> Callable[[], None]:
        def act() -> None:
            done.append(name)
            if name in "bd":
                raise ValueError(name)

        return act

    return [action(name) for name in "abcd"]


def test_all_are_done_and_the_first_failure_is_raised() -> None:
    done: list[str] = []
    with pytest.raises(ValueError, match="b"):
        close_all(actions(done))
    assert done == ["a", "b", "c", "d"]


def test_the_last_is_done_first_and_the_first_failure_is_raised() -> None:
    done: list[str] = []
    with pytest.raises(ValueError, match="d"), Cleanup(*actions(done)):
        assert not done
    assert done == ["d", "c", "b", "a"]


def test_a_failure_of_the_body_is_not_hidden() -> None:
    done: list[str] = []
    with pytest.raises(KeyError, match="the cause"), Cleanup(*actions(done)):
        raise KeyError("the cause")
    assert done == ["d", "c", "b", "a"]


def test_nothing_is_done_after_success() -> None:
    done: list[str] = []
    with Cleanup(*actions(done)) as end:
        end.pop_all()
    assert not done


def test_an_abandoned_iterator_is_no_failure_and_hides_none() -> None:
    done: list[str] = []

    def numbers():  # type: ignore[no-untyped-def]
        with Cleanup(*actions(done)):
            yield 1

    iterator = numbers()
    next(iterator)
    with pytest.raises(ValueError, match="d"):
        iterator.close()
    assert done == ["d", "c", "b", "a"]
