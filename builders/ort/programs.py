"""Towers for ONNX Runtime on a GPU as programs with our kernels between.

The list of steps is that of the TensorRT targets. Each program is a graph of its own whose weights
lie in the bundle's data file, so that a session finds them; experts are in none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from twotower.builders.base import BuildConfig, Report
from twotower.builders.expert_cut import experts_of, exported_cut
from twotower.builders.expert_kernels import require_kernels
from twotower.builders.profiles import cache_capacity
from twotower.builders.segment import BundleGraphs
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineFile,
    EngineLimits,
    ExpertsStep,
    Step,
)
from twotower.hardware import probe_machine
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.spec import CONTEXT_HEAD
from twotower.weights.external import attach_weights, weight_refs

__all__ = ["WrittenPrograms", "kernel_limits", "require_programs", "write_programs"]


@dataclass(frozen=True, slots=True)
class WrittenPrograms:
    """What was written.

    Attributes:
        steps: For each graph what runs, in order.
        operators: By file, how many operators of each kind it has.
    """

    steps: dict[str, tuple[Step, ...]]
    operators: dict[str, dict[str, int]]

    @property
    def experts(self) -> list[ExpertsStep]:
        """The experts of all graphs."""
        every = [step for steps in self.steps.values() for step in steps]
        return [step for step in every if isinstance(step, ExpertsStep)]


def kernel_limits(bundle: Bundle, config: BuildConfig) -> EngineLimits:
    """What kernels fix: rows, because they take so many tokens, and GPUs.

    GPUs are those at hand, or all there are kernels for. Sessions take texts of any length.
    """
    longest = bundle.config.max_position_embeddings
    capacity = cache_capacity(config.max_context or longest, longest)
    here = tuple(sorted({gpu.sm for gpu in probe_machine().gpus}.intersection(BUILDABLE_SMS)))
    return EngineLimits(capacity, config.max_batch, config.sms or here or BUILDABLE_SMS)


def require_programs(graphs: BundleGraphs, limits: EngineLimits) -> None:
    """Refuses what cannot be cut or has no kernels, before anything is written.

    Raises:
        BuildError: a graph cannot be cut, or there are no kernels for its experts, so many rows or
            a compute capability.
    """
    for step in experts_of(graphs):
        require_kernels(step, limits.sms, max_batch=limits.max_batch)


def write_programs(graphs: BundleGraphs, folder: Path, report: Report) -> WrittenPrograms:
    """Writes the graph of every program into the target's folder."""
    bundle = graphs.bundle
    steps: dict[str, tuple[Step, ...]] = {}
    operators: dict[str, dict[str, int]] = {}
    for name in GRAPH_FILES:
        cut = None if name == CONTEXT_HEAD else exported_cut(graphs, name)  # it has no layers
        some: list[Step] = []
        count = 1 if cut is None else cut.programs
        for number in range(count):
            file = f"{name}.onnx" if count == 1 else f"{name}.{number}.onnx"
            report(f"writing {file}", number, count)
            if cut is None:
                graph = bundle.signatures[name]
                model, inputs, outputs = (
                    graphs.copied(name),
                    graph.inputs,
                    graph.outputs,
                )
                layers = (0, len(bundle.config.layers))
            else:
                made = cut.program(number)
                model, inputs, outputs, layers = made.model, made.inputs, made.outputs, made.layers
            weights = weight_refs(model)
            attach_weights(model, weights, GRAPH_FILES[name] + DATA_SUFFIX)
            (folder / file).write_bytes(model.SerializeToString())
            operators[file] = _counted(model)
            some.append(EngineFile(file, layers, inputs, outputs, (), constants=tuple(weights)))
            if cut is not None and number < count - 1:
                some.append(cut.experts(number))
        steps[name] = tuple(some)
    return WrittenPrograms(steps, operators)


def _counted(model: onnx.ModelProto) -> dict[str, int]:
    counts: Mapping[str, int] = Counter(node.op_type for node in model.graph.node)
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
