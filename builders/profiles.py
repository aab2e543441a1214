"""Shapes the engines are tuned for, as plain numbers."""

from __future__ import annotations

from twotower.builders.base import DEFAULT_MAX_CONTEXT
from twotower.bundle import Profile
from twotower.errors import ConfigError
from twotower.spec import CONTEXT, CONTEXT_HEAD, MAX_CHUNK

_ALIGNED = 64  # positions of a key-value cache: rows of whole cache lines in every dtype


def cache_capacity(max_context: int | None, longest: int) -> int:
    """T for texts of `max_context` tokens: room for a padded chunk more, rounded up.

    None is 4096, or `longest`, the model's limit, if less. Raises ConfigError above that limit.
    """
    if max_context is None:
        max_context = min(DEFAULT_MAX_CONTEXT, longest)
    if max_context > longest:
        raise ConfigError(
            f"--max-context {max_context} is longer than the model's texts",
            found=f"1 to {longest} tokens are allowed",
            do="lower --max-context",
        )
    return -(-(max_context + MAX_CHUNK) // _ALIGNED) * _ALIGNED


def greatest_rows(max_batch: int) -> int:
    """The most rows a profile admits: two at least, although only `max_batch` are ever run.

    Of a profile that admits one row alone TensorRT for RTX 1.7 makes a program that transposes
    every dense weight in every pass: it is read, written and read again. With two rows it does not,
    whether their number is fixed or not.
    """
    return max(2, max_batch)


def profiles(graph: str, *, max_batch: int, block_size: int) -> tuple[Profile, ...]:
    """The optimization profiles of one graph; a later one is narrower, and preferred where it fits.

    The context graph has one for each of its three uses, so that a step of autoregression and the
    extension by a block are tuned for their own length; T and the denoiser's S are constants of the
    graph. Rows are tuned for `max_batch`: throughput is what rows are for.
    """
    rows = (1, max_batch, greatest_rows(max_batch))
    if graph == CONTEXT:
        lengths = {
            "prefill": (1, MAX_CHUNK, MAX_CHUNK),
            "block": (block_size,) * 3,
            "decode": (1, 1, 1),
        }
        return tuple(Profile(name, {"B": rows, "L": length}) for name, length in lengths.items())
    return (Profile("head" if graph == CONTEXT_HEAD else "denoise", {"B": rows}),)
