"""Calibration watches what the towers compute, however chunked, and goes on if interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.errors import fails
from tests.helpers.fake_quantization import stack_of, weights_of
from tests.helpers.quantized import TINY, suite_prompts
from twotower.bundle import Bundle
from twotower.calibration import collect as collect_module
from twotower.calibration.activation_statistics import Statistics
from twotower.calibration.collect import collect, watched_chunk
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config import GenerationConfig, read_model_config
from twotower.config.model import parse_model_config
from twotower.errors import CalibrationError, RequestError
from twotower.evaluate.figures import draw_ranges
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.model.reference import reference_generate
from twotower.runtime import Request, TwoTower

CONFIG = GenerationConfig(max_new_tokens=32, ignore_eos=True)
PROMPTS = suite_prompts(5)


def gathered(
    bundle: Path,
    output: Path,
    prompts: tuple[Any, ...] = PROMPTS,
    config: GenerationConfig = CONFIG,
    **options: Any,
) -> Statistics:
    return collect(Bundle.open(bundle), [Request(p) for p in prompts], output, config, **options)


def assert_same(a: Statistics, b: Statistics) -> None:
    for tower in ("context", "denoiser"):
        for name, array in a.towers[tower].arrays().items():
            np.testing.assert_allclose(
                b.towers[tower].arrays()[name], array, rtol=1e-9, err_msg=f"{tower} {name}"
            )


@pytest.fixture(scope="module")
def whole(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return gathered(tiny_bundle, tmp_path_factory.mktemp("whole") / "stats")


@pytest.mark.slow
def test_ranges_are_those_torch_sees(tiny_bundle: Path, whole: Statistics) -> None:
    """Hooks in the torch towers, on the same texts, see the same extremes."""
    config, tensors = read_model_config(TINY / "config.json"), weights_of(TINY)
    towers = tuple(
        load(config, lambda name: torch.from_numpy(tensors[name]))
        for load in (load_context_tower, load_denoiser_tower)
    )
    seen: dict[str, list[float]] = {}

    def hook(name: str) -> Any:
        return lambda _, inputs: seen.setdefault(name, []).append(float(inputs[0].abs().max()))

    for prefix, tower in zip(("context_tower", "denoiser_tower"), towers, strict=True):
        for name, module in tower.named_modules():
            skipped = "experts." in name or name.startswith(("t_", "lm_head"))
            if isinstance(module, nn.Linear) and not skipped:
                module.register_forward_pre_hook(hook(stack_of(f"{prefix}.{name}.weight")))
    with TwoTower.open(tiny_bundle) as model:
        assert model.tokenizer is not None
        for prompt in PROMPTS:
            reference_generate(towers, list(model.tokenizer.encode(prompt)), CONFIG)  # type: ignore[arg-type]
    watched = whole.towers["denoiser"]
    for i, name in enumerate(watched.names):
        if name in seen:
            assert np.nanmax(watched.amax[i, 1:]) == pytest.approx(max(seen[name]), rel=1e-4), name
    assert len([n for n in watched.names if n in seen]) >= 10


@pytest.mark.slow
def test_sampled_calibrations_are_the_same_again(tiny_bundle: Path, tmp_path: Path) -> None:
    config = GenerationConfig(max_new_tokens=32, ignore_eos=True, temperature=50.0)
    runs = [gathered(tiny_bundle, tmp_path / name, PROMPTS[:2], config) for name in ("a", "b")]
    assert_same(*runs)
    assert runs[0].facts["generation"]["seed"] == 0


def test_every_pass_is_counted_once_in_its_bucket(whole: Statistics) -> None:
    d = whole.towers["denoiser"]
    width = {"in_proj": 128, "out_proj": 256, "qkv_proj": 128}
    for i, name in enumerate(d.names):
        columns = next((w for key, w in width.items() if key in name), None)
        if columns:
            steps = d.count[i, 1:].sum() / (16 * columns)
            assert steps == whole.facts["passes"], name
            assert d.count[i, 0] / (16 * columns) == whole.facts["blocks"], (
                "each finished block once without masks"
            )
    hidden = next(i for i, n in enumerate(d.names) if n.endswith("mixer.experts.down_proj.weight"))
    assert d.count[hidden, 1:].sum() == whole.facts["passes"] * 16 * 2 * 96, (
        "two experts a token, and none that was not asked"
    )


def test_any_chunking_of_the_prompts_gives_the_same_numbers(
    tiny_bundle: Path, whole: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding of the last chunk leaves no trace."""
    monkeypatch.setattr(collect_module, "watched_chunk", lambda config: 7)
    chunked = gathered(tiny_bundle, tmp_path / "chunked")
    for tower in ("context", "denoiser"):
        a, b = whole.towers[tower], chunked.towers[tower]
        np.testing.assert_array_equal(a.count, b.count)
        np.testing.assert_allclose(b.amax, a.amax, rtol=1e-4)
        np.testing.assert_allclose(b.squares, a.squares, rtol=1e-4)


