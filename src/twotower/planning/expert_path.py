"""What computes the experts of a plan, as the build would choose it, and what follows of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from twotower.builders.base import DENSE, FUSED, KERNELS
from twotower.builders.expert_kernels import require_kernels
from twotower.builders.ort.fusable import RELU2_SINCE, require_fusable
from twotower.bundle import ExpertsStep
from twotower.checkpoint.layout import Role
from twotower.config.formats import stack_is_expanded, stored_format
from twotower.config.model import LayerKind, ModelConfig
from twotower.errors import BuildError, ConfigError
from twotower.planning.plan_options import (
    TENSORRT,
    PlanOptions,
    all_formats,
    engine_dtype,
    formats_of,
    rounded_of,
)
from twotower.planning.weights import AS_STORED, EXPERT_FORMATS

CHOSEN = "chosen"
"""Of `ort-cpu`: products of the tokens that chose an expert, in the graph."""

FUSED_SINCE = ".".join(map(str, RELU2_SINCE))
"""The version of ONNX Runtime that fused experts are planned for; the GPU machine has its own."""

_WITHOUT_COPIES = (KERNELS, FUSED)
"""What reads quantized experts as they are stored."""

_EXPERT_KINDS = (Role.ROUTED_EXPERT.value, Role.SHARED_EXPERT.value)


@dataclass(frozen=True, slots=True)
class ExpertPath:
    """What computes the experts.

    `kernels`, `fused` or `chosen` compute the chosen ones; `dense`, the engine, all of them, with
    the reason in `why`; the name is empty for a model without experts.
    """

    name: str
    why: str = ""

    @property
    def chosen_only(self) -> bool:
        """Whether experts that no token of a pass chose are neither read nor computed."""
        return self.name in (KERNELS, FUSED, CHOSEN)


def expert_path(config: ModelConfig, options: PlanOptions) -> ExpertPath:
    """What computes the experts: what was asked for, or what `twotower build` takes by itself."""
    if LayerKind.MOE not in config.layers:
        return ExpertPath("")
    if options.expert_path == DENSE:
        return ExpertPath(DENSE, "--expert-path dense asks for it")
    if options.target == "ort-cpu":
        return ExpertPath(CHOSEN)
    kernels = options.target in TENSORRT or options.expert_path == KERNELS
    try:
        (_require_kernels if kernels else _require_fused)(config, options)
    except BuildError as e:
        return ExpertPath(DENSE, f"{e.what} ({e.found})")
    return ExpertPath(KERNELS if kernels else FUSED)


def require_path(config: ModelConfig, options: PlanOptions) -> None:
    """Refuses kernels and fused experts where there are none.

    ConfigError if `--expert-path` names them for such a target, model, number of rows or GPU.
    """
    path, target = options.expert_path, options.target
    if path not in (KERNELS, FUSED):
        return
    found = "" if LayerKind.MOE in config.layers else "the model has no routed experts"
    if path == KERNELS and target == "ort-cpu":
        found = f"target {target}; the kernels run on GPUs, of rtx, trt and ort-cuda"
    if path == FUSED and target != "ort-cuda":
        found = f"target {target}; the operator is of ONNX Runtime on a GPU, ort-cuda"
    try:
        if not found:
            (_require_kernels if path == KERNELS else _require_fused)(config, options)
    except BuildError as e:
        found = f"{e.what}: {e.found}"
    if found:
        do = "leave --expert-path out, which takes what computes the chosen experts where it can"
        raise ConfigError(f"--expert-path {path} does not apply", found=found, do=do)


def _require_fused(config: ModelConfig, options: PlanOptions) -> None:
    """What the build of `ort-cuda` asks, of a library that is new enough."""
    require_fusable(expert_step(config, options), FUSED_SINCE)


def _require_kernels(config: ModelConfig, options: PlanOptions) -> None:
    """What the build asks before it cuts a tower at its experts."""
    step = expert_step(config, options)
    sms = (*options.sms, *options.run_on)
    require_kernels(step, sms, max_batch=options.max_batch)


def on_gpus(options: PlanOptions, sms: Sequence[int]) -> PlanOptions:
    """The options for GPUs of these compute capabilities; 0 is one nobody knows."""
    return replace(options, run_on=tuple(sorted({sm for sm in sms if sm})))


def expert_step(config: ModelConfig, options: PlanOptions) -> ExpertsStep:
    """A layer of experts as a build describes it to the kernels, weights and code left out."""
    few = dict(formats_of(options))
    routed, shared = (few.get(kind) for kind in _EXPERT_KINDS)
    rounded = _EXPERT_KINDS[0] in rounded_of(options)
    widths = {"up": config.hidden_size, "down": config.moe_intermediate_size}
    formats = {}
    if routed:
        for matrix, columns in widths.items():
            how = stored_format(routed, columns, stacked=True, rounded_input=rounded)
            formats[matrix] = (routed, how.group)
    if shared and config.shared_intermediate:
        widths["down"] = config.shared_intermediate
        for matrix, columns in widths.items():
            how = stored_format(shared, columns, stacked=False)
            formats[f"shared_{matrix}"] = (shared, how.group)
    return ExpertsStep(
        layer=config.indices(LayerKind.MOE)[0],
        hidden=config.hidden_size,
        width=config.moe_intermediate_size,
        experts=config.n_routed_experts,
        top=config.num_experts_per_tok,
        shared_intermediate=config.shared_intermediate,
        dtype=engine_dtype(config, options),
        formats=formats,
        code="",
        weights={},
    )


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Experts of a layer that some token of a pass chose, E (1 - (1 - k/E)^N), as expected.

    Each of N tokens chooses k of E, uniformly and independently. Tokens of one text choose more
    alike, and so fewer.
    """
    count = config.n_routed_experts
    if not count:
        return 0.0
    return float(count * (1 - (1 - config.num_experts_per_tok / count) ** tokens))


def outside_engines(config: ModelConfig, options: PlanOptions) -> tuple[str, ...]:
    """Layer kinds whose weights no engine holds or reads, because kernels do."""
    if expert_path(config, options).name != KERNELS:
        return ()
    return _EXPERT_KINDS


def experts_are_expanded(config: ModelConfig, options: PlanOptions) -> bool:
    """Whether a pass writes quantized experts to memory at full width and reads them again.

    Kernels and fused experts dequantize in registers, products of `ort-cpu` do not expand integers.
    """
    name, path = dict(formats_of(options)).get(_EXPERT_KINDS[0]), expert_path(config, options).name
    if name is None or path in _WITHOUT_COPIES or (path == CHOSEN and name in AS_STORED):
        return False
    rounded = _EXPERT_KINDS[0] in rounded_of(options)
    return stack_is_expanded(options.target, name, rounded_input=rounded)


def left_out(config: ModelConfig, options: PlanOptions) -> tuple[str, ...]:
    """Formats of experts that save memory and are no alternative: a pass would expand them."""
    quantized = all_formats(options) or options.target == "ort-cpu"
    if LayerKind.MOE not in config.layers or quantized:
        return ()
    tried = ((name, replace(options, experts=name)) for name in EXPERT_FORMATS)
    return tuple(name for name, other in tried if experts_are_expanded(config, other))


def segments_of(config: ModelConfig, options: PlanOptions) -> int:
    """What `--segments` cuts a tower into for its share of the devices.

    ONNX Runtime runs graphs whole; programs between experts are spread as they are.
    """
    if options.target not in TENSORRT or expert_path(config, options).name == KERNELS:
        return 1
    if options.mode == "ar":
        return options.devices
    return -(-options.devices // 2)
