"""What `twotower inspect` shows of towers that are programs with experts between them."""

from __future__ import annotations

import json

import pytest

from tests.helpers.commands import Commands
from tests.helpers.trt.install import bundle_with_engines
from twotower.bundle import BUILD_FILE, Bundle, engine_folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with_engines(
        "hybrid-a", tmp_path_factory.mktemp("steps") / "bundle", experts="kernels"
    )


def note_kernels(bundle: Bundle, kernels: int) -> None:
    """As if every program of every profile had been read and had so many kernels."""
    file = engine_folder(bundle, "rtx") / BUILD_FILE
    data = json.loads(file.read_text())
    numbers = {"kernels": kernels, "streams": 1, "events": 0, "scratch": 0}
    program = {**numbers, "capturable": True, "expanded": [], "copied": [], "by_kind": {}}
    for facts in data["report"]["engines"].values():
        facts["inspector"] = {"programs": [{**program, "profile": number} for number in range(3)]}
    file.write_text(json.dumps(data))


def test_launches_of_a_pass_are_those_of_programs_and_of_experts(
    bundle: Bundle, cli: Commands
) -> None:
    """Of each of three layers of experts four kernels, and five for a long chunk of four rows."""
    layers = "4 programs ({}) and 3 layers of experts between them ({})"
    text = cli("inspect", bundle.path).out
    assert f"denoiser denoise: {layers.format('not read', '12 kernels')}\n" in text
    note_kernels(bundle, 10)
    text = cli("inspect", bundle.path).out
    block = layers.format("40 kernels", "12 kernels")
    assert f"denoiser denoise: {block}; 52 launches a pass" in text
    chunk = layers.format("40 kernels", "12 to 15 kernels")
    assert f"context prefill: {chunk}; 52 to 55 launches" in text
    assert "for SM 89, up to 4096 tokens, by Triton 3.9.0" in text
    told = cli.json("inspect", bundle.path)["builds"]["rtx"]["launches"]
    figures = {"programs": 4, "layers": 3, "kernels": 40, "experts": [12, 12]}
    assert told["denoiser"]["denoise"] == figures
    assert told["context"]["prefill"]["experts"] == [12, 15]
    assert set(told) == {"context", "denoiser"}
