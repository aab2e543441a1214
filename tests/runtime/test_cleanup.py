"""Cleaning up: everything is tried, what failed first is seen, and nothing is freed in a turn."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from twotower.runtime.cleanup import Cleanup, SessionLock, close_all


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


@pytest.mark.parametrize("error", [None, KeyError("the cause")])
def test_the_last_is_done_first_and_the_first_failure_is_raised(error: Exception | None) -> None:
    """The body's own failure is not hidden, and an abandoned iterator is none."""
    done: list[str] = []

    def numbers():  # type: ignore[no-untyped-def]
        with Cleanup(*actions(done)):
            yield 1

    iterator = numbers()
    next(iterator)
    assert not done
    with pytest.raises(KeyError if error else ValueError, match="the cause" if error else "d"):
        iterator.throw(error) if error else iterator.close()
    assert done == ["d", "c", "b", "a"]


def test_nothing_is_done_after_success() -> None:
    done: list[str] = []
    with Cleanup(*actions(done)) as end:
        end.pop_all()
    assert not done
    with pytest.raises(ValueError, match="d"), Cleanup(*actions(done)):
        assert not done
    assert done == ["d", "c", "b", "a"]


# Turns


def test_what_is_let_go_of_inside_turns_waits_for_the_end_of_the_outermost() -> None:
    lock, done = SessionLock(), []
    with lock:
        with lock:
            lock.at_the_end(lambda: done.append(1))
        assert not done
    assert done == [1]
    lock.at_the_end(lambda: done.append(2))
    assert done == [1, 2], "outside a turn it goes at once"


def test_another_thread_does_not_wait_and_the_owner_does_it() -> None:
    lock, done = SessionLock(), []
    with lock:
        thread = threading.Thread(
            target=lambda: lock.at_the_end(lambda: done.append(threading.get_ident()))
        )
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it may hold a lock that this thread is about to ask for"
        assert not done
    assert done == [threading.get_ident()]


def test_a_failure_is_logged_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    lock, done = SessionLock(), []

    def fail() -> None:
        raise ValueError("a defect")

    with lock:
        lock.at_the_end(fail)
        lock.at_the_end(lambda: done.append(1))
    assert done == [1]
    assert "a defect" in caplog.text


def test_nothing_is_forgotten_between_threads() -> None:
    """Of two threads that let go of things, each goes once, and while nobody is at work."""
    lock, done, inside, at_work = SessionLock(), [], [], []

    def work() -> None:
        for _ in range(2000):
            with lock:
                at_work.append(1)
                at_work.pop()

    def let_go(first: int) -> None:
        for number in range(first, first + 2000):

            def gone(number: int = number) -> None:
                inside.extend(at_work)
                done.append(number)

            lock.at_the_end(gone)

    threads = [threading.Thread(target=work) for _ in range(2)]
    threads += [threading.Thread(target=let_go, args=(first,)) for first in (0, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == list(range(4000))
    assert not inside


def test_an_interrupt_while_something_is_let_go_of_leaves_the_session_free() -> None:
    lock = SessionLock()

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lock:
        lock.at_the_end(interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.at_the_end(interrupted)
    taken: list[bool] = []

    def take() -> None:
        with lock:
            taken.append(True)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(10)
    assert taken == [True], "another thread can take it"
