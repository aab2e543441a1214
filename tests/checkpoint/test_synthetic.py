"""Synthetic checkpoints: reproducible, in the published layout, with weights a model can run on."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.helpers.errors import fails
from tests.helpers.graphs import FIXTURES
from twotower.checkpoint import synthetic as synthetic_module
from twotower.checkpoint.layout import Role, expected_tensors
from twotower.checkpoint.synthetic import (
    PUBLISHED_CONFIG,
    SyntheticOptions,
    published_slice,
    write_checkpoint,
)
from twotower.config import read_model_config
from twotower.errors import CheckpointError, ConfigError
from twotower.export import Checkpoint

SMALL = json.loads((FIXTURES / "hybrid-a" / "config.json").read_text())


@pytest.fixture(autouse=True)
def small_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer random numbers are drawn than the largest tensor needs, as at real sizes."""
    monkeypatch.setattr(synthetic_module, "_BLOCK", 10_000)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def small(dtype: str = "float32") -> dict[str, Any]:
    return {**SMALL, "torch_dtype": dtype}


def opened(folder: Path, dtype: str = "float32", **options: Any) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(folder, small(dtype), SyntheticOptions(**options)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path, dtype: str) -> None:
    one, same, other = (
        contents(write_checkpoint(tmp_path / name, small(dtype), SyntheticOptions(seed=seed)))
        for name, seed in (("one", 7), ("same", 7), ("other", 8))
    )
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {
        name for name in one if name.endswith(".safetensors")
    }


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_opens_with_every_tensor_as_the_safetensors_library_reads_it(
    tmp_path: Path, dtype: str, shards: int
) -> None:
    folder = tmp_path / "deep" / "c"
    made = opened(folder, dtype, shards=shards)
    assert made.config == read_model_config(folder / "config.json")
    assert {t.dtype for t in made.tensors.values()} == {dtype}
    assert len({t.file for t in made.tensors.values()}) == shards
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in made.tensors.values())
    for shard in folder.glob("*.safetensors"):
        for name, want in load_file(shard).items():
            np.testing.assert_array_equal(made.tensors[name].numpy(), want.float().numpy())


def test_weights_are_finite_varied_and_of_sane_magnitude(tmp_path: Path) -> None:
    made = opened(tmp_path / "c")
    for name, spec in expected_tensors(made.config).items():
        values = made.tensors[name].numpy()
        assert np.isfinite(values).all()
        assert np.abs(values).max() < 8, name
        if len(spec.shape) > 1 and spec.role not in (Role.EMBEDDING, Role.HEAD):
            gain = values.std() * np.sqrt(np.prod(spec.shape[1:]))
            assert 0.7 < gain < 1.4, f"{name} keeps the magnitude of what it is multiplied with"
        if name.endswith(".A_log"):
            np.testing.assert_allclose(np.exp(values[[0, -1]]), [1, 16], rtol=1e-5)
        if name.endswith(".dt_bias"):
            np.testing.assert_allclose(np.log1p(np.exp(values[[0, -1]])), [1e-3, 1e-1], rtol=1e-3)
        if spec.role is Role.NORM:
            assert (values == 1).all()


def test_tensors_of_one_shape_differ(tmp_path: Path) -> None:
    """Swapped weights would otherwise go unseen by whoever compares outputs."""
    made = opened(tmp_path / "c", shards=1)
    drawn = [n for n, s in expected_tensors(made.config).items() if len(s.shape) == 2]
    assert len({made.tensors[n].numpy().tobytes() for n in drawn}) == len(drawn)


def test_a_tensor_larger_than_the_drawn_numbers_is_filled_to_its_end(tmp_path: Path) -> None:
    head = opened(tmp_path / "c").tensors["lm_head.weight"].numpy()
    assert head.size > 10_000
    assert np.count_nonzero(head) == head.size
    flat = head.reshape(-1)
    np.testing.assert_array_equal(flat[10_000:], flat[: head.size - 10_000])


def test_headers_only_are_the_headers_of_the_whole(tmp_path: Path) -> None:
    """The same files but for their content: sizes, headers and index."""
    whole, sparse = (
        write_checkpoint(tmp_path / name, small(), SyntheticOptions(headers_only=headers_only))
        for name, headers_only in (("whole", False), ("sparse", True))
    )
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in sparse.iterdir())
    for path in whole.iterdir():
        other = sparse / path.name
        assert path.stat().st_size == other.stat().st_size
        if path.suffix == ".safetensors":
            end = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
            assert path.read_bytes()[:end] == other.read_bytes()[:end]
            assert not any(other.read_bytes()[end:])
        else:
            assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("kind", ["empty folder", "full folder", "file"])
def test_what_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "c"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
    if kind == "full folder":
        (target / "config.json").write_text("precious")
    before = [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))]
    with fails(CheckpointError, "exists already", found="never overwrites", do="new folder"):
        write_checkpoint(target, small())
    assert [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))] == before


def test_a_slice_of_the_published_config_has_its_widths(tmp_path: Path) -> None:
    """Real widths, other layers; the published constants stay as they are."""
    before = dict(PUBLISHED_CONFIG)
    folder = write_checkpoint(
        tmp_path / "c", published_slice("M*E"), SyntheticOptions(headers_only=True)
    )
    config = Checkpoint.open(folder).config
    assert config.pattern == "M*E"
    sizes = (config.hidden_size, config.vocab_size, config.n_routed_experts)
    assert (*sizes, config.dtype) == (2688, 131072, 128, "bfloat16")
    assert before == PUBLISHED_CONFIG
    assert sum(os.stat(p).st_blocks * 512 for p in folder.iterdir()) < 1 << 20


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_the_same_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    want, got = opened(tmp_path / "wide").tensors, opened(tmp_path / "c", dtype).tensors
    assert {t.dtype for t in got.values()} == {dtype}
    for name, tensor in got.items():  # bfloat16 is cut, not rounded; float16 ends at 6e-8
        np.testing.assert_allclose(
            tensor.numpy(), want[name].numpy(), rtol=2**-7, atol=1e-7, err_msg=name
        )


def test_an_unusable_config_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_checkpoint(tmp_path / "c", {"architectures": ["Other"]})
    assert not list(tmp_path.iterdir())
