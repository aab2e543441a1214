"""The published model's engines, built without weights or GPU (`make engines-published`).

Both towers at published widths in bfloat16, with all profiles, for SM 89 and 120, in one engine
each and as programs with experts between; and the small model in float16 for every compute
capability of TensorRT for RTX: each by `twotower build --from-config`, as a user types it, into a
folder that is removed afterwards. Exit code 1 with what is off.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from document import write_between
from watched_command import Ran, run_watched

from twotower.bundle import DATA_SUFFIX, Bundle, EngineRecord, load_engine_record
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.cli.engine_table import launch_facts
from twotower.hardware import RTX_SMS
from twotower.planning import PlanOptions, plan_bundle

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "measurements" / "engines.md"
MARKS = (
    "<!-- engines-published: written by `make engines-published`, begin -->",
    "<!-- engines-published: end -->",
)
SMALL = ROOT / "assets" / "twotower-tiny" / "config.json"
BUSY = 0.1
"""Share of the processors that other programs may use: above it, seconds of the clock say nothing."""

SCRATCH_WITHIN = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One build, and what it is held to; None is not held.

    Attributes:
        name: Of the model, in words.
        config: A config.json.
        dtype: Element type.
        sms: Compute capabilities.
        seconds: Most of the clock, and of one processor whatever else the machine does.
        memory: Most bytes the command and its neediest child have in memory, added.
        nbytes: Most bytes of all engines.
        kernels: Most kernels, by profile; of programs with experts between, those of experts at the
            most rows included.
        planned: Whether scratch is held against `twotower plan`.
        experts: What computes experts, `dense` or `kernels`.
    """

    name: str
    config: Path
    dtype: str = "bfloat16"
    sms: tuple[int, ...] = (89, 120)
    seconds: float | None = None
    memory: int | None = None
    nbytes: int | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    planned: bool = True
    experts: str = "dense"


@dataclass(frozen=True, slots=True)
class Pass:
    """One profile of one engine, as its compiled program tells; of equal programs of a tower it is told once.

    Attributes:
        graph: The graph.
        profile: The profile.
        program: An entry of `programs` in build.json's `inspector`.
        planned: Bytes of scratch `twotower plan` says.
    """

    graph: str
    profile: str
    program: Mapping[str, Any]
    planned: int


@dataclass(frozen=True, slots=True)
class Built:
    """What a build took and left.

    Attributes:
        case: What was asked for.
        ran: What the command took.
        record: Its build.json.
        passes: Every profile of every engine.
        launches: Of passes with experts between programs, by graph and profile; see `launch_facts`.
        weights: Bytes of the model's weights.
        data: Files of weights that lie in the folder.
    """

    case: Case
    ran: Ran
    record: EngineRecord
    passes: tuple[Pass, ...]
    launches: Mapping[str, Mapping[str, Mapping[str, Any]]]
    weights: int
    data: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.record.files.values())

    @property
    def memory(self) -> int:
        """Of the command and its neediest child, each at its peak."""
        return self.ran.peak_memory + max(
            f["peak_memory"] for f in self.record.report["engines"].values()
        )


def published(folder: Path) -> Case:
    """The published model and its figures."""
    config = folder / "config.json"
    config.write_text(json.dumps(PUBLISHED_CONFIG), encoding="utf-8")
    kernels = {"denoise": 570, "block": 640}
    return Case(
        name="the published model",
        config=config,
        seconds=240,
        memory=4 * 10**9,
        nbytes=200 * 10**6,
        kernels=kernels,
    )


def with_experts_between(folder: Path) -> Case:
    """The same, cut at every layer of experts, as it is without a word on experts."""
    whole, kernels = published(folder), {"denoise": 610, "block": 650}
    name = "the published model as programs with experts between"
    return replace(whole, name=name, seconds=90, nbytes=50 * 10**6, kernels=kernels, experts="auto")


SMALL_CASE = Case(name="the small model", config=SMALL, dtype="float16", sms=RTX_SMS, planned=False)
"""For all compute capabilities, in the one dtype that all of them have."""


