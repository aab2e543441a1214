"""A model of middle size with many experts: `make mid` writes out/mid-checkpoint and out/mid.

Its weights are random and its texts mean nothing. It is for speed: 64 experts of which a token
chooses 6, so that computing all of them, or only those, makes a difference on a CPU, at a size that
fits any machine.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from twotower.checkpoint.synthetic import published_slice, write_checkpoint
from twotower.cli.main import main as twotower

__all__ = ["MID_CONFIG", "main"]

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT, BUNDLE = ROOT / "out" / "mid-checkpoint", ROOT / "out" / "mid"

MID_CONFIG = {
    **published_slice("MEM*EMEM*EMEM"),
    "hidden_size": 768,
    "vocab_size": 32000,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 1024,
    "mamba_num_heads": 24,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "torch_dtype": "float32",
}
"""Its config.json."""


def main() -> int:
    """Writes both folders anew; returns the exit code."""
    for folder in (CHECKPOINT, BUNDLE):
        shutil.rmtree(folder, ignore_errors=True)
    CHECKPOINT.parent.mkdir(exist_ok=True)
    write_checkpoint(CHECKPOINT, MID_CONFIG)
    print(f"{CHECKPOINT.relative_to(ROOT)}: random weights", flush=True)
    return twotower(
        ["export", str(CHECKPOINT), "-o", str(BUNDLE), "--dtype", "float32", "--no-verify"]
    )


if __name__ == "__main__":
    sys.exit(main())
