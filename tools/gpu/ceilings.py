"""Section `ceilings`: what this card can do at best, which every share of it is of."""

from __future__ import annotations

from tools.gpu.questions import Given
from tools.gpu.timing import copy_gb_per_s, need_torch, product_tflops, read_gb_per_s
from twotower.doctor import Answers
from twotower.doctor.sections import short

__all__ = ["ask"]


def ask(answers: Answers, given: Given) -> None:
    torch = need_torch()
    answers.put(copy_gb_per_s=short(copy_gb_per_s(torch)))
    answers.put(read_gb_per_s=short(read_gb_per_s(torch)))
    answers.put(bfloat16_tflops=short(product_tflops(torch)))
    answers.say(
        f"copy {answers['copy_gb_per_s']:g} GB/s (bytes read and written), "
        f"read {answers['read_gb_per_s']:g} GB/s, "
        f"bfloat16 product {answers['bfloat16_tflops']:g} TFLOP/s"
    )
