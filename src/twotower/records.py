"""Dataclasses as JSON values and back, strictly: an error names the path of what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from twotower.errors import TwoTowerError

T = TypeVar("T")

_SCALARS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    NoneType: "null",
}


class RecordError(ValueError):
    """A JSON value that does not fit its type.

    `path` is where, from the outermost value: `files["a.onnx"].sha256`; empty for that value.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path
        self.problem = problem


def stored(key: str = "", *, required: bool = False) -> dict[str, Any]:
    """Metadata of a dataclass field whose JSON form differs from the usual one.

    Its key may differ from the field's name, or be required although the field has a default.
    """
    return {"key": key, "required": required}


def encode(value: object, *, leave_out: Collection[str] = ()) -> Any:
    """The JSON value of a dataclass (without the fields to `leave_out`), container or scalar.

    Nested values with a `to_json` are encoded by it; that of `value` itself is not asked, so that
    it can be built on this function.
    """
    if is_dataclass(value) and not isinstance(value, type):
        out = {}
        for field in fields(value):
            if field.name not in leave_out:
                out[_key(field)] = _encoded(getattr(value, field.name))
        return out
    if isinstance(value, Mapping):
        return {key: _encoded(content) for key, content in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_encoded(content) for content in value)
    if isinstance(value, (list, tuple)):
        return [_encoded(content) for content in value]
    return value


def _encoded(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    return encode(value)


def decode(kind: type[T], data: object, *, strict: bool = True, **given: object) -> T:
    """The inverse of `encode`.

    Args:
        kind: A dataclass, or a type made of dataclasses, `str`, `int`, `float`, `bool`, `None`,
            `Any`, literals, tuples, lists, sets, mappings with keys of text or whole numbers, and
            unions. Nested classes with a `from_json` are decoded by it; that of `kind` itself is
            not asked.
        data: What `json.loads` returned. Numbers stay what they are: 1 is a `float` too.
        strict: Whether a key that no field has is an error, at any depth.
        given: Fields of `kind` that are not stored, with their values.

    Raises:
        RecordError: a key is missing or unknown, or a value is of another type or refused by its
            class with a ValueError. A TwoTowerError of a class is raised as it is.
    """
    decoder = _Decoder(strict)
    if is_dataclass(kind):
        return cast(T, decoder.record(kind, data, given))
    return cast(T, decoder.value(kind, data))


@dataclass(frozen=True, slots=True)
class _Decoder:
    strict: bool

    def record(self, kind: Any, data: Any, given: Mapping[str, object]) -> Any:
        entries = _require(data, Mapping, "an object")
        hints, by_key = _hints(kind), {}
        for field in fields(kind):
            if field.init and field.name not in given:
                by_key[_key(field)] = field
        values = dict(given)
        for key, field in by_key.items():
            if key in entries:
                with at_path(key):
                    values[field.name] = self.value(hints[field.name], entries[key])
            elif field.metadata.get("required") or _has_no_default(field):
                raise RecordError(key, "missing")
        unknown = [str(key) for key in entries if key not in by_key]
        if self.strict and unknown:
            raise RecordError(unknown[0], f"unknown key; known: {', '.join(by_key)}")
        with at_path(""):
            return kind(**values)

    def value(self, kind: Any, data: Any) -> Any:
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is Any:
            return data
        if kind in _SCALARS:
            return _scalar(kind, data)
        if origin in (Union, UnionType):
            return self._union(arguments, data)
        if origin is Literal:
            return _one_of(arguments, data)
        if origin is tuple and Ellipsis not in arguments:
            entries = _require(
                data,
                Sequence,
                f"a list of {len(arguments)}",
            )
            if len(entries) != len(arguments):
                raise RecordError("", f"{len(entries)} entries, expected {len(arguments)}")
            return tuple(self._entries(arguments, entries))
        if origin in (tuple, list, set, frozenset):
            entries = _require(data, Sequence, "a list")
            return origin(self._entries([arguments[0]] * len(entries), entries))
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(arguments[0], arguments[1], data)
        with at_path(""):
            if hasattr(kind, "from_json"):
                return kind.from_json(data)
            if is_dataclass(kind):
                return self.record(kind, data, {})
        raise TypeError(f"no JSON form of {kind}")

    def _entries(self, kinds: Sequence[Any], entries: Sequence[Any]) -> Iterator[Any]:
        for i, (kind, entry) in enumerate(zip(kinds, entries, strict=True)):
            with at_path(f"[{i}]"):
                yield self.value(kind, entry)

    def _mapping(self, key_kind: type, kind: Any, data: Any) -> dict[Any, Any]:
        out = {}
        for key, content in _require(data, Mapping, "an object").items():
            with at_path(f'["{key}"]'):
                out[key_kind(key)] = self.value(kind, content)
        return out

    def _union(self, kinds: Sequence[Any], data: Any) -> Any:
        """The first type that fits, or the error of the one that fitted most deeply."""
        if data is None and NoneType in kinds:
            return None
        errors, others = [], [kind for kind in kinds if kind is not NoneType]
        for kind in others:
            try:
                return self.value(kind, data)
            except RecordError as e:
                errors.append(e)
        if len(others) > 1 and all(kind in _SCALARS for kind in others):
            expected = " or ".join(_SCALARS[kind] for kind in others)
            raise RecordError("", f"{data!r}, expected {expected}")
        raise max(errors, key=lambda e: e.path.count(".") + e.path.count("["))


@contextmanager
def at_path(step: str) -> Iterator[None]:
    """Puts a key or an index before the path of a RecordError; other ValueErrors become one."""
    try:
        yield
    except RecordError as e:
        separator = "." if step and e.path and not e.path.startswith("[") else ""
        raise RecordError(f"{step}{separator}{e.path}", e.problem) from e
    except TwoTowerError:
        raise
    except ValueError as e:
        raise RecordError(step, str(e)) from e


def _require(data: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    text = isinstance(data, str) and kind is Sequence
    if text or not isinstance(data, kind):
        shown = repr(data)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise RecordError("", f"{shown}, expected {expected}")
    return data


def _scalar(kind: type, data: Any) -> Any:
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if isinstance(data, bool) and kind is not bool:
        accepted = ()
    return _require(data, accepted, _SCALARS[kind])


def _one_of(allowed: Sequence[Any], data: Any) -> Any:
    for value in allowed:
        if type(value) is type(data) and value == data:
            return value
    raise RecordError("", f"{data!r}, expected {' or '.join(map(repr, allowed))}")


def _key(field: Field[Any]) -> str:
    return field.metadata.get("key") or field.name


def _has_no_default(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
