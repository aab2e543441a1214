"""Errors of users, in three parts: what happened, what was found, what to do."""

from __future__ import annotations

from functools import partial


class TwoTowerError(Exception):
    """An error a user can mend: what happened, what was found or is allowed, what to do."""

    def __init__(self, what: str, *, found: str, do: str) -> None:
        super().__init__(what)
        self.what = what
        self.found = found
        self.do = do

    def __str__(self) -> str:
        return f"{self.what}\n  found: {self.found}\n  do: {self.do}"

    def __reduce__(self) -> tuple[object, ...]:
        """Keyword-only parts do not survive the default pickling across processes."""
        return partial(type(self), found=self.found, do=self.do), (self.what,)


class ConfigError(TwoTowerError, ValueError):
    """A model config, option or argument that cannot be honoured."""


class CheckpointError(TwoTowerError):
    """A checkpoint that is missing, damaged, or not a two-tower model."""


class ExportError(TwoTowerError):
    """An export that could not be finished or did not verify."""


class BundleError(TwoTowerError):
    """A bundle folder that is missing, incomplete, damaged or of another schema."""


class BuildError(TwoTowerError):
    """An engine that could not be built."""


class BuildAbortedError(BuildError):
    """A build that died or ran out of memory or disk: nothing is known of the graph."""


class EngineMismatchError(TwoTowerError):
    """No engine of the bundle fits this machine, this library version or this graph."""


class RequestError(TwoTowerError, ValueError):
    """A generation request that cannot be served: too long, out of range, malformed."""


class RequestCancelledError(TwoTowerError):
    """A request that was stopped by its caller."""


class DeviceError(TwoTowerError):
    """A GPU, or the library that drives it, failed while it worked."""


class EngineOutputError(TwoTowerError):
    """An engine returned numbers no sound engine returns (NaN or infinity)."""


class RecipeError(TwoTowerError, ValueError):
    """A quantization recipe that cannot be read, or that a model cannot follow."""


class CalibrationError(TwoTowerError):
    """Statistics that cannot be made, read or used for this bundle."""


class SuiteError(TwoTowerError):
    """A file of problems that cannot be used."""


class BudgetError(TwoTowerError):
    """A quality budget that no setting reaches."""


class TraceError(TwoTowerError):
    """A trace that cannot be made, read, written or compared."""
