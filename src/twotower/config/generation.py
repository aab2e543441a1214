"""How to generate: one frozen options object for every request, validated when it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeGuard

from twotower.errors import ConfigError
from twotower.records import decode, encode

MODES = ("diffusion", "ar", "auto")
"""How a request may ask to be generated."""

CANDIDATES = 64
"""Best tokens a position keeps for sampling (K): width of `noise` and of the head's outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Options of one request; the defaults are the published reference's.

    Attributes:
        mode: `diffusion` (both towers), `ar` (context tower alone, token by token) or `auto`: the
            one expected to be faster for the batch. The result says which it was.
        max_new_tokens: Tokens to generate at most; the last block is cut to fit.
        block_size: Tokens denoised together (S). Above the trained size quality collapses, so it
            needs the override.
        steps_per_block: Denoiser passes a block may take; 1 commits everything at once.
        confidence_threshold: A prediction above it is committed; 0.8 is the published value.
        temperature: 0 is greedy. Confidence is always the un-tempered probability.
        top_k: Sample among the k best tokens, 0 for all kept candidates (at most 64).
        top_p: Nucleus sampling, `ar` mode only.
        seed: Names the noise of sampling: with it a prompt gives the same text in any batch, on any
            backend, and equal prompts of one call give equal texts. None draws one for each
            request, which its result tells. Greedy generation uses none.
        stop: Strings that end the text (cut before the string).
        ignore_eos: Go on past the end-of-sequence token.
        allow_untrained_block_size: Permit a block_size above the trained one.
    """

    mode: str = "diffusion"
    max_new_tokens: int = 128
    block_size: int = 16
    steps_per_block: int = 16
    confidence_threshold: float = 0.9
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    allow_untrained_block_size: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, ok, allowed in self._checks():
            if not ok:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} cannot be used",
                    found=f"allowed: {allowed}",
                    do=f"choose another {name.replace('_', ' ')}",
                )

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """For each option its name, whether its value can be used, and what is allowed."""
        yield "mode", self.mode in MODES, "'diffusion', 'ar' or 'auto'"
        for name in ("max_new_tokens", "block_size", "steps_per_block"):
            value = getattr(self, name)
            yield name, _is_whole(value) and value > 0, "a whole number above 0"
        threshold, heat = self.confidence_threshold, self.temperature
        yield "confidence_threshold", _is_real(threshold) and 0 <= threshold <= 1, "0 to 1"
        yield "temperature", _is_real(heat) and 0 <= heat <= 100, "0 (greedy) to 100"
        k, p, seed = self.top_k, self.top_p, self.seed
        allowed = f"0 (all candidates) to {CANDIDATES}"
        yield "top_k", _is_whole(k) and 0 <= k <= CANDIDATES, allowed
        yield "top_p", _is_real(p) and 0 < p <= 1, "above 0, up to 1"
        allowed = f"1 in {self.mode} mode: top-p is defined for `ar` only"
        yield "top_p", self.mode == "ar" or p == 1, allowed
        drawn = seed is None or (_is_whole(seed) and 0 <= seed < 2**64)
        yield "seed", drawn, "0 to 2**64 - 1, or none to have one drawn"
        yield "stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings"
        for name in ("ignore_eos", "allow_untrained_block_size"):
            yield name, isinstance(getattr(self, name), bool), "true or false"

    @classmethod
    def from_mapping(
        cls,
        data: Mapping[str, Any],
        base: GenerationConfig | None = None,
    ) -> GenerationConfig:
        """A config from plain data (a prompt file's line, a bundle's defaults), on top of `base`.

        ConfigError if a key is unknown or a value cannot be used.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ConfigError(
                f"unknown generation option(s) {', '.join(unknown)}",
                found=f"known options: {', '.join(known)}",
                do="correct the spelling or remove the option",
            )
        return replace(base or cls(), **data)

    def seeded(self, seed: int = 0) -> GenerationConfig:
        """These options, with `seed` if they have none: for texts that must come out the same."""
        if self.seed is not None:
            return self
        return replace(self, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_mapping` reads back."""
        return dict(encode(self))

    @classmethod
    def from_json(cls, data: Any) -> GenerationConfig:
        """What `to_json` wrote, or a part of it."""
        return cls.from_mapping(decode(dict[str, Any], data))


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