@contextmanager
def generated(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> Iterator[list[Any]]:
    """The calls that generate; stopped after so many, the last one's passes not yet counted."""
    real, calls = TwoTower.generate, []

    def generate(self: TwoTower, *args: Any) -> Any:
        result = real(self, *args)
        calls.append(args)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patched:
        patched.setattr(TwoTower, "generate", generate)
        yield calls


def test_an_interrupted_run_goes_on_and_ends_the_same(
    tiny_bundle: Path, whole: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After the passes of the third prompt were watched: half a prompt must not be counted.
    with generated(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
        gathered(tiny_bundle, tmp_path / "stats")
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(".stats.") and not (tmp_path / "stats").exists()
    with generated(monkeypatch) as calls:
        resumed = gathered(tiny_bundle, tmp_path / "stats")
    assert len(calls) == len(PROMPTS) - 2, "two prompts were done"
    assert_same(whole, resumed)
    assert resumed.facts == whole.facts
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]


def test_another_command_does_not_take_up_what_was_kept(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with generated(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        gathered(tiny_bundle, tmp_path / "stats", PROMPTS[:3])
    other = replace(CONFIG, max_new_tokens=16)
    made = gathered(tiny_bundle, tmp_path / "stats", PROMPTS[:2], other)
    assert made.facts["prompts"] == 2


def test_a_disk_that_is_full_at_the_end_loses_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    def full(_: Statistics) -> Any:
        raise OSError("No space left on device")

    with fails(CalibrationError, "could not be written", do="goes on where it was"):
        gathered(tiny_bundle, tmp_path / "stats", PROMPTS[:2], draw=full)
    assert not (tmp_path / "stats").exists()


def test_bad_input(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="nothing to calibrate on"):
        gathered(tiny_bundle, tmp_path / "a", ())
    (tmp_path / "there").mkdir()
    with pytest.raises(CalibrationError, match="exists already"):
        gathered(tiny_bundle, tmp_path / "there")


def test_every_prompt_is_checked_before_the_first_is_read(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TwoTower, "generate", lambda *a, **o: pytest.fail("work began"))
    with pytest.raises(RequestError, match="99999"):
        gathered(tiny_bundle, tmp_path / "stats", ("fine", (1, 99999)))
    assert not list(tmp_path.iterdir())


def test_what_is_watched_of_the_published_model_stays_below_a_gigabyte() -> None:
    config = parse_model_config(PUBLISHED_CONFIG, "published")
    chunk = watched_chunk(config)
    assert 16 <= chunk <= 64
    layers = sum(kind.name == "MOE" for kind in config.layers)
    hidden = layers * config.n_routed_experts * config.moe_intermediate_size * 4
    assert hidden * chunk <= 1 << 30


@pytest.mark.slow
def test_the_picture_has_a_panel_a_kind(whole: Statistics) -> None:
    drawn = draw_ranges(whole)
    assert drawn["ranges.png"].startswith(b"\x89PNG")
    svg = drawn["ranges.svg"].decode()
    parts = ("Mamba, in", "attention, out", "routed experts, hidden", "shared expert, in")
    for title in (*parts, "head, in"):
        assert title in svg
    assert draw_ranges(whole) == drawn, "the same numbers, the same picture"
