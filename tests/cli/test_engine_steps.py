"""What `twotower inspect` shows of towers that are programs with experts between them."""

from __future__ import annotations

import json

import pytest

from tests.helpers.trt.install import bundle_with_engines
from twotower.bundle import BUILD_FILE, Bundle, engine_folder
from twotower.cli.main import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with_engines(
        "hybrid-a", tmp_path_factory.mktemp("steps") / "bundle", experts="kernels"
    )


def note_kernels(bundle: Bundle, kernels: int) -> None:
    """As if every program of every profile had been read and had so many kernels."""
    file = engine_folder(bundle, "rtx") / BUILD_FILE
    data = json.loads(file.read_text())
    program = {
        "kernels": kernels,
        "streams": 1,
        "events": 0,
        "scratch": 0,
        "capturable": True,
        "expanded": [],
        "copied": [],
        "by_kind": {},
    }
    for facts in data["report"]["engines"].values():
        facts["inspector"] = {"programs": [{**program, "profile": number} for number in range(3)]}
    file.write_text(json.dumps(data))


def test_launches_of_a_pass_are_those_of_programs_and_of_experts(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three layers of experts, of four kernels each for a block of one row and five for a long chunk of four rows."""
    assert main(["inspect", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    assert (
        "denoiser denoise: 4 programs (not read) and 3 layers of experts between them (12 kernels)\n"
        in text
    )
    note_kernels(bundle, 10)
    assert main(["inspect", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    assert (
        "denoiser denoise: 4 programs (40 kernels) and 3 layers of experts between them (12 kernels); 52 launches a pass"
        in text
    )
    assert (
        "context prefill: 4 programs (40 kernels) and 3 layers of experts between them (12 to 15 kernels); 52 to 55 launches"
        in text
    )
    assert "for SM 89, up to 4096 tokens, by Triton 3.9.0" in text
    assert main(["inspect", str(bundle.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["builds"]["rtx"]["launches"]
    assert told["denoiser"]["denoise"] == {
        "programs": 4,
        "layers": 3,
        "kernels": 40,
        "experts": [12, 12],
    }
    assert told["context"]["prefill"]["experts"] == [12, 15]
    assert set(told) == {"context", "denoiser"}
