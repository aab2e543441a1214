"""Which GPUs a bundle is opened on, and whether it will fit there: said before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower.errors import ConfigError, EngineMismatchError
from twotower.runtime.cuda.calls import Cuda

__all__ = ["chosen_devices", "require_room"]


def chosen_devices(cuda: Cuda, asked: Sequence[int]) -> tuple[int, ...]:
    """The GPUs asked for, or the first.

    Raises:
        EngineMismatchError: there is no driver or no GPU.
        ConfigError: one of them is not there, or is named twice.
    """
    count = cuda.device_count()
    wrong = [d for d in asked if not 0 <= d < count]
    if wrong or len(set(asked)) < len(asked):
        what = (
            f"there is no GPU {wrong[0]}"
            if wrong
            else f"a GPU is named twice in {','.join(map(str, asked))}"
        )
        numbers = "0" if count == 1 else f"0 to {count - 1}"
        raise ConfigError(
            what,
            found=f"GPUs here: {numbers}",
            do="choose others with --devices; CUDA_VISIBLE_DEVICES hides some",
        )
    devices = tuple(asked) or (0,)
    for device in devices:
        cuda.use(device)
        for other in devices:
            if other != device:
                cuda.enable_peer(other)
    return devices


def require_room(cuda: Cuda, needed: Mapping[int, Mapping[str, int]], *, target: str) -> None:
    """Refuses to begin what cannot end.

    Args:
        cuda: The calls.
        needed: For each device, bytes by what they are for.
        target: For the message.

    Raises:
        EngineMismatchError: a device has less memory free than is needed.
    """
    for device, parts in needed.items():
        cuda.use(device)
        free, total = cuda.free_memory()
        if sum(parts.values()) > free:
            listed = ", ".join(
                f"{name} {size / 1e9:.2f} GB" for name, size in parts.items() if size
            )
            raise EngineMismatchError(
                f"the {target} engines do not fit on GPU {device}",
                found=f"{sum(parts.values()) / 1e9:.2f} GB needed ({listed}), {free / 1e9:.2f} of {total / 1e9:.2f} GB free",
                do="spread the towers with --devices 0,1, build with a smaller --max-context or another dtype, or end other programs; "
                "`twotower plan BUNDLE` lists what would fit",
            )
