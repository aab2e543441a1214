"""From plan bytes to programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from twotower.builders.trt.rtx_program.analysis import copied_caches, expanded_weights, with_scopes
from twotower.builders.trt.rtx_program.program import Kernel, Program, Region, Tensor
from twotower.builders.trt.rtx_program.text import (
    LAYOUT,
    PlanBytes,
    ProgramText,
    Statement,
    greatest_sizes,
    program_texts,
    split_text,
    unreadable,
)
from twotower.spec import (
    BLOCK,
    CHUNK_LENGTH,
    COMMIT_FLOOR,
    CONDITIONING,
    CONTEXT_LENGTH,
    EXPERTS_OUT,
    HIDDEN,
    NOISE,
    PAST_LENGTH,
    RESIDUAL_IN,
    TEMPERATURE,
    THRESHOLD,
    TOKENS,
)

_HOST = ("shape_call", "assert")
_EVENTS = ("signal", "wait")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_VERSION = re.compile(r"\.\d+$")
_DIM = re.compile(r'"([^"]*)"|(-?\d+)')
_REGION = re.compile(r"^  region = \{(.*)\}$", re.MULTILINE)
_COMPILERS_OWN = "__mye"
_STATE = re.compile(r"(past|present)(_\w+)?\.\d+(\.(key|value))?")
_DATA = frozenset(
    {TOKENS, CHUNK_LENGTH, PAST_LENGTH, HIDDEN, BLOCK, CONTEXT_LENGTH, THRESHOLD, COMMIT_FLOOR}
    | {TEMPERATURE, NOISE, RESIDUAL_IN, CONDITIONING, EXPERTS_OUT}
)
"""Inputs of our graphs that are data, states left out; any other input of a program is a weight."""


def read_programs(plan: PlanBytes, *, profiles: int | None = None) -> tuple[Program, ...]:
    """The compiled programs of a TensorRT for RTX plan, one for every optimization profile.

    Nothing is loaded and no GPU is needed; what is told are launches, fusions and memory as the
    compiler planned them, not which kernels the device's own compiler will choose, nor times.

    Args:
        plan: The serialized engine.
        profiles: How many profiles it was built with, where that is known.

    Raises:
        ProgramTextError: there is none, it is damaged, or its layout is unknown.
    """
    programs = [read_program_text(text) for text in program_texts(plan)]
    numbers = sorted(program.profile for program in programs)
    expected = list(range(profiles if profiles is not None else max(len(programs), 1)))
    if numbers != expected:
        found = ", ".join(map(str, numbers)) or "none"
        raise unreadable(f"programs of profiles {found} instead of {', '.join(map(str, expected))}")
    return tuple(sorted(programs, key=lambda program: program.profile))


def read_program_text(text: str) -> Program:
    """One program from its text; errors as of `read_programs`."""
    parts = split_text(text)
    header = parts.header
    layout = header.word("version")
    if layout != str(LAYOUT):
        raise unreadable(f"its layout is {layout or 'not stated'}")
    tensors = _Tensors(parts)
    main = [s for s in parts.statements("main") if s.operation not in _HOST]
    kernels = [_kernel(s, tensors) for s in main if s.operation not in _EVENTS]
    if not kernels:
        raise unreadable("it launches nothing")
    program = Program(
        profile=_profile(header),
        sms=_sms(header),
        kernels=with_scopes(kernels),
        streams=header.number("n_streams"),
        events=header.number("n_events"),
        signals=sum(s.operation == "signal" for s in main),
        waits=sum(s.operation == "wait" for s in main),
        capturable={"1": True, "0": False}.get(header.word("stream_capturable") or ""),
        regions=tensors.regions,
        tensors={name: tensors[name] for k in kernels for name in (*k.reads, *k.writes)},
        expanded=(),
        copied=(),
    )
    if any(not 0 <= s.number("stream") < program.streams for s in main):
        raise unreadable(f"it uses more streams than the {program.streams} it states")
    return replace(
        program,
        expanded=expanded_weights(program, _weight_inputs(header)),
        copied=copied_caches(program),
    )


def _sms(header: Statement) -> tuple[int, ...]:
    found = re.search(r"^  accelerators=\{([^}]*)\}", header.body, re.MULTILINE)
    if found is None:
        raise unreadable("its header does not state what it was compiled for")
    words = found[1].split()
    return tuple(sorted(int(w[2:]) for w in words if re.fullmatch(r"sm\d+", w)))


def _names_of(header: Statement, key: str) -> tuple[str, ...]:
    names = header.names(key)
    if names is None:
        raise unreadable(f"its header has no list '{key}'")
    return names


def _profile(header: Statement) -> int:
    """Names of all but the first profile carry its number; those the compiler gave do not."""
    given = [*_names_of(header, "inputs"), *_names_of(header, "outputs")]
    names = [name for name in given if not name.startswith(_COMPILERS_OWN)]
    found = set()
    for name in names:
        mark = _PROFILE.search(name)
        found.add(int(mark[1]) if mark else 0)
    if len(found) != 1:
        raise unreadable(f"its inputs belong to profiles {', '.join(map(str, sorted(found)))}")
    return found.pop()


def _weight_inputs(header: Statement) -> frozenset[str]:
    shapes = set(header.names("shape_inputs") or ())
    names = {_plain(name) for name in _names_of(header, "inputs") if name not in shapes}
    return frozenset(name for name in names - _DATA if not _STATE.fullmatch(name))


def _plain(name: str) -> str:
    """A tensor's name without the mark of its profile and the number of its version."""
    return _VERSION.sub("", _PROFILE.sub("", name))