def main(argv: list[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "out" / "engines-published",
        metavar="OUT",
        help="a folder for scratch files",
    )
    parser.add_argument(
        "--write-docs",
        type=Path,
        nargs="?",
        const=DOCUMENT,
        metavar="FILE",
        help="put the figures into docs/measurements/engines.md",
    )
    args = parser.parse_args(argv)
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    try:
        built = [
            build(case, args.output)
            for case in cases
            or (published(args.output), with_experts_between(args.output), SMALL_CASE)
        ]
    finally:
        shutil.rmtree(args.output)
    text = "\n\n".join(map(told, built))
    print(text)
    if args.write_docs:
        write_between(args.write_docs, MARKS, text)
    problems = [f"{b.case.name}: {problem}" for b in built for problem in problems_of(b)]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


def build(case: Case, scratch: Path) -> Built:
    """Runs the command in an empty folder, which is empty again afterwards.

    Raises:
        SystemExit: the command failed.
    """
    folder = scratch / "programs"
    words = [
        "--from-config",
        str(case.config),
        "--dtype",
        case.dtype,
        "--target",
        "rtx",
        "--sm",
        ",".join(map(str, case.sms)),
    ]
    words += ["--experts", case.experts]
    print(f"... twotower build {folder} {' '.join(words)}", file=sys.stderr, flush=True)
    ran = run_watched([sys.executable, "-m", "twotower.cli", "build", str(folder), *words])
    if ran.code:
        raise SystemExit(ran.code)
    bundle = Bundle.open(folder, contents=False)
    record = load_engine_record(bundle, "rtx")
    plan = plan_bundle(
        bundle.config,
        PlanOptions(target="rtx", dtype=case.dtype, sms=case.sms, expert_path=case.experts),
    )
    passes = tuple(_passes(record, {name: s.profiles for name, s in plan.scratch.items()}))
    weights = sum(w.total for w in plan.weights.values())
    data = tuple(str(file.relative_to(folder)) for file in folder.rglob(f"*{DATA_SUFFIX}"))
    shutil.rmtree(folder)
    return Built(case, ran, record, passes, launch_facts(record), weights, data)


def _passes(record: EngineRecord, planned: Mapping[str, Mapping[str, int]]) -> Iterator[Pass]:
    for graph, engines in record.engines.items():
        for engine in {e.file: e for e in engines}.values():
            told = record.report["engines"][engine.file]["inspector"]
            for program in told.get("programs", ()):
                profile = engine.profiles[program["profile"]].name
                yield Pass(graph, profile, program, planned[graph][profile])


def problems_of(built: Built) -> list[str]:
    """What is not as the case has it, a line each."""
    case, ran = built.case, built.ran
    measured = [
        ("seconds of one processor", ran.cpu_seconds, case.seconds),
        ("bytes of memory", built.memory, case.memory),
        ("bytes of engines", built.nbytes, case.nbytes),
    ]
    if ran.others <= BUSY:
        measured.append(("seconds", ran.seconds, case.seconds))
    out = [
        f"{found:.4g} {what}, allowed {most:.4g}"
        for what, found, most in measured
        if most is not None and found > most
    ]
    out += [f"weights on disk: {', '.join(built.data)}"] if built.data else []
    for engine, facts in built.record.report["engines"].items():
        if why := facts["inspector"].get("why_not"):
            out.append(f"{engine}: the program was not read: {why}")
        out += [
            f"{engine}: unexplained warning: {line['message']}"
            for line in facts["log"]
            if not line["explained"]
        ]
    for graph, passes in built.launches.items():
        for profile, launched in passes.items():
            count, most = (
                (launched["kernels"] or 0) + launched["experts"][-1],
                case.kernels.get(profile),
            )
            if most is not None and count > most:
                out.append(f"{graph}, {profile}: {count} launches, allowed {most}")
    for (graph, profile), (found, planned) in _scratch_of(built).items():
        if case.planned and abs(planned / found - 1) > SCRATCH_WITHIN:
            out.append(f"{graph}, {profile}: scratch of {found} bytes, planned {planned}")
    return out + [
        f"{p.graph}, {p.profile}: {problem}"
        for p in built.passes
        for problem in _problems_of_pass(case, p)
    ]


def _problems_of_pass(case: Case, found: Pass) -> Iterator[str]:
    program, most = found.program, case.kernels.get(found.profile)
    if most is not None and program["kernels"] > most:
        yield f"{program['kernels']} kernels, allowed {most}"
    if program["sms"] != list(case.sms):
        yield f"built for SM {program['sms']}"
    if program["streams"] != 1:
        yield f"{program['streams']} streams"
    if program["capturable"] is not True:
        yield "not capturable"
    if program["expanded"]:
        yield f"{len(program['expanded'])} weights expanded in memory in every pass"


def _scratch_of(built: Built) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes of scratch, found and planned, by graph and profile: of programs that run in turn, the neediest."""
    out: dict[tuple[str, str], tuple[int, int]] = {}
    for p in built.passes:
        found, _ = out.get((p.graph, p.profile), (0, 0))
        out[p.graph, p.profile] = (max(found, p.program["scratch"]), p.planned)
    return out


def told(built: Built) -> str:
    """What was built and what it took in a sentence, and its passes as a table."""
    case, ran = built.case, built.ran
    clock = (
        f"{ran.seconds:.0f} s"
        if ran.others <= BUSY
        else f"{ran.seconds:.0f} s beside other programs"
    )
    sms = ", ".join(map(str, case.sms))
    first = (
        f"Of {case.name} in {case.dtype} ({_size(built.weights)} of weights, none of them there) for SM {sms}: "
        f"{clock}, {ran.cpu_seconds:.0f} s of a processor, {built.memory / 1e9:.2f} GB of memory, {built.nbytes / 1e6:.1f} MB of engines."
    )
    rows = _launch_rows(built) if built.launches else _program_rows(built)
    return first + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _program_rows(built: Built) -> list[list[str]]:
    """A table of the passes of engines that compute all there is."""
    head = [
        "pass",
        "kernels",
        "of a layer: Mamba",
        "MoE",
        "attention",
        "streams",
        "capturable",
        "expanded",
        "scratch",
        "planned",
    ]
    return [
        head,
        ["---"] * len(head),
        *(_cells(p, planned=built.case.planned) for p in built.passes),
    ]


def _launch_rows(built: Built) -> list[list[str]]:
    """A table of what passes launch where experts run between programs."""
    rows_most = built.record.limits.max_batch if built.record.limits else 0
    head = [
        "pass",
        "programs",
        "their files",
        "kernels",
        "with experts, 1 row",
        f"{rows_most} rows",
        "scratch",
        "planned",
    ]
    out = [head, ["---"] * len(head)]
    for graph, passes in built.launches.items():
        files = len({engine.file for engine in built.record.engines[graph]})
        for profile, launched in passes.items():
            kernels, (least, most) = launched["kernels"] or 0, launched["experts"]
            scratch, planned = _scratch_of(built)[graph, profile]
            counts = (launched["programs"], files, kernels, kernels + least, kernels + most)
            out.append(
                [
                    f"{graph}, {profile}",
                    *map(str, counts),
                    f"{scratch / 1e6:.1f} MB",
                    f"{planned / 1e6:.1f} MB",
                ]
            )
    return out


def _cells(found: Pass, *, planned: bool) -> list[str]:
    program = found.program
    return [
        f"{found.graph}, {found.profile}",
        str(program["kernels"]),
        *(_of_a_layer(program["by_kind"].get(kind)) for kind in ("mamba", "moe", "attention")),
        str(program["streams"]),
        "yes" if program["capturable"] else "no",
        f"{len(program['expanded'])} weights" if program["expanded"] else "none",
        f"{program['scratch'] / 1e6:.1f} MB",
        f"{found.planned / 1e6:.1f} MB" if planned else "",
    ]


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 10**9 else f"{count / 1e6:.3g} MB"


def _of_a_layer(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return ""
    return (
        str(counts["min"])
        if counts["min"] == counts["max"]
        else f"{counts['min']} to {counts['max']}"
    )


if __name__ == "__main__":
    sys.exit(main())
