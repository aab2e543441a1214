"""Dataclasses as JSON: round trips, the stored form, and the path an error names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from twotower.errors import RecipeError
from twotower.records import RecordError, decode, encode, stored


@dataclass(frozen=True)
class Axes:
    """Has a form of its own."""

    sizes: tuple[str | int, ...]

    def to_json(self) -> list[Any]:
        return list(self.sizes)

    @classmethod
    def from_json(cls, data: Any) -> "Axes":
        return cls(decode(tuple[str | int, ...], data))


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    size: int
    sha256: str = ""
    path: str | None = None

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"{self.size} bytes")
        if self.size > 1000:
            raise RecipeError("a large file", found=f"{self.size}", do="make it smaller")


@dataclass(frozen=True)
class Record:
    folder: str
    files: Mapping[str, File]
    pair: tuple[int, float]
    axes: tuple[Axes, ...] = ()
    mode: Literal["ar", "auto"] = "auto"
    by_rows: dict[int, float | None] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    facts: Any = field(default=None, metadata=stored(required=True))
    exceptions: tuple[str, ...] = field(default=(), metadata=stored("except"))


FULL = Record(
    "here",
    {"a.onnx": File(size=3, sha256="ab", path="x/y")},
    (1, 0.5),
    (Axes(("B", 4)),),
    "ar",
    {2: 1.5, 3: None},
    frozenset({"q", "p"}),
    {"any": [1, None]},
    ("none",),
)
STORED = {
    "files": {"a.onnx": {"size": 3, "sha256": "ab", "path": "x/y"}},
    "pair": [1, 0.5],
    "axes": [["B", 4]],
    "mode": "ar",
    "by_rows": {"2": 1.5, "3": None},
    "others": ["p", "q"],
    "facts": {"any": [1, None]},
    "except": ["none"],
}
LEAST = {"files": {}, "pair": [0, 0], "facts": None}


def test_a_record_is_stored_as_written_here_and_read_back() -> None:
    text = json.dumps(encode(FULL, leave_out=["folder"]))
    assert json.loads(text) == STORED
    assert list(json.loads(text)) == list(STORED)
    assert decode(Record, json.loads(text), folder="here") == FULL


def test_defaults_may_be_missing_unless_a_field_says_otherwise() -> None:
    assert decode(Record, LEAST, folder="") == Record("", {}, (0, 0))
    with pytest.raises(RecordError, match=r"^facts: missing$"):
        decode(Record, {"files": {}, "pair": [0, 0]}, folder="")


@pytest.mark.parametrize(
    ("changes", "path", "problem"),
    [
        ({"files": {"a": {"size": "3"}}}, 'files["a"].size', "'3', expected a whole number"),
        ({"files": {"a": {"size": True}}}, 'files["a"].size', "True, expected a whole number"),
        ({"files": {"a": {}}}, 'files["a"].size', "missing"),
        ({"files": {"a": {"size": -1}}}, 'files["a"]', "-1 bytes"),
        ({"files": {"a": {"size": 1, "x": 0}}}, 'files["a"].x', "unknown key; known: size, sha256"),
        ({"files": []}, "files", "[], expected an object"),
        ({"pair": [1]}, "pair", "1 entries, expected 2"),
        ({"pair": [1, None]}, "pair[1]", "None, expected a number"),
        ({"pair": "12"}, "pair", "'12', expected a list of 2"),
        ({"axes": [["B", 1.5]]}, "axes[0][1]", "1.5, expected text or a whole number"),
        ({"axes": [["B", False]]}, "axes[0][1]", "False, expected text or a whole number"),
        ({"others": "pq"}, "others", "'pq', expected a list"),
        ({"mode": 1}, "mode", "1, expected 'ar' or 'auto'"),
        ({"by_rows": {"two": 1}}, 'by_rows["two"]', "invalid literal"),
        ({"by_rows": {"2": "x"}}, 'by_rows["2"]', "'x', expected a number"),
        ({"except": None}, "except", "None, expected a list"),
        ({"exceptions": []}, "exceptions", "unknown key"),
        ({"folder": "there"}, "folder", "unknown key"),
    ],
)
def test_an_error_names_the_path(changes: dict[str, Any], path: str, problem: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode(Record, LEAST | changes, folder="")
    assert caught.value.path == path
    assert caught.value.problem.startswith(problem)
    assert str(caught.value) == f"{path}: {caught.value.problem}"


def test_what_is_no_object_has_no_path() -> None:
    with pytest.raises(RecordError, match=r"^\[1\], expected an object$"):
        decode(Record, [1])


def test_unknown_keys_are_left_alone_where_asked() -> None:
    data = {**LEAST, "files": {"a": {"size": 1, "later": 0}}, "later": 0}
    assert decode(Record, data, strict=False, folder="").files == {"a": File(size=1)}


def test_of_a_union_the_type_that_fits_most_deeply_gives_the_error() -> None:
    kinds = tuple[Record | File, ...]
    assert decode(kinds, [{"size": 1}]) == (File(size=1),)
    with pytest.raises(RecordError) as caught:
        decode(kinds, [{"size": "x"}, LEAST])
    assert caught.value.path == "[0].folder"
    with pytest.raises(RecordError, match="pair"):
        decode(kinds, [LEAST | {"folder": "", "pair": [1, "x"]}])


def test_an_error_in_three_parts_stays_one() -> None:
    with pytest.raises(RecipeError, match="a large file"):
        decode(Record, LEAST | {"files": {"a": {"size": 2000}}}, folder="")
