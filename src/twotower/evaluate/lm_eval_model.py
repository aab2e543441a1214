"""A bundle as a model of lm-evaluation-harness.

It generates in either mode; likelihoods are the context tower's.

`python -m twotower.evaluate.lm_eval_model run --model twotower --model_args bundle=PATH --tasks
...` is that library's own command line with this model registered.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from twotower.config import GenerationConfig
from twotower.errors import ConfigError, RequestError, TwoTowerError
from twotower.extras import missing_library
from twotower.runtime import Request, TwoTower

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows
except ModuleNotFoundError as e:
    missing = missing_library(e, "a bundle as a model of lm-evaluation-harness")
    if missing is None:
        raise
    if __name__ != "__main__":
        raise missing from e
    sys.stderr.write(f"{type(missing).__name__}: {missing}\n")
    sys.exit(2)

# What the library passes to every model, and what some of its tasks read from the same list.
_PASSED_TO_ALL = {"batch_size", "max_batch_size", "device", "tokenizer", "pretrained", "model"}
# Names of the longest generation, the first one counts; the library's tasks use the first two, its
# command line any.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN_OPTIONS = {"do_sample", "until", "temperature", "top_p", "top_k", "num_beams", *_LENGTHS}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    """The model arguments beside the bundle."""

    target: str | None = None
    mode: str = "diffusion"
    preset: str | None = None
    threshold: float | None = None
    steps: int | None = None
    max_batch: int = 8
    max_gen_toks: int = 256
    seed: int | None = None


@register_model("twotower")
class TwoTowerLM(LM):  # type: ignore[misc]
    """`generate_until`, `loglikelihood` and `loglikelihood_rolling` of a bundle with a tokenizer.

    Args:
        bundle: The bundle's folder.
        arguments: `target`, the engines to run; `mode`, `diffusion` or `ar`, for generation only;
            `preset` of the bundle to start from; `threshold` and `steps` instead of the preset's;
            `max_batch`, requests run together; `max_gen_toks`, longest generation where the task
            names none; `seed` of what is sampled, by default the preset's or 0: a run gives the
            same texts again.

    Raises:
        ConfigError: an argument is unknown or out of range, or the bundle has no tokenizer.
    """

    def __init__(self, bundle: str = "", **arguments: Any) -> None:
        super().__init__()
        known = _Arguments.__dataclass_fields__
        unknown = sorted(set(arguments) - set(known) - _PASSED_TO_ALL)
        if unknown or not bundle:
            found = f"unknown: {', '.join(unknown)}" if unknown else "no bundle"
            do = f"give --model_args bundle=PATH, and of {', '.join(known)} what is wanted"
            raise ConfigError("these model arguments cannot be used", found=found, do=do)
        given = _Arguments(**{k: v for k, v in arguments.items() if k in known})
        if not isinstance(given.max_batch, int):
            raise ConfigError(
                f"max_batch={given.max_batch!r} cannot be used",
                found="allowed: 1 or more",
                do="choose another max_batch",
            )
        self._max_batch = given.max_batch
        self._model = TwoTower.open(
            str(bundle), target=given.target, preset=given.preset, max_batch=given.max_batch
        )
        if self._model.tokenizer is None:
            self._model.close()
            raise ConfigError(
                f"bundle '{bundle}' has no tokenizer",
                found="tasks are text",
                do="export a checkpoint that has a tokenizer.json",
            )
        changes = {
            "mode": given.mode,
            "max_new_tokens": given.max_gen_toks,
            "confidence_threshold": given.threshold,
            "steps_per_block": given.steps,
            "seed": given.seed,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        try:
            self._base = GenerationConfig.from_mapping(changes, base=self._model.defaults).seeded()
        except ConfigError:
            self._model.close()
            raise

    @property
    def model(self) -> TwoTower:
        """The opened bundle."""
        return self._model

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the library's cache."""
        return "twotower"

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each ended by its own stop strings, in the order of the requests."""
        seen: Counter[str] = Counter()
        asked = []
        for context, options in (r.args for r in requests):
            config = self._config(dict(options))
            key = repr((context, config))
            # A repeated request is another sample.
            seed = ((self._base.seed or 0) + seen[key]) % 2**64
            asked.append(Request(context, replace(config, seed=seed)))
            seen[key] += 1
        texts = [""] * len(asked)
        for event in self._model.stream(asked):
            if event.result is not None:
                texts[event.row] = event.result.text or ""
                self.cache_hook.add_partial(
                    "generate_until", requests[event.row].args, texts[event.row]
                )
        return texts

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation; bounds are in `Score`."""
        # The longest first: one that is too long is refused at once and not hours later, and a
        # batch has texts of a length.
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i].args)))
        out = [(0.0, True)] * len(requests)
        for part in self._parts(len(order)):
            pairs: list[tuple[str, str]] = [requests[i].args for i in order[part]]
            for i, score in zip(
                order[part],
                self._model.score(pairs),
                strict=True,
            ):
                out[i] = (score.total, score.greedy)
                self.cache_hook.add_partial(
                    "loglikelihood",
                    requests[i].args,
                    out[i],
                )
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts from the BOS token on, long ones in windows."""
        out: list[float] = []
        for part in self._parts(len(requests)):
            windows = [self._windows(*r.args) for r in requests[part]]
            scores = iter(self._model.score([window for some in windows for window in some]))
            for request, some in zip(requests[part], windows, strict=True):
                out.append(math.fsum(next(scores).total for _ in some))
                self.cache_hook.add_partial(
                    "loglikelihood_rolling",
                    request.args,
                    out[-1],
                )
        return out

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text as pairs of context and continuation; every token is predicted exactly once."""
        bos = self._model.config.bos_token_id
        assert self._model.tokenizer is not None
        tokens = self._model.tokenizer.encode(text)
        tokens = tokens[1:] if tokens[:1] == [bos] else tokens
        longest = self._model.config.max_position_embeddings - 1
        out = []
        for inputs, predicted in get_rolling_token_windows(tokens, bos, longest, 1):
            known = len(inputs) - len(predicted) + 1  # inputs end one before what they predict
            out.append((list(inputs[:known]), list(predicted)))
        return out

    def _parts(self, count: int) -> Iterator[slice]:
        """A batch at a time: what is finished is in the library's cache if the rest fails."""
        for start in range(0, count, self._max_batch):
            yield slice(start, start + self._max_batch)

    def _config(self, options: dict[str, Any]) -> GenerationConfig:
        """A task's options as this project's."""
        unknown = sorted(set(options) - _KNOWN_OPTIONS)
        if int(options.get("num_beams") or 1) != 1:
            unknown.append("num_beams above 1")
        if unknown:
            found, do = f"known: {', '.join(sorted(_KNOWN_OPTIONS))}", "choose a task without them"
            raise RequestError(
                f"generation option(s) {', '.join(unknown)} cannot be honoured", found=found, do=do
            )
        sampled = options.get("do_sample") is not False
        until = options.get("until") or []
        stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
        temperature = float(options.get("temperature") or 0.0) if sampled else 0.0
        top_p = float(options.get("top_p", 1.0)) if self._base.mode == "ar" and temperature else 1.0
        top_k = (
            max(int(options.get("top_k") or 0), 0) if temperature else 0
        )  # other libraries write "all" as 0 or -1
        most = next(
            (int(options[name]) for name in _LENGTHS if options.get(name) is not None),
            self._base.max_new_tokens,
        )
        return replace(
            self._base,
            stop=stop,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=most,
        )


def main() -> int:
    """The library's own command line, with this project's errors."""
    try:
        cli_evaluate()
    except TwoTowerError as e:
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
