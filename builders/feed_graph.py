"""A graph and all it reads, for `polygraphy run` in ONNX Runtime and TensorRT.

    python -m twotower.builders.feed_graph BUNDLE --graph denoiser -o DIR

DIR gets `graph.onnx`, the very graph an engine is built from, its weights inputs; `inputs.npz`,
random inputs that make sense; and `data.py`, which gives Polygraphy these and the bundle's weights,
mapped and not copied. Exit code 2 where that cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from twotower.builders.base import INPUTS
from twotower.builders.profiles import cache_capacity
from twotower.builders.segment import fix_axes, segment
from twotower.builders.weight_inputs import place_weights
from twotower.bundle import GRAPH_FILES, Bundle
from twotower.config.model import ModelConfig
from twotower.dtypes import numpy_dtype
from twotower.errors import BuildError, TwoTowerError
from twotower.spec import (
    BLOCK,
    CHUNK_LENGTH,
    COMMIT_FLOOR,
    CONTEXT_HEAD,
    CONTEXT_LENGTH,
    PAST_LENGTH,
    TEMPERATURE,
    THRESHOLD,
    TOKENS,
    TensorSpec,
)
from twotower.weights.external import load_graph

_SCALE = 0.3  # of random states: a state of a text is of that size, and nothing overflows

_SCRIPT = '''"""`polygraphy run --data-loader-script`: inputs, weights mapped from the bundle."""

from pathlib import Path

import numpy as np

DATA = Path({data!r})
WEIGHTS = {{
{weights}}}


def load_data():
    with np.load(Path(__file__).with_name("inputs.npz")) as inputs:
        feed = dict(inputs)
    for name, (dtype, shape, offset) in WEIGHTS.items():
        feed[name] = np.memmap(DATA, dtype=dtype, mode="r", offset=offset, shape=shape)
    yield feed
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOptions:
    """What is fed.

    Attributes:
        length: L of a context graph, tokens a row.
        max_context: As of the build: it fixes the capacity of keys and values.
        layers: First layer and the one after the last; None for all.
    """

    rows: int = 2
    length: int = 16
    max_context: int | None = None
    layers: tuple[int, int] | None = None


def feed_graph(
    bundle: Bundle,
    name: str,
    folder: Path,
    options: FeedOptions | None = None,
) -> None:
    """Writes a graph, its inputs and what feeds them.

    The bundle has weights in float32 or float16: NumPy, which Polygraphy feeds, has no bfloat16.
    Raises BuildError for another type, or if the folder exists.
    """
    chosen = options or FeedOptions()
    bundle.require_weights("feeding a graph")
    if bundle.dtype == "bfloat16":
        raise BuildError(
            f"a {bundle.dtype} graph cannot be fed",
            found=f"NumPy, by which inputs are given, has no {bundle.dtype}",
            do="export the checkpoint with --dtype float16 or float32 for the comparison",
        )
    longest = bundle.config.max_position_embeddings
    capacity = cache_capacity(chosen.max_context, longest)
    fixed = {"T": capacity, "S": bundle.trained_block_size}
    model: onnx.ModelProto = load_graph(bundle.graph_file(name))
    fix_axes(model, fixed)
    signature = bundle.signatures[name].with_sizes(fixed)
    inputs: Sequence[TensorSpec] = signature.inputs
    if chosen.layers is not None and name != CONTEXT_HEAD:
        part = segment(model, signature, chosen.layers, dtype=bundle.dtype)
        model, inputs = part.model, part.inputs
    places = place_weights(model, INPUTS)
    sizes = {"B": chosen.rows, "L": chosen.length, **fixed}
    rng = np.random.default_rng(0)
    fed = {s.name: _values(s, sizes, bundle.config, rng) for s in inputs}
    table = bundle.weights(name)
    lines = [
        f"    {spec.name!r}: ({spec.dtype!r}, {tuple(spec.axes)!r}, {table[spec.name].offset}),\n"
        for spec in places.inputs
    ]
    try:
        folder.mkdir(parents=True)
        (folder / "graph.onnx").write_bytes(model.SerializeToString())
        np.savez(folder / "inputs.npz", **fed)  # type: ignore[arg-type]  # no input is called allow_pickle
        script = _SCRIPT.format(data=str(bundle.data_file(name).resolve()), weights="".join(lines))
        (folder / "data.py").write_text(script, encoding="utf-8")
        if places.inside:  # found beside the graph, as from the bundle
            data = bundle.data_file(name)
            (folder / data.name).symlink_to(data.resolve())
    except OSError as e:
        what = f"'{folder}' cannot be written"
        raise BuildError(what, found=str(e), do="name a folder that does not exist") from e


def _values(
    spec: TensorSpec, sizes: Mapping[str, int], config: ModelConfig, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Random values of an input: lengths that fit one another, tokens of the vocabulary, states."""
    shape = spec.shape(sizes)
    if spec.name in (TOKENS, BLOCK):
        values = rng.integers(0, config.vocab_size, shape)
        if spec.name == BLOCK:  # every second position is still to be predicted
            values[:, ::2] = config.mask_token_id
        return values
    if spec.name == CHUNK_LENGTH:
        return rng.integers(1, sizes["L"] + 1, shape)
    if spec.name in (PAST_LENGTH, CONTEXT_LENGTH):
        return rng.integers(
            1,
            min(64, sizes["T"] - sizes["L"]),
            shape,
        )
    if spec.name == COMMIT_FLOOR:
        return rng.integers(1, 4, shape)
    if spec.name in (THRESHOLD, TEMPERATURE):
        return np.full(
            shape,
            0.9 if spec.name == THRESHOLD else 0.0,
            np.float32,
        )
    return np.asarray(rng.standard_normal(shape) * _SCALE, dtype=numpy_dtype(spec.dtype))


def main(argv: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        prog="python -m twotower.builders.feed_graph", description=about
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle in float32 or float16")
    parser.add_argument("--graph", choices=tuple(GRAPH_FILES), default="denoiser")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="to make")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--length",
        type=int,
        default=16,
        metavar="N",
        help="tokens of a chunk (default: %(default)s)",
    )
    parser.add_argument("--max-context", type=int, metavar="N", help="as of the build (4096)")
    parser.add_argument("--layers", metavar="A:B", help="layers A to B-1 only (all)")
    args = parser.parse_args(argv)
    try:
        first, _, end = (args.layers or "").partition(":")
        options = FeedOptions(
            rows=args.rows,
            length=args.length,
            max_context=args.max_context,
            layers=(int(first), int(end)) if args.layers else None,
        )
        feed_graph(
            Bundle.open(args.bundle, contents=False),
            args.graph,
            args.output,
            options,
        )
    except ValueError:
        parser.error(f"--layers {args.layers!r} is not of the form 0:4")
    except TwoTowerError as e:
        sys.stderr.write(f"{e}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
