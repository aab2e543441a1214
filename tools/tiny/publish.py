"""Writes the trained towers as a checkpoint in the published layout.

python tools/tiny/publish.py --work out/tiny --output assets/twotower-tiny
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from recipe import RECIPE
from safetensors.torch import save_file
from vocabulary import make_tokenizer

from twotower.checkpoint.layout import Tower, expected_tensors
from twotower.model.loading import published_name

SHARDS = 2
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **SPECIAL,
}  # for libraries that look for a tokenizer of their own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the training")
    parser.add_argument(
        "--output", type=Path, required=True, help="the checkpoint; replaced if it is there"
    )
    args = parser.parse_args()
    weights = {}
    for file, tower in (("labelled.pt", Tower.CONTEXT), ("denoiser.pt", Tower.DENOISER)):
        average = torch.load(args.work / file)["average"]
        weights.update(
            {published_name(name, tower): value.contiguous() for name, value in average.items()}
        )
    expected = expected_tensors(RECIPE.config)
    assert set(weights) == set(expected), sorted(set(weights) ^ set(expected))
    partial = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    write_shards(partial, {name: weights[name] for name in expected})
    (partial / "config.json").write_text(json.dumps(published_config(), indent=1) + "\n")
    (partial / "generation_config.json").write_text(json.dumps(RECIPE.generation, indent=1) + "\n")
    (partial / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")
    make_tokenizer().save(str(partial / "tokenizer.json"))
    shutil.rmtree(args.output, ignore_errors=True)
    partial.rename(args.output)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{args.output}: {len(weights)} tensors, {size / 1e6:.1f} MB")


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = list(weights)
    weight_map = {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        members = names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS]
        save_file(
            {name: weights[name] for name in members}, folder / file, metadata={"format": "pt"}
        )
        weight_map.update(dict.fromkeys(members, file))
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def published_config() -> dict[str, object]:
    """The config under the published field names."""
    config = RECIPE.config.to_json()
    config["hybrid_override_pattern"] = config.pop("layers")
    config["num_hidden_layers"] = len(RECIPE.config.layers)
    config["eos_token_id"] = config.pop("eos_token_ids")[0]
    config["torch_dtype"] = config.pop("dtype")
    config["time_step_limit"] = [
        low if low is not None else float("inf") for low in config["time_step_limit"]
    ]
    return {
        "architectures": ["NemotronHTwoTowerForCausalLM"],
        "model_type": "nemotron_h",
        "tie_word_embeddings": False,
        **config,
    }


if __name__ == "__main__":
    main()
