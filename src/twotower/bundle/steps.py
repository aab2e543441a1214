"""What a tower is made of once it is built: engines, and the experts that run between them, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twotower.spec import TensorSpec

__all__ = ["EngineFile", "ExpertsStep", "Profile", "Step", "step_from_json"]


@dataclass(frozen=True, slots=True)
class Profile:
    """Shapes an engine is tuned for.

    Attributes:
        name: `prefill`, `block`, `decode`, `denoise` or `head`.
        axes: For each dynamic axis letter the least, the best and the most.
    """

    name: str
    axes: dict[str, tuple[int, int, int]]

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Whether every axis of this profile may take its size."""
        return all(least <= sizes[letter] <= most for letter, (least, _, most) in self.axes.items())


@dataclass(frozen=True, slots=True)
class EngineFile:
    """One engine: a graph, or some consecutive layers of it that run as one of several segments on the same stream.

    Attributes:
        file: Its name in the target's folder.
        layers: The first layer and the one after the last; of a program between experts those whose
            mixers it computes.
        inputs: What it reads: names of the graph, and from the segment before `residual_in` and
            (denoiser) `conditioning`; after experts `experts_out`.
        outputs: What it writes: names of the graph, and for the segment after `residual_out`; the
            first denoiser segment writes `conditioning` for all others. Before experts `experts_in`
            and `shares`.
        profiles: In the order they were added to the engine.
        weights: Weights it reads as inputs, by their names in the bundle's weight table.
        constants: Names of the weights it holds inside.
        names: The engine's own names of inputs, outputs and weights, where it has others: equal
            programs of a tower are one file. All other attributes go by the tower's names.
    """

    file: str
    layers: tuple[int, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    weights: tuple[TensorSpec, ...] = ()
    constants: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def own(self, name: str) -> str:
        """The engine's own name of an input, an output or a weight."""
        return self.names.get(name, name)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "file": self.file,
            "layers": list(self.layers),
            "inputs": [s.to_json() for s in self.inputs],
            "outputs": [s.to_json() for s in self.outputs],
            "profiles": [
                {"name": p.name, "axes": {k: list(v) for k, v in p.axes.items()}}
                for p in self.profiles
            ],
            "weights": [s.to_json() for s in self.weights],
            "constants": list(self.constants),
            "names": dict(self.names),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsStep:
    """The experts of one layer, computed by kernels: y = sum over experts of share * down(relu(up x)^2).

    It reads `experts_in` [B,L,D] and `shares` [experts,N] of the program before it and writes
    `experts_out` [B,L,D] for the one after it.

    Attributes:
        layer: Which.
        hidden: D.
        width: Of an expert.
        experts: Routed ones.
        top: How many of them a token has.
        shared_intermediate: Width of the shared expert, which every token has besides; 0 for none.
        dtype: Of inputs and outputs, and of the weights that are not in few bits.
        formats: By matrix that is in few bits (`up`, `down`, `shared_up`, `shared_down`) a name of
            `FORMATS`, and weights of a row that share a scale, 0 for all of them.
        code: Folder of the compiled kernels, in the target's folder; layers of one shape share it.
        weights: By role (`up`, `up_scale`, `down`, ..., `shared_up`, ...), with their names in the
            bundle's weight table.
    """

    layer: int
    hidden: int
    width: int
    experts: int
    top: int
    shared_intermediate: int
    dtype: str
    formats: Mapping[str, tuple[str, int]]
    code: str
    weights: Mapping[str, TensorSpec]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        weights = {role: spec.to_json() for role, spec in self.weights.items()}
        formats = {matrix: list(how) for matrix, how in self.formats.items()}
        return {
            "experts": {
                **numbers,
                "dtype": self.dtype,
                "formats": formats,
                "code": self.code,
                "weights": weights,
            }
        }


Step = EngineFile | ExpertsStep

_NUMBERS = ("layer", "hidden", "width", "experts", "top", "shared_intermediate")


def step_from_json(data: Mapping[str, Any]) -> Step:
    """What the `to_json` of a step wrote.

    Raises:
        KeyError, TypeError, ValueError: it did not.
    """
    return _experts(data["experts"]) if "experts" in data else _engine_file(data)


def _experts(data: Mapping[str, Any]) -> ExpertsStep:
    numbers = {name: int(data[name]) for name in _NUMBERS}
    weights = {str(role): _spec(spec) for role, spec in data["weights"].items()}
    formats = {
        str(matrix): (str(name), int(group)) for matrix, (name, group) in data["formats"].items()
    }
    return ExpertsStep(
        **numbers,
        dtype=str(data["dtype"]),
        formats=formats,
        code=str(data["code"]),
        weights=weights,
    )


def _engine_file(data: Mapping[str, Any]) -> EngineFile:
    first, end = data["layers"]
    return EngineFile(
        file=str(data["file"]),
        layers=(int(first), int(end)),
        inputs=tuple(_spec(s) for s in data["inputs"]),
        outputs=tuple(_spec(s) for s in data["outputs"]),
        profiles=tuple(
            Profile(str(p["name"]), {str(k): _three(v) for k, v in p["axes"].items()})
            for p in data["profiles"]
        ),
        weights=tuple(_spec(s) for s in data["weights"]),
        constants=tuple(map(str, data["constants"])),
        names={str(ours): str(own) for ours, own in data.get("names", {}).items()},
    )


def _spec(data: list[Any]) -> TensorSpec:
    name, dtype, axes = data
    return TensorSpec(str(name), str(dtype), tuple(axes))


def _three(data: list[int]) -> tuple[int, int, int]:
    least, best, most = data
    return int(least), int(best), int(most)
