"""Whether what runs here computes the model: the plain reference loop, and the canary checks of `twotower doctor`."""

from twotower.evaluate.canary import CheckResult, check_bundle, check_chain

__all__ = ["CheckResult", "check_bundle", "check_chain"]
