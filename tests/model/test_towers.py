"""Properties of the torch towers: chunks, rows, narrow dtypes, routing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.towers import read, towers
from twotower.model import empty_state
from twotower.model.context_tower import last_valid
from twotower.model.denoiser_tower import commit_step
from twotower.model.layers import MoE

TOKENS = torch.randint(4, 250, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 30))
def test_any_split_gives_the_same_state(widths: list[int], short: int) -> None:
    context, _ = towers("hybrid-a")
    lengths = torch.tensor([30, short])
    _, whole = read(context, TOKENS, lengths=lengths)
    state, past = empty_state(context.config, 2, 64), torch.zeros(2, dtype=torch.int64)
    for width in [*widths, *[7] * 5]:
        count = (lengths - past).clamp(0, width)
        chunk = torch.stack(
            [
                torch.cat([row[p : p + n], row.new_full((width - n,), 9)])
                for row, p, n in zip(TOKENS, past, count, strict=True)
            ]
        )
        _, state = context.extend(chunk, state, past=past, lengths=count)
        past = past + count
        if not count.any():  # and reading nothing has changed nothing
            break
    for name, want in whole.items():
        for row in range(2):
            a, b = want[row], state[name][row]
            if name.startswith("past_key"):
                a, b = a[:, : lengths[row]], b[:, : lengths[row]]
            torch.testing.assert_close(b, a, rtol=0, atol=1e-4 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_towers_stay_near_and_keep_the_ssm_state_wide(dtype: str) -> None:
    """Through eight layers the argmax of most positions survives, and nothing overflows."""
    wide, narrow = towers("hybrid-a"), towers("hybrid-a", dtype)
    outcomes = []
    for context, denoiser in (wide, narrow):
        kept = dtype if context is narrow[0] else "float32"
        _, state = read(context, TOKENS[:1], kept)
        assert {v.dtype for k, v in state.items() if k.startswith("past_ssm")} == {torch.float32}
        block, length = torch.full((1, 16), 3), torch.tensor([30])
        outcomes.append(torch.softmax(denoiser.logits(block, state, context_length=length), -1))
    assert torch.isfinite(outcomes[1]).all()
    assert (outcomes[0].argmax(-1) == outcomes[1].argmax(-1)).float().mean() >= 0.5
    assert float((outcomes[0] - outcomes[1]).abs().max()) < 0.5


def test_long_text_keeps_a_finite_state() -> None:
    context, _ = towers("hybrid-b", "bfloat16")
    tokens = torch.randint(4, 290, (1, 2000), generator=torch.Generator().manual_seed(0))
    state = empty_state(context.config, 1, 2000, "bfloat16")
    for start in range(0, 2000, 250):
        hidden, state = context.extend(
            tokens[:, start : start + 250], state, past=torch.tensor([start])
        )
    assert torch.isfinite(hidden.float()).all()
    assert all(torch.isfinite(v).all() for v in state.values())


def test_rows_are_independent() -> None:
    context, denoiser = towers("hybrid-b")
    lengths = torch.tensor([30, 11])
    hidden, state = read(context, TOKENS, lengths=lengths)
    block = torch.tensor([[3] * 8, [3, 5, 3, 5, 3, 5, 3, 5]])
    together = denoiser.logits(block, state, context_length=lengths)
    for row in range(2):
        n = int(lengths[row])
        alone, mine = read(context, TOKENS[row : row + 1, :n])
        last, one = last_valid(hidden, lengths)[row], slice(row, row + 1)
        torch.testing.assert_close(last, alone[0, -1], rtol=1e-5, atol=1e-5)
        got = denoiser.logits(block[one], mine, context_length=lengths[one])[0]
        torch.testing.assert_close(got, together[row], rtol=1e-4, atol=1e-4)


@given(
    st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.9]), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 14),
)
def test_commit_step_is_its_definition(rows: list[tuple[float, bool]], floor: int) -> None:
    config = replace(towers("hybrid-a")[0].config, vocab_size=8)
    logits = torch.full((1, len(rows), 8), -100.0)
    for i, (p, _) in enumerate(rows):
        logits[0, i, 5], logits[0, i, 6] = math.log(p), math.log1p(-p)
    block = torch.tensor([[3 if masked else 7 for _, masked in rows]])
    step = commit_step(
        logits,
        block,
        config,
        threshold=torch.tensor([0.6]),
        commit_floor=torch.tensor([floor]),
        temperature=torch.zeros(1),
        noise=torch.zeros(1, len(rows), 7),
    )
    places = [i for i, (_, masked) in enumerate(rows) if masked]
    confidence = step.confidence[0].tolist()
    count = min(len(places), max(sum(confidence[i] > 0.6 for i in places), 1, floor))
    chosen = sorted(places, key=lambda i: (-confidence[i], i))[:count]
    assert step.next_block[0].tolist() == [
        int(step.predicted[0, i]) if i in chosen else int(block[0, i]) for i in range(len(rows))
    ]
    assert int(step.masked_left[0]) == len(places) - len(chosen)


def test_experts_outside_the_best_groups_are_never_chosen() -> None:
    config = replace(towers("hybrid-a")[0].config, n_group=4, topk_group=1)
    moe = MoE(config)
    torch.manual_seed(0)
    with torch.no_grad():
        moe.gate.weight.normal_()
        moe.gate.e_score_correction_bias.zero_()
    tokens = torch.randn(50, config.hidden_size)
    weights, chosen = moe.route(tokens)
    assert ((chosen // 2).max(-1).values == (chosen // 2).min(-1).values).all(), (
        "both experts come from one group of two"
    )
    scores = (
        torch.sigmoid(tokens.double() @ moe.gate.weight.double().T).unflatten(-1, (4, 2)).sum(-1)
    )
    assert (chosen[:, 0] // 2 == scores.argmax(-1)).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((50,), config.routed_scaling_factor))
