"""Section `launches`: what a small kernel costs in a CUDA graph, on one stream and on eight."""

from __future__ import annotations

import time
from typing import Any

from tools.gpu.questions import Given
from tools.gpu.timing import captured, median_ms, need_torch
from twotower.doctor import Answers
from twotower.doctor.sections import short

__all__ = ["ask"]

COUNTS = (100, 700)
"""Kernels of a graph; a denoiser pass of the published model has about 700."""

STREAMS = 8
WAITS_IN_FIVE = 2
"""Events in five kernels: a pass of 700 kernels compiled for eight streams has about 300."""


def ask(answers: Answers, given: Given) -> None:
    torch = need_torch()
    rows: list[tuple[str, float]] = []

    def put(what: str, microseconds: float) -> None:
        rows.append((what, short(microseconds)))
        answers.table("Microseconds a kernel", ("", "us"), rows)

    numbers = [torch.zeros(4096, device="cuda") for _ in range(STREAMS)]
    for count in COUNTS:

        def one(count: int = count) -> None:
            for _ in range(count):
                numbers[0].add_(1)

        graph = captured(torch, one)
        put(f"graph of {count}, one stream", 1000 * median_ms(torch, graph.replay) / count)
        graph = captured(torch, lambda count=count: _on_streams(torch, numbers, count))
        put(f"graph of {count}, eight streams", 1000 * median_ms(torch, graph.replay) / count)
        torch.cuda.synchronize()
        began = time.perf_counter()
        one()
        host = time.perf_counter() - began
        torch.cuda.synchronize()
        put(f"{count} launched by torch", 1000 * median_ms(torch, one) / count)
        put(f"{count} launched by torch, on the host", host / count * 1e6)
    answers.put(us_a_kernel=dict(rows))
    answers.say("; ".join(f"{what}: {microseconds:g} us" for what, microseconds in rows))


def _on_streams(torch: Any, numbers: list[Any], count: int) -> None:
    """Kernels on eight streams in turn, some of which wait for another stream's last one."""
    main = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    for stream in streams:
        stream.wait_stream(main)
    for i in range(count):
        with torch.cuda.stream(streams[i % STREAMS]):
            numbers[i % STREAMS].add_(1)
            if i % 5 < WAITS_IN_FIVE:
                event = torch.cuda.Event()
                event.record()
                streams[(i + 3) % STREAMS].wait_event(event)
    for stream in streams:
        main.wait_stream(stream)
