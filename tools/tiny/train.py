"""Trains twotower-tiny: first the context tower, then, with it frozen, the denoiser.

    python tools/tiny/train.py --work out/tiny --stage context
    python tools/tiny/train.py --work out/tiny --stage labelled
    python tools/tiny/train.py --work out/tiny --stage denoiser

The towers are the product's own (`twotower.model`). A run that is interrupted goes on where it last
saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from functools import partial
from pathlib import Path

import torch
from data import Blocks, Sequences, block_batch, sequence_batch
from recipe import RECIPE, initialise, start_denoiser
from torch import nn
from torch.nn import functional

from twotower.model import ContextTower, DenoiserTower, empty_state
from twotower.model.layers import MoE
from twotower.spec import past_conv, past_key, past_ssm, past_value

MASK = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--stage", choices=("context", "labelled", "denoiser"), required=True)
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(
        True
    )  # late in the training most second moments are denormal, and a CPU is a hundred times slower on those
    torch.manual_seed(RECIPE.seed)
    context = ContextTower(RECIPE.config)
    if args.stage == "context":
        initialise(context)
        Trainer(args.work, "context", context, args.steps or RECIPE.context_steps).run(
            lambda batch: context_step(context, batch), partial(sequence_batch, every_kind=True)
        )
        return
    if args.stage == "labelled":
        context.load_state_dict(torch.load(args.work / "context.pt")["average"])
        Trainer(args.work, "labelled", context, args.steps or RECIPE.labelled_steps).run(
            lambda batch: context_step(context, batch), partial(sequence_batch, every_kind=False)
        )
        return
    context.load_state_dict(torch.load(args.work / "labelled.pt")["average"])
    context.requires_grad_(False)
    denoiser = DenoiserTower(RECIPE.config)
    start_denoiser(denoiser, context)
    Trainer(args.work, "denoiser", denoiser, args.steps or RECIPE.denoiser_steps).run(
        lambda batch: denoiser_step(context, denoiser, batch), block_batch
    )


class Trainer:
    """Steps with warm-up and linear decay, a running average of the weights, a log, and a file to go on from."""

    def __init__(self, work: Path, name: str, tower: nn.Module, steps: int) -> None:
        self.file, self.log = work / f"{name}.pt", work / f"{name}.jsonl"
        self.tower, self.steps, self.step = tower, steps, 0
        matrices = [p for n, p in tower.named_parameters() if p.ndim == 2 and is_hidden(n)]
        rest = [
            p
            for n, p in tower.named_parameters()
            if not (p.ndim == 2 and is_hidden(n)) and "e_score" not in n
        ]
        self.optimizers = [
            torch.optim.Muon(
                matrices, lr=RECIPE.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=RECIPE.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.balance = Balance(tower)
        self.average = {k: v.clone() for k, v in tower.state_dict().items()}
        if self.file.exists():
            self._load(torch.load(self.file))

    def run(self, loss_of, batch_of) -> None:
        base = [RECIPE.matrix_rate, RECIPE.rate]
        began, first, seen = time.perf_counter(), self.step, []
        while self.step < self.steps:
            factor = min(1.0, (self.step + 1) / 100) * max(
                0.02, min(1.0, (self.steps - self.step) / (0.6 * self.steps))
            )
            for optimizer, rate in zip(self.optimizers, base, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
            facts = loss_of(batch_of(random.Random(f"{RECIPE.seed} {self.file.stem} {self.step}")))
            nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.balance.step()
            self.step += 1
            self._average()
            seen.append(facts)
            if self.step % 50 == 0:
                mean = {k: sum(f[k] for f in seen) / len(seen) for k in facts}
                line = {"step": self.step, **{k: round(v, 4) for k, v in mean.items()}}
                line["seconds_a_step"] = round(
                    (time.perf_counter() - began) / (self.step - first), 3
                )
                print(json.dumps(line), flush=True)
                with self.log.open("a") as log:
                    log.write(json.dumps(line) + "\n")
                seen = []
            if self.step % 250 == 0 or self.step == self.steps:
                self._save()

    def _average(self) -> None:
        keep = min(0.998, self.step / (self.step + 10))
        for name, value in self.tower.state_dict().items():
            self.average[name].lerp_(value, 1 - keep)

    def _save(self) -> None:
        state = {"step": self.step, "tower": self.tower.state_dict(), "average": self.average}
        torch.save(
            {**state, "optimizers": [o.state_dict() for o in self.optimizers]},
            self.file.with_suffix(".part"),
        )
        os.replace(self.file.with_suffix(".part"), self.file)

    def _load(self, state) -> None:
        self.step, self.average = state["step"], state["average"]
        self.tower.load_state_dict(state["tower"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def is_hidden(name: str) -> bool:
    """Whether a matrix maps hidden vectors to hidden vectors: those are the ones Muon is made for."""
    return name.startswith("layers.") and not name.endswith("gate.weight")


def context_step(tower: ContextTower, groups: list[Sequences]) -> dict[str, float]:
    """Gradients of the next token's cross-entropy; what a prompt happens to ask counts little, an answer fully."""
    total = sum(float(group.weight[:, 1:].sum()) for group in groups)
    answers = sum(float((group.weight[:, 1:] == 1).sum()) for group in groups)
    facts = {"loss": 0.0, "exact": 0.0}
    for group in groups:
        rows, length = group.tokens.shape
        state, hidden = empty_state(RECIPE.config, rows, length), []
        for start in range(0, length, RECIPE.chunk):
            chunk = group.tokens[:, start : start + RECIPE.chunk]
            h, state = tower.extend(chunk, state, past=torch.full((rows,), start))
            hidden.append(h)
        logits = tower.logits(torch.cat(hidden, 1)[:, :-1])
        target, weight = group.tokens[:, 1:], group.weight[:, 1:]
        losses = functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none"
        ).view(target.shape)
        ((losses * weight).sum() / total).backward()
        with torch.no_grad():
            wrong = ((logits.argmax(-1) != target) & (weight == 1)).any(-1)
            facts["loss"] += float(losses[weight == 1].sum()) / answers
            facts["exact"] += float((~wrong).float().mean()) / len(groups)
    return facts


