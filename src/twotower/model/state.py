"""The state the context tower leaves behind, by the names of the graph contract."""

from __future__ import annotations

import torch

from twotower.config import ModelConfig
from twotower.spec import state_tensors

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}

ContextState = dict[str, torch.Tensor]
"""Input name -> tensor.

`past_key_values.i.key/value` [B,KV,T,hd], `past_conv.i` [B,K-1,C], `past_ssm.i` [B,H,P,N] float32.
"""


def empty_state(
    config: ModelConfig,
    rows: int,
    capacity: int,
    dtype: str = "float32",
) -> ContextState:
    """The state before the first token."""
    sizes = {"B": rows, "T": capacity}
    return {
        s.past.name: torch.zeros(s.past.shape(sizes), dtype=TORCH_DTYPES[s.past.dtype])
        for s in state_tensors(config, dtype)
    }
