"""The context tower is the `nemotron_h` model of transformers, for every layer kind."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.helpers.source import ROOT
from tests.helpers.towers import read
from twotower.config import ModelConfig
from twotower.model import ContextTower
from twotower.model.loading import load_context_tower

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 6,
    "mamba_head_dim": 12,
    "ssm_state_size": 14,
    "n_groups": 3,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 36,
    "intermediate_size": 40,
    "routed_scaling_factor": 1.7,
    "n_group": 1,
    "topk_group": 1,
}
WORDS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}


def oracle(pattern: str, **changes: Any) -> tuple[Any, ModelConfig]:
    sizes = {**SIZES, **changes}
    theirs = transformers.NemotronHConfig(
        **sizes,
        layers_block_type=[WORDS[c] for c in pattern],
        num_hidden_layers=len(pattern),
        n_shared_experts=1,
        norm_topk_prob=True,
        use_conv_bias=True,
        mlp_hidden_act="relu2",
        layer_norm_epsilon=1e-5,
        # transformers clamps dt from below here, where the published code does not
        time_step_min=1e-9,
        time_step_limit=(0.0, float("inf")),
        tie_word_embeddings=False,
        chunk_size=16,
    )
    torch.manual_seed(len(pattern))
    model = transformers.NemotronHForCausalLM(theirs).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                p.uniform_(-2, 1)
            elif p.ndim == 1:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=p.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
    ours = ModelConfig.from_json({**sizes, "layers": pattern, "dtype": "float32"})
    return model, ours


def tower_from(model: Any, config: ModelConfig) -> ContextTower:
    """Our tower with their weights: names differ by a prefix, and newer ones stack experts."""
    theirs = {k.replace("model.", "backbone.", 1): v for k, v in model.state_dict().items()}

    def read(name: str) -> torch.Tensor:
        key = name.replace("context_tower.", "backbone.")
        others = {"backbone.embeddings.": "backbone.embed_tokens.", "context_lm_head.": "lm_head."}
        for a, b in others.items():
            key = key.replace(a, b) if key.replace(a, b) in theirs else key
        if key in theirs:
            return theirs[key]
        stem, _, rest = key.partition("experts.")
        number, kind, _ = rest.split(".")
        return theirs[f"{stem}experts.{kind}"][int(number)]

    return load_context_tower(config, read)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("ME*-M", {}),
        ("M*EM-*E", {"num_key_value_heads": 1, "n_groups": 1}),
        ("EME", {"n_group": 4, "topk_group": 2}),
        ("MM", {"conv_kernel": 2}),
    ],
)
def test_logits_of_random_models(pattern: str, changes: dict[str, Any]) -> None:
    model, config = oracle(pattern, **changes)
    drawn = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (2, 29), generator=drawn)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
    tower = tower_from(model, config)
    hidden, _ = read(tower, tokens)
    torch.testing.assert_close(tower.logits(hidden), want.float(), rtol=1e-4, atol=1e-4)


def test_model_package_does_not_need_transformers() -> None:
    texts = [
        file.read_text(encoding="utf-8")
        for file in (ROOT / "src" / "twotower" / "model").glob("*.py")
    ]
    assert texts
    assert not [text for text in texts if re.search("(import|from) transformers", text)]
