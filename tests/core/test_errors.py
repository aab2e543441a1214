"""Errors keep their three parts, also across processes."""

import pickle

from twotower.errors import BuildError, TwoTowerError


def test_three_parts_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(BuildError("it broke", found="a crack", do="mend it")))
    assert isinstance(error, BuildError)
    assert isinstance(error, TwoTowerError)
    assert str(error) == "it broke\n  found: a crack\n  do: mend it"
