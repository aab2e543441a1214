"""What computes quantized experts on TensorRT, in words: for `quantize` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from twotower.checkpoint.layout import Role
from twotower.config.formats import FUSED_STACKS, stack_is_expanded

_KERNELS, _DENSE = "on rtx, trt", "dense there"
_EXPERTS = (Role.ROUTED_EXPERT.value, Role.SHARED_EXPERT.value)


def expert_words(recipe: Mapping[str, Any], dtype: str) -> Iterator[tuple[str, str]]:
    """Lines, each with a label, on the experts of a recipe; none if it leaves them as they are.

    `recipe` is its `weights` and `activations` as in a manifest; `dtype` is the bundle's.
    """
    few = {kind: how for kind, how in recipe["weights"].items() if kind in _EXPERTS}
    if not few:
        return
    rounded = [kind for kind in few if kind in recipe["activations"]]
    formats = " and ".join(dict.fromkeys(few.values()))
    yield _KERNELS, f"kernels read experts in {formats} as they are stored, from SM 80 on"
    if rounded:
        words = "and compute with these weights alone: there the inputs of experts stay"
        yield "", f"{words} {dtype}, which this recipe rounds elsewhere"
    routed = few.get(Role.ROUTED_EXPERT.value)
    stacked = Role.ROUTED_EXPERT.value in rounded
    if routed and stack_is_expanded("rtx", routed, rounded_input=stacked):
        words = f"--experts dense expands them in memory in every pass, slower than {dtype} experts"
        yield _DENSE, f"{words}; it has products of {FUSED_STACKS}"
    elif rounded:
        yield _DENSE, "--experts dense rounds the inputs of experts too"