class _Tensors:
    """Tensors of a program by the names its statements use; a view stands for what it views."""

    def __init__(self, parts: ProgramText) -> None:
        self.regions = tuple(_region(m[1]) for m in _REGION.finditer(parts.header.body))
        self._sizes = greatest_sizes(parts)
        self._shapes = {n for s in parts.host_statements() for n in s.names("output") or ()}
        known = {region.name for region in self.regions}
        self._all: dict[str, Tensor] = {}
        self._bases: dict[str, str] = {}  # what each view is of
        for statement in parts.statements("descriptors"):
            made = self._described(statement)
            if made.region not in known | {""}:
                raise unreadable(f"a tensor lies in an unknown region '{made.region}'")
            name, base = statement.word("name") or "", statement.word("base")
            self._all[name] = made
            if base is not None and statement.operation == "sub_tensor":
                self._bases[name] = base

    def __getitem__(self, name: str) -> Tensor:
        """The tensor a plain name stands for."""
        return self._all[name]

    def resolve(self, names: Sequence[str]) -> tuple[str, ...]:
        """Keys of the tensors a statement names, views resolved and sizes left out."""
        out = []
        for name in names:
            if name in self._shapes:  # a size that the host works out, and no data
                continue
            for _ in self._bases:  # so often at most, should views be of one another
                if name not in self._bases:
                    break
                name = self._bases[name]
            if name not in self._all:
                raise unreadable(f"a kernel names a tensor that is not described: '{name}'")
            out.append(name)
        return tuple(out)

    def _described(self, statement: Statement) -> Tensor:
        if statement.operation not in ("tensor", "sub_tensor"):
            raise unreadable(f"it describes a '{statement.operation}'")
        name, dtype = statement.word("name"), statement.word("type")
        listed = re.search(r"(?<![\w])dims=\{([^}]*)\}", statement.body)
        if name is None or dtype is None or listed is None:
            raise unreadable(f"a description lacks name, type or dims: {statement.body[:60]!r}")
        dims = _DIM.findall(listed[1])
        return Tensor(
            name=_plain(name),
            dtype=dtype,
            dims=tuple(self._sizes.get(var) if var else int(number) for var, number in dims),
            region=statement.word("region") or "",
            fixed=not any(var for var, _ in dims),
        )


def _region(body: str) -> Region:
    statement = Statement("region", body)
    name, place = statement.word("name"), statement.word("place")
    if name is None or place not in ("accelerator", "host"):
        raise unreadable(f"a region has no name or an unknown place: {body[:60]!r}")
    constant = statement.word("constant") == "true" or "-consts" in name
    return Region(name, statement.number("size"), place, constant)


def _kernel(statement: Statement, tensors: _Tensors) -> Kernel:
    """A statement that launches work; one of an unknown kind does too if it reads and writes."""
    reads = _first(statement, "input_args", "input")
    writes = _first(statement, "output_args", "output")
    if writes is None:
        raise unreadable(f"'{statement.operation}' writes nothing that is known of")
    return Kernel(
        operation=statement.operation,
        name=_PROFILE.sub("", statement.word("name") or ""),
        stream=statement.number("stream"),
        nodes=tuple(dict.fromkeys(_NODE.findall(_PROFILE.sub("", statement.word("layers") or "")))),
        scope="",
        backbone=statement.word("backbone") or "",
        reads=tensors.resolve(reads or ()),
        writes=tensors.resolve(writes),
    )


def _first(statement: Statement, *keys: str) -> tuple[str, ...] | None:
    return next((names for key in keys if (names := statement.names(key)) is not None), None)