def denoiser_step(context: ContextTower, tower: DenoiserTower, batch: Blocks):
    """Cross-entropy of masked positions, once with the whole block masked and once with a part of it.

    The part is random for half of the blocks. For the others it is what a generation would still
    have masked after its first
    pass: the positions the tower itself is least sure of.
    """
    state, lengths, target = context_states(context, batch)
    full = torch.full_like(target, MASK)
    logits = tower.logits(full, state, context_length=lengths)
    loss_full = functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    with torch.no_grad():
        confidence, best = logits.detach().softmax(-1).max(-1)
        unsure = confidence <= batch.threshold
        rows, size = target.shape
        generator = torch.Generator().manual_seed(batch.seed)
        share = torch.rand(rows, 1, generator=generator)
        chosen = torch.rand(rows, size, generator=generator) < share
        own = (
            (torch.rand(rows, 1, generator=generator) < 0.5)
            & unsure.any(-1, keepdim=True)
            & ~unsure.all(-1, keepdim=True)
        )
        masked = torch.where(own, unsure, chosen)
        masked[~masked.any(-1), 0] = True
        sure_wrong = ((best != target) & ~unsure).float().mean()
    again = tower.logits(torch.where(masked, full, target), state, context_length=lengths)
    losses = functional.cross_entropy(again.flatten(0, 1), target.flatten(), reduction="none").view(
        target.shape
    )
    loss_part = losses[masked].mean()
    ((loss_full + loss_part) / 2).backward()
    facts = {
        "full": float(loss_full.detach()),
        "part": float(loss_part.detach()),
        "sure": 1 - float(unsure.float().mean()),
        "sure_wrong": float(sure_wrong),
    }
    facts["blocks_right_at_once"] = float((best == target).all(-1).float().mean())
    return facts


@torch.no_grad()
def context_states(context: ContextTower, batch: Blocks):
    """The frozen tower's state before every block that has an answer's tokens: state, lengths [R], targets [R,S]."""
    rows, size = len(batch.prompt_lengths), RECIPE.block
    blocks = batch.blocks.shape[1]
    state = empty_state(RECIPE.config, rows, batch.prompts.shape[1] + blocks * size)
    for start in range(0, batch.prompts.shape[1], RECIPE.chunk):
        chunk = batch.prompts[:, start : start + RECIPE.chunk]
        valid = (batch.prompt_lengths - start).clamp(0, chunk.shape[1])
        _, state = context.extend(
            chunk,
            state,
            past=torch.full((rows,), start).minimum(batch.prompt_lengths),
            lengths=valid,
        )
    before = []
    for j in range(blocks):
        before.append({k: v for k, v in state.items() if "key_values" not in k})
        if j + 1 < blocks:
            _, state = context.extend(
                batch.blocks[:, j], state, past=batch.prompt_lengths + j * size
            )
    row, place = batch.used.nonzero(as_tuple=True)
    picked = {}
    for i, kind in enumerate(RECIPE.config.pattern):
        if kind == "M":
            for name in (past_conv(i), past_ssm(i)):
                picked[name] = torch.stack([b[name] for b in before], 1)[row, place]
        if kind == "*":
            for name in (past_key(i), past_value(i)):
                picked[name] = state[name][row]
    return picked, batch.prompt_lengths[row] + place * size, batch.blocks[row, place]


class Balance:
    """Moves every router's correction bias towards even use of its experts; the loss knows nothing of it."""

    def __init__(self, tower: nn.Module) -> None:
        self._routers = [m for m in tower.modules() if isinstance(m, MoE)]
        self._loads = [torch.zeros(len(m.experts)) for m in self._routers]
        for module, load in zip(self._routers, self._loads, strict=True):
            module.route = self._counted(module.route, load)

    def _counted(self, route, load):
        def counted(tokens):
            weights, chosen = route(tokens)
            load.add_(torch.bincount(chosen.flatten(), minlength=len(load)))
            return weights, chosen

        return counted

    def step(self) -> None:
        for module, load in zip(self._routers, self._loads, strict=True):
            module.gate.e_score_correction_bias.data += RECIPE.balance_rate * torch.sign(
                load.mean() - load
            )
            load.zero_()


if __name__ == "__main__":
    main()
