"""Checks that tell a sound engine from a broken one, each named after what must hold."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import TwoTowerError
from twotower.runtime import StepRecord, TwoTower

DIFFUSION = GenerationConfig(max_new_tokens=48, confidence_threshold=0.8, ignore_eos=True)
"""A threshold at which a sound model commits more than one token a pass."""

_CHAIN = "reference answer"
_SMALL_MODEL = {
    "architectures": ["NemotronHTwoTowerForCausalLM"],
    "hybrid_override_pattern": "ME*-M",
    "num_hidden_layers": 5,
    "hidden_size": 48,
    "vocab_size": 211,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 10,
    "n_groups": 3,
    "conv_kernel": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "time_step_limit": [0.0, math.inf],
    "torch_dtype": "float32",
}
"""All four layer kinds, every size small and different."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check: `ok` is None where it could not be made; `detail` says what was seen."""

    name: str
    ok: bool | None
    detail: str

    def facts(self, target: str | None) -> dict[str, Any]:
        """The check as `twotower doctor --json` prints it."""
        return {**asdict(self), "target": target}


def ordinary_tokens(config: ModelConfig) -> npt.NDArray[np.int64]:
    """Token ids of a vocabulary without its special tokens."""
    special = [config.mask_token_id, config.pad_token_id, *config.eos_token_ids]
    return np.setdiff1d(np.arange(config.vocab_size), special)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position at which two texts differ, their ends included; None if they are equal."""
    if a == b:
        return None
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def check_bundle(model: TwoTower) -> Iterator[CheckResult]:
    """Generates in ways that must agree with one another; a few seconds on a small model."""
    rng = np.random.default_rng(0)
    words = ordinary_tokens(model.config)
    prompts = [rng.choice(words, n).tolist() for n in (9, 1, 33)]
    steps: list[StepRecord] = []
    try:
        alone = model.generate(prompts[0], DIFFUSION, on_step=steps.append)
        together = model.generate(list(reversed(prompts)), DIFFUSION)[-1]
        decoded = model.generate(prompts[0], _autoregressive(8)).tokens
        prefilled = model.generate([*prompts[0], *decoded[:4]], _autoregressive(4)).tokens
    except TwoTowerError as e:
        yield CheckResult("generation", False, str(e))
        return
    finite = all(np.isfinite(s.confidence).all() for s in steps)
    yield CheckResult(
        "confidences are finite",
        finite,
        f"{len(steps)} denoiser passes",
    )
    at = first_difference(alone.tokens, together.tokens)
    detail = "alone and in a batch of three" if at is None else f"the texts differ from token {at}"
    yield CheckResult("output is independent of batch composition", at is None, detail)
    agree = decoded[4:] == prefilled
    detail = "8 autoregressive tokens"
    yield CheckResult("prefill and token-by-token decoding agree", agree, detail)
    mask = model.config.mask_token_id
    yield CheckResult(
        "no mask token in the text",
        mask not in alone.tokens,
        f"mask token {mask}",
    )
    # Not a failure: random weights and hard texts stay near 1. A trained model at exactly 1.0 has
    # lost its parallelism.
    rate = alone.usage.tokens_per_nfe
    detail = f"{rate:.2f} tokens a pass at threshold {DIFFUSION.confidence_threshold}"
    yield CheckResult("more than one token a pass", rate > 1 or None, detail)


def _autoregressive(tokens: int) -> GenerationConfig:
    return GenerationConfig(mode="ar", max_new_tokens=tokens, ignore_eos=True)


def check_chain(
    say: Callable[[str], None] = lambda what: None, target: str = "ort-cpu"
) -> Iterator[CheckResult]:
    """A small random model through export, build and generation, compared with plain torch."""
    with tempfile.TemporaryDirectory(prefix="twotower-doctor-") as scratch:
        try:
            yield from _chain(Path(scratch), say, target)
        except ImportError as e:
            detail = f"not checked, it needs the extras `export` and `cpu`: {e}"
            yield CheckResult(_CHAIN, None, detail)
        except TwoTowerError as e:
            yield CheckResult(_CHAIN, False, str(e))


def _chain(scratch: Path, say: Callable[[str], None], target: str) -> Iterator[CheckResult]:
    import torch  # noqa: PLC0415 - the check is for environments that can export

    from twotower.builders import build_engines, builder_for  # noqa: PLC0415
    from twotower.checkpoint.synthetic import write_checkpoint  # noqa: PLC0415
    from twotower.export import Checkpoint, export_bundle  # noqa: PLC0415
    from twotower.export.verify import TOLERANCE, verify_bundle  # noqa: PLC0415
    from twotower.model.loading import load_context_tower, load_denoiser_tower  # noqa: PLC0415
    from twotower.model.reference import reference_generate  # noqa: PLC0415

    checkpoint = Checkpoint.open(write_checkpoint(scratch / "checkpoint", _SMALL_MODEL))
    say("exporting a small random model")
    outcome: dict[str, Any] = {}

    def verify(*arguments: Any) -> dict[str, Any]:
        outcome.update(verify_bundle(*arguments))
        return outcome

    bundle = export_bundle(checkpoint, scratch / "bundle", verify=verify)
    detail = f"error {outcome['largest_error']:.1e}, allowed {TOLERANCE:.0e}"
    yield CheckResult("exported graphs compute the torch towers", True, detail)
    say("building and generating")
    build_engines(bundle, target, builder_for(target))

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(checkpoint.tensors[name].numpy().copy())

    config = checkpoint.config
    towers = load_context_tower(config, read), load_denoiser_tower(config, read)
    prompt = list(range(5, 25))
    with TwoTower.open(bundle.path, target=target) as model:
        for mode in ("diffusion", "ar"):
            options = GenerationConfig(
                mode=mode, max_new_tokens=40, confidence_threshold=0.5, ignore_eos=True
            )
            got = list(model.generate(prompt, options).tokens)
            same = got == reference_generate(towers, prompt, options).tokens
            detail = "40 tokens, the shipped loop against plain torch"
            yield CheckResult(f"{_CHAIN}, {mode}", same, detail)
        yield from check_bundle(model)


OpenEngine = Callable[..., AbstractContextManager[TwoTower]]
"""Opens an engine with options of `TwoTower.open` (`graphs`, `devices`)."""

_TOKENS = 48


def check_execution(open_engine: OpenEngine, *, devices: int) -> Iterator[CheckResult]:
    """Checks of an engine on one or several GPUs (`devices`) against itself.

    It is opened once for each way, one at a time, as two might not fit.
    """
    with open_engine() as model:
        words = ordinary_tokens(model.config)
        prompts = [np.random.default_rng(n).choice(words, n).tolist() for n in (9, 40)]
        try:
            wanted = _texts(model, prompts)
        except TwoTowerError as e:
            yield CheckResult("generation as usual", False, str(e))
            return

        def relocate(record: StepRecord) -> None:
            if record.step == 0:
                model.relocate()

        moved = partial(_texts, model, prompts, on_step=relocate)
        yield _same("keys and values in other memory for every block", wanted, moved)

    def reopened(options: dict[str, Any]) -> list[tuple[int, ...]]:
        with open_engine(**options) as other:
            return _texts(other, prompts)

    yield _same(
        "passes launched piece by piece",
        wanted,
        partial(reopened, {"graphs": False}),
    )
    if devices > 1:
        apart = partial(reopened, {"devices": (0, 1)})
        yield _same("a tower on each of two GPUs", wanted, apart)


def _texts(model: TwoTower, prompts: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    """Both modes: one prompt after the other, and together."""
    out: list[tuple[int, ...]] = []
    for mode in ("diffusion", "ar"):
        config = GenerationConfig(
            mode=mode, max_new_tokens=_TOKENS, confidence_threshold=0.5, ignore_eos=True
        )
        for batch in ([prompts[0]], [prompts[1]], prompts):
            out += [result.tokens for result in model.generate(batch, config, **options)]
    return out


def _same(
    name: str, wanted: list[tuple[int, ...]], run: Callable[[], list[tuple[int, ...]]]
) -> CheckResult:
    try:
        seen = run()
    except TwoTowerError as e:
        return CheckResult(name, False, str(e))
    differ = sum(a != b for a, b in zip(wanted, seen, strict=True))
    end = f", {differ} of them differ" if differ else ", the same"
    return CheckResult(
        name,
        not differ,
        f"{len(wanted)} texts of {_TOKENS} tokens{end}",
    )
