"""The builder of TensorRT and TensorRT for RTX: the library is a value, the rest is the same."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from twotower.builders.base import BuildConfig, BuildPlan
from twotower.builders.cache import kernel_source, planning_source
from twotower.bundle import GRAPH_FILES, Bundle
from twotower.hardware import Machine, probe_machine
from twotower.tensorrt_library import Variant

if TYPE_CHECKING:
    from twotower.builders.expert_kernels import Compile

_WITHOUT_EFFECT = ("force", "use_cache", "cache", "cache_bytes")


class TensorRTBuilder:
    """Builds targets `rtx` and `trt`; expert kernels are compiled by Triton by default."""

    def __init__(self, variant: Variant, compiler: Compile | None = None) -> None:
        self.variant, self._compiler = variant, compiler

    def library(self) -> dict[str, str]:
        return self.variant.library

    def asked(self, bundle: Bundle, config: BuildConfig) -> str:
        """SHA-256 of all that decides a build: the same again makes the same engines."""
        return self._asked(bundle, config, probe_machine())

    def plan(self, bundle: Bundle, config: BuildConfig) -> BuildPlan:
        """What a build would make, for this machine as it is now."""
        # Engines that are kept need nothing of it.
        from twotower.builders.trt.build_plan import TensorRTPlan

        machine = probe_machine()
        return TensorRTPlan(
            bundle,
            config,
            variant=self.variant,
            compiler=self._compiler,
            machine=machine,
            asked=self._asked(bundle, config, machine),
        )

    def _asked(self, bundle: Bundle, config: BuildConfig, machine: Machine) -> str:
        options = {name: v for name, v in asdict(config).items() if name not in _WITHOUT_EFFECT}
        facts = {
            "config": options,
            "graphs": {name: bundle.program_identity(name) for name in GRAPH_FILES},
            "model": repr(bundle.config),
            "block": bundle.trained_block_size,
            "library": self.variant.library,
            "gpus": [[gpu.name, gpu.sm] for gpu in machine.gpus],
            "any_sm": machine.rtx_any_sm,
            "source": planning_source(),
            "kernels": kernel_source(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
