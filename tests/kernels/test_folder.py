"""The folder of compiled kernels: whole or not at all; without Triton the extra is named."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.helpers.errors import check_error
from tests.helpers.expert_layers import make_shape
from twotower.errors import BuildError, ConfigError, RequestError, TwoTowerError
from twotower.kernels import compile as compiler
from twotower.kernels import read_manifest
from twotower.kernels.cubin_manifest import Cubin
from twotower.kernels.signatures import KernelSpec

SHAPE = make_shape(64, 64, 8, 2)


class Compiler:
    """In place of Triton; fails at a kernel that is named."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __call__(self, spec: KernelSpec, sm: int, folder: Path) -> Cubin:
        if spec.name == self.fails:
            raise BuildError("no", found="an injected failure", do="nothing")
        code = f"{spec.name} {sm} {self.fails}".encode()
        file = f"{spec.name}.sm{sm}.cubin"
        (folder / file).write_bytes(code)
        digest = hashlib.sha256(code).hexdigest()
        return Cubin(spec.name, sm, file, spec.function, digest, spec.arguments, 2, 128, 0, 32, 0)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "require_libraries", lambda *_, **__: None)
    monkeypatch.setattr(compiler, "_triton_version", lambda: "3.9.0")
    monkeypatch.setattr(compiler, "compile_kernel", Compiler())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("installed")
def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    first = compiler.compile_kernels(SHAPE, [80], folder)
    monkeypatch.setattr(compiler, "compile_kernel", Compiler(fails="down-batch"))
    with pytest.raises(BuildError):
        compiler.compile_kernels(SHAPE, [90], folder)
    assert read_manifest(folder) == first
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]
    monkeypatch.setattr(compiler, "compile_kernel", Compiler())
    assert compiler.compile_kernels(SHAPE, [90], folder).sms == (90,)
    assert all(path.suffix != ".cubin" or "sm90" in path.name for path in folder.iterdir())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("most", "tiers"), [(1, 1), (8, 1), (9, 2), (4096, 4)])
def test_kernels_for_more_tokens_than_there_will_be_are_left_out(
    tmp_path: Path, most: int, tiers: int
) -> None:
    made = compiler.compile_kernels(SHAPE, [80], tmp_path / "k", max_tokens=most)
    assert len([c for c in made.cubins if c.kernel.startswith("up-")]) == tiers
    assert made.max_tokens >= most


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("sms", "most", "error", "says"),
    [([80], 5000, RequestError, "5000 tokens"), ([80, 75], 4096, BuildError, "SM 75")],
)
def test_what_there_are_no_kernels_for_is_refused_before_any_work(
    tmp_path: Path, sms: list[int], most: int, error: type[TwoTowerError], says: str
) -> None:
    with pytest.raises(error, match=says) as e:
        compiler.compile_kernels(SHAPE, sms, tmp_path / "k", max_tokens=most)
    check_error(str(e.value), says)
    assert not list(tmp_path.iterdir())


def test_without_triton_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.extras._installed", lambda _: False)
    with pytest.raises(ConfigError, match="compiling the expert kernels") as e:
        compiler.compile_kernels(SHAPE, [80], tmp_path / "k")
    check_error(str(e.value), "libraries that are not installed")
    assert "twotower[kernels]" in e.value.do
