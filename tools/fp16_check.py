"""Half precision against float32, token by token, on the trained model (`make fp16-check`).

The float16 graph is computed twice: as ONNX Runtime runs it on a CPU, with float16 weights and
inputs and float32 between operators, and with every result rounded to float16, which no CPU library
does by itself (see tools.half_precision). Exit code 1 if fewer than 99 % of the prompts
get the same tokens, in diffusion or in autoregressive mode.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tools.agreement import Agreement, measure_agreement
from tools.half_precision import RoundingBuilder
from twotower import TwoTower
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.base import DENSE
from twotower.bundle import Bundle, engine_folder
from twotower.evaluate.suite import load_suite
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.runtime.engines.ort import OrtEngine
from twotower.runtime.engines.towers import Towers
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, signatures

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--checkpoint", default=str(ROOT / "assets" / "twotower-tiny"), metavar="FOLDER"
    )
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--limit", type=int, metavar="N", help="only N prompts of each kind")
    parser.add_argument(
        "--at-least",
        type=float,
        default=99.0,
        metavar="P",
        help="percent of the prompts that must agree (%(default)s)",
    )
    args = parser.parse_args()
    suite = load_suite().only(limit=args.limit)
    checkpoint = Checkpoint.open(Path(args.checkpoint))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="twotower-fp16-") as scratch:
        wide = export_bundle(checkpoint, Path(scratch) / "float32", ExportConfig(dtype="float32"))
        narrow = export_bundle(
            checkpoint, Path(scratch) / args.dtype, ExportConfig(dtype=args.dtype)
        )
        build_engines(wide, "ort-cpu", builder_for("ort-cpu"))
        record = build_engines(narrow, "ort-cpu", RoundingBuilder())
        count = {
            name: sum(operators.values()) for name, operators in record.report["rounded"].items()
        }
        print(
            f"{args.dtype}: results rounded in each graph: {', '.join(f'{name} {n}' for name, n in count.items())}"
        )
        results = []
        with TwoTower.open(wide.path, target="ort-cpu") as reference:
            with TwoTower.open(narrow.path, target="ort-cpu") as rounded:
                results += _reported(
                    "every result rounded", measure_agreement(reference, rounded, suite.problems)
                )
            if args.dtype == "float16":  # the CPU has no bfloat16 for every operator
                with _as_exported(narrow, reference) as model:
                    results += _reported(
                        "the graph as exported", measure_agreement(reference, model, suite.problems)
                    )
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if all(r.percent >= args.at_least for r in results) else 1


def _reported(what: str, results: Iterable[Agreement]) -> list[Agreement]:
    out = list(results)
    for r in out:
        where = ", ".join(f"{p.problem} at token {p.token}" for p in r.divergences) or "nowhere"
        same = f"same tokens on {r.prompts - len(r.divergences)} of {r.prompts} prompts ({r.percent:.2f} %)"
        print(f"{what:<22} {r.mode:<10} {same}; they diverge: {where}")
    return out


def _as_exported(bundle: Bundle, reference: TwoTower) -> TwoTower:
    """The very graphs a GPU target gets, in ONNX Runtime on the CPU, which has no fused experts."""
    config = BuildConfig(experts=DENSE)
    record = build_engines(bundle, "ort-cuda", builder_for("ort-cuda"), config=config)
    folder, contract = engine_folder(bundle, "ort-cuda"), signatures(bundle.config, record.dtype)
    engines = [
        OrtEngine(folder / f"{n}.onnx", bundle.path, contract[n], pack=True, threads=1)
        for n in (CONTEXT, CONTEXT_HEAD, DENOISER)
    ]
    return TwoTower.from_towers(
        Towers(bundle.config, record.dtype, *engines),
        tokenizer=reference.tokenizer,
        trained_block_size=bundle.trained_block_size,
        defaults=reference.defaults,
    )


if __name__ == "__main__":
    sys.exit(main())
