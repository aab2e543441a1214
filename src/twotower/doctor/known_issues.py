"""What is publicly known to go wrong in inference libraries, by the symptom it shows: data, and a pure look-up."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["KNOWN_ISSUES", "KnownIssue", "Setting", "Symptom", "explain"]


class Symptom(StrEnum):
    """What can be told from outside about a wrong engine."""

    CRASHED = "the process died"
    NOT_FINITE = "numbers that are not finite"
    ZEROS = "zeros instead of results"
    CONSTANT = "one token everywhere"
    FIRST = "wrong from the first token on"
    LATER = "right at first, wrong later"
    GROWN = "wrong once the cache has grown past its first bucket"
    PADDED = "wrong only while a longer text shares the cache"
    COMPANY = "wrong only in a batch of several rows"
    ALONE = "wrong only in a batch of one row"
    GRAPHS = "wrong only when a CUDA graph is replayed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where a symptom was seen.

    Attributes:
        target: For example `rtx`.
        dtype: Element type of the engine.
        sm: Compute capability of the GPU, e.g. 89; None on a CPU or where it is not known.
        operators: Operators of the graphs, as far as they are known.
    """

    target: str
    dtype: str
    sm: int | None = None
    operators: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownIssue:
    """One defect.

    Attributes:
        name: What it is.
        symptoms: Any of these points to it.
        reference: Where it is discussed.
        do: What to do about it.
        targets: Where it can occur; likewise `dtypes`, `sms` and `operators`, empty for anywhere.
    """

    name: str
    symptoms: frozenset[Symptom]
    reference: str
    do: str
    targets: tuple[str, ...] = ("trt", "rtx")
    dtypes: tuple[str, ...] = ()
    sms: tuple[int, ...] = ()
    operators: tuple[str, ...] = ()

    def fits(self, symptoms: Collection[Symptom], setting: Setting) -> bool:
        """Whether it shows one of the symptoms and can occur there."""
        return (
            bool(self.symptoms & set(symptoms))
            and setting.target in self.targets
            and (not self.dtypes or setting.dtype in self.dtypes)
            and (not self.sms or setting.sm in self.sms)
            and (not self.operators or bool(setting.operators & set(self.operators)))
        )

    @property
    def narrowness(self) -> int:
        """How much of a setting it names: what fits closely is shown first."""
        return sum(map(bool, (self.dtypes, self.sms, self.operators))) + (len(self.symptoms) == 1)


_WRONG = frozenset({Symptom.FIRST, Symptom.LATER})

KNOWN_ISSUES: tuple[KnownIssue, ...] = (
    KnownIssue(
        name="fused attention is silently wrong in half precision",
        symptoms=_WRONG | {Symptom.PADDED},
        reference="NVIDIA/TensorRT #4837",
        do="build a float32 bundle to see whether it is this; then build with attention decomposed, or run --target ort-cuda",
        dtypes=("float16", "bfloat16"),
        sms=(120, 121),
    ),
    KnownIssue(
        name="the builder dies on bfloat16 graphs",
        symptoms=frozenset({Symptom.CRASHED}),
        reference="NVIDIA/TensorRT #4842",
        do="export with --dtype float16 and build that",
        dtypes=("bfloat16",),
    ),
    KnownIssue(
        name="float32 results differ from TensorRT 10.13",
        symptoms=_WRONG,
        reference="NVIDIA/TensorRT #4813",
        do="compare with --target ort-cuda on the same GPU; if that is right, keep to it or build a half-wide bundle",
        targets=("trt",),
        dtypes=("float32",),
        sms=(89, 120),
    ),
    KnownIssue(
        name="TF32 is on by default: float32 products keep ten bits",
        symptoms=frozenset({Symptom.LATER}),
        reference="the libraries' documentation of TF32",
        do="run with NVIDIA_TF32_OVERRIDE=0; if the tokens are then right, nothing is broken",
        targets=("trt", "rtx", "ort-cuda"),
        dtypes=("float32",),
    ),
    KnownIssue(
        name="slices of bfloat16 tensors are inaccurate",
        symptoms=_WRONG,
        reference="NVIDIA/TensorRT #4718",
        do="export with --dtype float16 and build that",
        targets=("trt",),
        dtypes=("bfloat16",),
        operators=("Slice",),
    ),
    KnownIssue(
        name="float16 overflows beyond 65504",
        symptoms=frozenset({Symptom.NOT_FINITE}),
        reference="the range of the type",
        do="export with --dtype bfloat16",
        targets=("trt", "rtx", "ort-cuda"),
        dtypes=("float16",),
    ),
    KnownIssue(
        name="an engine for a family of GPUs is refused by this one and its outputs stay zero",
        symptoms=frozenset({Symptom.ZEROS, Symptom.CONSTANT}),
        reference="pytorch/TensorRT #4481",
        do="build on this machine for this GPU (`twotower build BUNDLE --target T --force`)",
    ),
    KnownIssue(
        name="a refused launch while a CUDA graph is captured leaves a graph that replays old results",
        symptoms=frozenset({Symptom.GRAPHS}),
        reference="pytorch/TensorRT PR #4662",
        do="open with graphs=False, which launches every pass by itself, and report which pass was captured",
        targets=("trt", "rtx", "ort-cuda"),
    ),
    KnownIssue(
        name="neighbouring products are fused wrongly for one row: fluent text that means nothing",
        symptoms=frozenset({Symptom.ALONE, Symptom.FIRST}),
        reference="NVIDIA/TensorRT-Edge-LLM #105, #151",
        do="build with the environment variable __LUNOWUD='-peep:fc_h_fusion=off -peep:match_dual_gemm=off' and check again",
    ),
    KnownIssue(
        name="attention reads the unused end of the cache when it is told lengths and not given a mask",
        symptoms=frozenset({Symptom.PADDED, Symptom.GROWN}),
        reference="NVIDIA/TensorRT-Model-Connect #955, #1035, #1047, #1048",
        do="export again with this version: its graphs mask explicitly",
        operators=("Attention",),
    ),
    KnownIssue(
        name="several CumSum operators with other axes or directions give wrong results",
        symptoms=_WRONG,
        reference="NVIDIA/TensorRT #4551, #4513",
        do="export again with this version: its graphs have none",
        operators=("CumSum",),
    ),
)
"""The narrow ones and the wide ones alike; `explain` puts those that fit most closely first."""


def explain(symptoms: Collection[Symptom], setting: Setting) -> tuple[KnownIssue, ...]:
    """The known issues that show one of the symptoms and can occur in this setting, the closest fit first."""
    fitting = [issue for issue in KNOWN_ISSUES if issue.fits(symptoms, setting)]
    return tuple(sorted(fitting, key=lambda issue: -issue.narrowness))
