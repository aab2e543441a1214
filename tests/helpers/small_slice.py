"""Sizes that make a slice of the published model small enough for a test."""

from __future__ import annotations

__all__ = ["SMALL_SLICE"]

SMALL_SLICE = {
    "hidden_size": 64,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
