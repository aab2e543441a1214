"""Quick checks that tell a sound chain from a broken one, each named after the failure it finds."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.config import GenerationConfig
from twotower.errors import TwoTowerError
from twotower.runtime import StepRecord, TwoTower

__all__ = ["CheckResult", "check_bundle", "check_chain"]

_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check: `ok` is None where it could not be made; `detail` says what was seen."""

    name: str
    ok: bool | None
    detail: str


def check_bundle(model: TwoTower) -> Iterator[CheckResult]:
    """Generates with an opened bundle in ways that must agree with one another; a few seconds on a small model."""
    c = model.config
    rng = np.random.default_rng(0)
    words = np.setdiff1d(
        np.arange(c.vocab_size), [c.mask_token_id, c.pad_token_id, *c.eos_token_ids]
    )
    prompts = [rng.choice(words, n).tolist() for n in (9, 1, 33)]
    diffusion = GenerationConfig(
        max_new_tokens=_NEW_TOKENS, confidence_threshold=0.8, ignore_eos=True
    )
    steps: list[StepRecord] = []
    try:
        alone = model.generate(prompts[0], diffusion, on_step=steps.append)
        together = model.generate(list(reversed(prompts)), diffusion)[-1]
        texts = [
            model.generate(
                prompts[0], GenerationConfig(mode="ar", max_new_tokens=8, ignore_eos=True)
            )
        ]
        texts.append(
            model.generate(
                [*prompts[0], *texts[0].tokens[:4]],
                GenerationConfig(mode="ar", max_new_tokens=4, ignore_eos=True),
            )
        )
    except TwoTowerError as e:
        yield CheckResult("generation", False, str(e))
        return
    finite = all(np.isfinite(s.confidence).all() for s in steps)
    yield CheckResult("confidences are finite", finite, f"{len(steps)} denoiser passes")
    same = alone.tokens == together.tokens
    yield CheckResult(
        "a text does not depend on its neighbours",
        same,
        "alone and in a batch of three" if same else _difference(alone, together),
    )
    joined = texts[0].tokens[4:] == texts[1].tokens
    yield CheckResult(
        "tokens read one by one and as a prompt give the same state",
        joined,
        "8 autoregressive tokens",
    )
    masked = c.mask_token_id in alone.tokens
    yield CheckResult("no mask token in the text", not masked, f"mask token {c.mask_token_id}")
    # Not a failure: random weights and hard texts stay near 1. A trained model at exactly 1.0 has
    # lost its parallelism.
    rate = alone.usage.tokens_per_nfe
    yield CheckResult(
        "more than one token a pass", rate > 1 or None, f"{rate:.2f} tokens a pass at threshold 0.8"
    )


def check_chain(
    progress: Callable[[str], None] | None = None, target: str = "ort-cpu"
) -> Iterator[CheckResult]:
    """Known answer: a small random model through export, build and generation on one target, against the plain torch loop."""
    try:
        import torch  # noqa: F401, PLC0415 - the check is for environments that can export

        from twotower.checkpoint.synthetic import write_checkpoint  # noqa: PLC0415
    except ImportError as e:
        yield _not_checked(e)
        return
    with tempfile.TemporaryDirectory(prefix="twotower-doctor-") as scratch:
        checkpoint = write_checkpoint(Path(scratch) / "checkpoint", _small_config())
        try:
            yield from _known_answer(
                checkpoint,
                Path(scratch) / "bundle",
                target=target,
                progress=progress or (lambda what: None),
            )
        except (TwoTowerError, ImportError) as e:
            yield (
                _not_checked(e)
                if isinstance(e, ImportError)
                else CheckResult("known answer", False, str(e))
            )


def _not_checked(missing: ImportError) -> CheckResult:
    return CheckResult(
        "known answer", None, f"not checked, it needs the extras `export` and `cpu`: {missing}"
    )


def _known_answer(
    checkpoint: Path, bundle: Path, *, target: str, progress: Callable[[str], None]
) -> Iterator[CheckResult]:
    import torch  # noqa: PLC0415

    from twotower.builders import build_engines, builder_for  # noqa: PLC0415
    from twotower.export import Checkpoint, export_bundle  # noqa: PLC0415
    from twotower.export.verify import TOLERANCE, verify_bundle  # noqa: PLC0415
    from twotower.model.loading import load_context_tower, load_denoiser_tower  # noqa: PLC0415
    from twotower.model.reference import reference_generate  # noqa: PLC0415

    progress("exporting a small random model")
    opened = Checkpoint.open(checkpoint)
    outcome: dict[str, Any] = {}

    def verify(*arguments: Any) -> dict[str, Any]:
        outcome.update(verify_bundle(*arguments))
        return outcome

    exported = export_bundle(opened, bundle, verify=verify)
    yield CheckResult(
        "exported graphs compute the torch towers",
        True,
        f"error {outcome['largest_error']:.1e}, allowed {TOLERANCE:.0e}",
    )
    progress("building and generating")
    build_engines(exported, target, builder_for(target))

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(opened.tensors[name].numpy().copy())

    towers = load_context_tower(opened.config, read), load_denoiser_tower(opened.config, read)
    prompt = list(range(5, 25))
    with TwoTower.open(bundle, target=target) as model:
        for mode in ("diffusion", "ar"):
            config = GenerationConfig(
                mode=mode, max_new_tokens=40, confidence_threshold=0.5, ignore_eos=True
            )
            got, want = (
                model.generate(prompt, config).tokens,
                reference_generate(towers, prompt, config).tokens,
            )
            yield CheckResult(
                f"known answer, {mode}",
                list(got) == want,
                "40 tokens, the shipped loop against plain torch",
            )
        yield from check_bundle(model)


def _small_config() -> dict[str, Any]:
    """All four layer kinds, every size small and different."""
    return {
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


def _difference(a: Any, b: Any) -> str:
    at = next(
        (i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y),
        min(len(a.tokens), len(b.tokens)),
    )
    return f"the texts part at token {at}"
