"""Opening a checkpoint finds all that is wrong with it; what it gives is what the shards hold."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.helpers.errors import fails
from tests.helpers.graphs import FIXTURES
from twotower.checkpoint.shard import HeaderError, Tensor, read_header
from twotower.errors import CheckpointError, ConfigError
from twotower.export import Checkpoint, locate_checkpoint

SOURCE = FIXTURES / "hybrid-a"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The fixture, for a test to damage."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", INDEX, FIRST, SECOND):
        shutil.copyfile(SOURCE / name, folder / name)
    return folder


def refused(folder: Path) -> CheckpointError:
    """The one error that opening the folder gives."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert caught.value.what
    assert caught.value.found
    assert caught.value.do
    return caught.value


def test_a_checkpoint_of_another_size_is_refused(copy: Path) -> None:
    config = {**json.loads((copy / "config.json").read_text()), "n_routed_experts": 9}
    (copy / "config.json").write_text(json.dumps(config))
    found = refused(copy).found
    assert "context_tower.layers.1.mixer.experts.8.up_proj.weight: missing" in found
    assert "context_tower.layers.1.mixer.gate.weight: shape [8, 64] instead of [9, 64]" in found


def all_tensors() -> dict[str, torch.Tensor]:
    return {**load_file(SOURCE / FIRST), **load_file(SOURCE / SECOND)}


def in_one_file(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(SOURCE / "config.json", folder / "config.json")
    save_file(tensors, folder / SINGLE)
    return folder


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def move_second(folder: Path, name: str) -> None:
    """Says in the index that the second shard has another name."""
    edit_index(
        folder,
        lambda table: table.update({t: name for t, file in table.items() if file == SECOND}),
    )


def shard(path: Path, header: Any, data: bytes) -> Path:
    """A safetensors file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(first: int, last: int, *shape: int) -> dict[str, Any]:
    sizes = list(shape or [(last - first) // 4])
    return {"dtype": "F32", "shape": sizes, "data_offsets": [first, last]}


# --- what is sound opens


def test_a_sound_checkpoint_opens_with_every_tensor_in_its_shard(copy: Path) -> None:
    opened, want = Checkpoint.open(str(copy)), all_tensors()
    assert opened.path == copy
    assert set(opened.tensors) == set(want)
    assert {n: t.shape for n, t in opened.tensors.items()} == {
        n: tuple(t.shape) for n, t in want.items()
    }
    weight_map = json.loads((copy / INDEX).read_text())["weight_map"]
    assert {n: t.file.name for n, t in opened.tensors.items()} == weight_map


def test_one_file_without_an_index_is_the_same_model(copy: Path, tmp_path: Path) -> None:
    single = Checkpoint.open(in_one_file(tmp_path / "single", all_tensors()))
    assert set(single.tensors) == set(Checkpoint.open(copy).tensors)
    assert {t.file.name for t in single.tensors.values()} == {SINGLE}
    assert list(single.identity()) == [SINGLE]


def test_identity_is_size_and_hash_of_every_shard(copy: Path) -> None:
    ticks: list[int] = []
    before = Checkpoint.open(copy).identity(ticks.append)
    assert {name: record["size"] for name, record in before.items()} == {
        name: (copy / name).stat().st_size for name in (FIRST, SECOND)
    }
    assert sum(ticks) == sum(record["size"] for record in before.values())
    with (copy / SECOND).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    after = Checkpoint.open(copy).identity()
    assert after[FIRST] == before[FIRST]
    assert after[SECOND]["sha256"] != before[SECOND]["sha256"]


@pytest.mark.parametrize("single", [False, True])
def test_a_snapshot_of_links_into_a_blob_store_is_accepted(
    copy: Path, tmp_path: Path, single: bool
) -> None:
    """The layout of a hub cache: `snapshots/<revision>/name` is a link to `../../blobs/<hash>`."""
    source = in_one_file(tmp_path / "single", all_tensors()) if single else copy
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    opened, plain = Checkpoint.open(snapshot), Checkpoint.open(source)
    name = "denoiser_tower.layers.3.mixer.q_proj.weight"
    np.testing.assert_array_equal(opened.tensors[name].numpy(), plain.tensors[name].numpy())
    assert opened.identity() == plain.identity()


# --- tensors that do not fit the model


def test_everything_wrong_with_the_tensors_is_in_one_error(tmp_path: Path) -> None:
    tensors = all_tensors()
    gone = ["context_tower.norm_f.weight", "denoiser_tower.layers.7.mixer.o_proj.weight"]
    for name in gone:
        del tensors[name]
    tensors["denoiser_tower.layers.8.norm.weight"] = torch.zeros(64)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()
    tensors["t_embedder.mlp.0.bias"] = tensors["t_embedder.mlp.0.bias"].to(torch.int8)
    tensors["t_block.1.bias"] = torch.zeros(3, dtype=torch.float64)
    error = refused(in_one_file(tmp_path / "bad", tensors))
    assert "has 7 problem(s)" in error.what
    assert set(error.found.split("; ")) == {
        *(f"{name}: missing" for name in gone),
        "denoiser_tower.layers.8.norm.weight: not part of this model",
        "lm_head.weight: shape [64, 256] instead of [256, 64]",
        "t_embedder.mlp.0.bias: dtype I8 instead of one of BF16, F16, F32",
        "t_block.1.bias: shape [3] instead of [192]",
        "t_block.1.bias: dtype F64 instead of one of BF16, F16, F32",
    }
    assert "config.json" in error.do


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    error = refused(in_one_file(tmp_path / "bad", {"lm_head.weight": torch.zeros(256, 64)}))
    missing = len(all_tensors()) - 1
    assert f"has {missing} problem(s)" in error.what
    assert error.found.count(": missing") == 20
    assert error.found.endswith(f"; and {missing - 20} more")


# --- shards that are damaged

ONE = {"w": entry(0, 8)}
TWICE = b'{"w": %s, "w": %s}' % ((json.dumps(entry(0, 8)).encode(),) * 2)
KEY_TWICE = b'{"w": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}'
GAP = "overlap or leave a hole at byte"
# What an entry of 8 bytes says instead of what it should.
MALFORMED: dict[str, dict[str, Any]] = {
    "negative offset": {"data_offsets": [-8, 0]},
    "offsets reversed": {"data_offsets": [8, 0]},
    "offsets of huge numbers": {"data_offsets": [10**4000, 10**4000 + 8]},
    "offsets that are no whole numbers": {"data_offsets": [0.0, 8.0]},
    "three offsets": {"data_offsets": [0, 4, 8]},
    "shape of another size": {"shape": [3]},
    "negative shape": {"shape": [-1, -2]},
    "shape that is no list": {"shape": 2},
    "unknown dtype": {"dtype": "F31"},
    "dtype that is no name": {"dtype": ["F32"]},
}
# Header, data behind it, and what is said; the length is the header's own.
DAMAGE: dict[str, tuple[Any, bytes, str]] = {
    "data cut": (ONE, bytes(7), "truncated"),
    "data left over": (ONE, bytes(9), "oversized"),
    "not JSON": (b"{]", b"", "not JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "not JSON"),
    "nested too deeply": (b"[" * 100_000, b"", "not JSON"),
    "a list": ([ONE], bytes(8), "not a JSON object"),
    "a name twice": (TWICE, bytes(8), "'w' is there twice"),
    "a key twice": (KEY_TWICE, bytes(8), "'dtype' is there twice"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), GAP),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16), GAP),
    "beyond the end": ({"a": entry(0, 8), "b": entry(8, 1 << 40)}, bytes(16), "truncated"),
    "not from the start": ({"a": entry(4, 12)}, bytes(12), GAP),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "'w' is malformed"),
    "entry that is no object": ({"w": [0, 8]}, bytes(8), "'w' is malformed"),
    **{
        what: ({"w": {**entry(0, 8), **says}}, bytes(8), "'w' is malformed")
        for what, says in MALFORMED.items()
    },
}
WRONG_LENGTHS = {
    b"": "truncated",
    bytes(4): "truncated",
    struct.pack("<Q", 1000) + b"{}": "header says 1000",
    struct.pack("<Q", 2**63) + b"{}": f"header says {2**63}",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named_with_what_is_wrong(copy: Path, damage: str) -> None:
    header, data, says = DAMAGE[damage]
    shard(copy / SECOND, header, data)
    check_damaged(copy, says)


@pytest.mark.parametrize("content", WRONG_LENGTHS, ids=WRONG_LENGTHS.values())
def test_a_header_of_an_impossible_length_is_not_read(copy: Path, content: bytes) -> None:
    (copy / SECOND).write_bytes(content)
    check_damaged(copy, WRONG_LENGTHS[content])


def check_damaged(copy: Path, says: str) -> None:
    with pytest.raises(HeaderError):
        read_header(copy / SECOND)
    error = refused(copy)
    assert "has 1 problem(s)" in error.what, "its tensors are not listed on top of it"
    assert error.found.startswith(f"{SECOND!r}: ")
    assert says in error.found
    assert len(error.found) < 600, "a hostile header does not fill the screen"
    assert "again" in error.do


def test_a_sound_header_gives_places_in_the_file(tmp_path: Path) -> None:
    """Metadata are no tensor, the header has an order of its own, an empty tensor has no place."""
    header = {
        "b": entry(8, 12),
        "__metadata__": {"format": "pt"},
        "none": entry(8, 8, 0, 3),
        "a": entry(0, 8),
    }
    read = read_header(shard(tmp_path / "s", header, bytes(12)))
    start = (tmp_path / "s").stat().st_size - 12
    assert {n: (t.offset - start, t.nbytes, t.shape) for n, t in read.items()} == {
        "a": (0, 8, (2,)),
        "none": (8, 0, (0, 3)),
        "b": (8, 4, (1,)),
    }


def test_all_damaged_shards_are_named_at_once(copy: Path) -> None:
    (copy / FIRST).unlink()
    os.truncate(copy / SECOND, 100)
    error = refused(copy)
    assert "has 2 problem(s)" in error.what
    assert f"{FIRST}: missing" in error.found
    assert f"{SECOND!r}: truncated" in error.found


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_a_shard_that_is_no_file_is_refused_and_not_waited_for(
    copy: Path, make: Callable[[Path], None]
) -> None:
    (copy / FIRST).unlink()
    make(copy / FIRST)
    assert "not a regular file" in refused(copy).found


def test_a_shard_that_cannot_be_read_says_why(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def failing(self: Path, *args: Any, **options: Any) -> Any:
        if self.name == FIRST:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", failing)
    assert os.strerror(errno.EIO) in refused(copy).found


# --- the index


@pytest.mark.parametrize("link", [False, True])
def test_a_shard_that_is_missing_or_a_link_to_nothing_is_named_once(copy: Path, link: bool) -> None:
    (copy / SECOND).unlink()
    if link:
        (copy / SECOND).symlink_to("../../blobs/gone")
    assert refused(copy).found == f"{SECOND}: missing"


STORED = f"t_block.1.bias: stored in {SECOND}"


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ({"t_block.1.bias": None}, f"{STORED}, but the index does not list it"),
        ({"t_block.1.bias": FIRST}, f"{STORED}, but the index says '{FIRST}'"),
        ({"phantom": FIRST}, f"phantom: the index says {FIRST}, which does not hold it"),
    ],
)
def test_an_index_that_differs_from_the_shards(copy: Path, says: Any, found: str) -> None:
    ((tensor, file),) = says.items()
    edit_index(copy, lambda table: table.update(says) if file else table.pop(tensor))
    assert refused(copy).found == found


def test_a_tensor_stored_twice_is_found(copy: Path) -> None:
    first = load_file(copy / FIRST)
    save_file({**first, "t_block.1.bias": torch.zeros(192)}, copy / FIRST)
    assert f"t_block.1.bias: stored twice, in {FIRST} and {SECOND}" in refused(copy).found


OUTSIDE = "../outside.safetensors", "a/../../outside.safetensors", "{absolute}"


@pytest.mark.parametrize("name", [*OUTSIDE, "", "..", "a\0b", "\ud800"])
def test_an_index_may_not_lead_out_of_the_folder(copy: Path, name: str) -> None:
    """The file outside is a sound shard: only its place is wrong."""
    outside = shutil.copyfile(copy / SECOND, copy.parent / "outside.safetensors")
    name = name.format(absolute=outside)
    move_second(copy, name)
    assert refused(copy).found.startswith(
        f"the index names a path outside the folder, or none at all: {name[:80]!r}"[:-1]
    )


def test_a_linked_subfolder_may_not_lead_out(copy: Path) -> None:
    """Unlike a shard that is itself a link, which is how a hub cache stores it."""
    (copy.parent / "elsewhere").mkdir()
    shutil.move(copy / SECOND, copy.parent / "elsewhere" / SECOND)
    (copy / "sub").symlink_to("../elsewhere")
    move_second(copy, f"sub/{SECOND}")
    assert "outside the folder" in refused(copy).found


def test_a_shard_in_a_subfolder_is_allowed(copy: Path) -> None:
    (copy / "sub").mkdir()
    shutil.move(copy / SECOND, copy / "sub" / SECOND)
    move_second(copy, f"sub/{SECOND}")
    assert sorted(Checkpoint.open(copy).identity()) == [FIRST, f"sub/{SECOND}"]


NO_INDEX = ["", "{", "[]", "null", "{}", "[" * 100_000]
NO_INDEX += [f'{{"weight_map": {said}}}' for said in ("[]", "null", '{"a": "x", "a": "y"}')]


@pytest.mark.parametrize("text", NO_INDEX, ids=lambda text: text[:40] or "empty")
def test_an_index_of_another_form_is_refused(copy: Path, text: str) -> None:
    (copy / INDEX).write_text(text)
    error = refused(copy)
    assert error.found.startswith(f"{INDEX}: not a readable index")
    assert "has 1 problem(s)" in error.what


@pytest.mark.parametrize("value", [None, 3, [FIRST], {"file": FIRST}])
def test_an_index_whose_file_is_no_name_is_refused(copy: Path, value: Any) -> None:
    edit_index(copy, lambda table: table.update(phantom=value))
    assert f"{INDEX}: the file of phantom is not a name" in refused(copy).found


def test_no_weights_at_all_is_said_plainly(copy: Path) -> None:
    for name in (INDEX, FIRST, SECOND):
        (copy / name).unlink()
    assert refused(copy).found == f"neither {INDEX} nor {SINGLE} is there"


# --- the folder and its config


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    names = {"nowhere": "no such folder", "file": "a file", "n" * 5000: "no such folder"}
    for name, found in names.items():
        error = refused(tmp_path / name)
        assert error.found == found
        assert "config.json" in error.do


def test_a_folder_without_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        Checkpoint.open(copy)


# --- where a checkpoint is looked for


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "the hub was asked"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail(asked))


@pytest.mark.usefixtures("no_hub")
def test_a_local_folder_is_taken_before_the_hub(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent.parent)
    assert locate_checkpoint(str(copy)) == copy
    assert locate_checkpoint(f"{copy.parent.name}/{copy.name}") == Path(copy.parent.name, copy.name)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert locate_checkpoint(f"~/{copy.name}") == copy


def test_a_hub_id_is_downloaded_without_other_formats(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_checkpoint("owner/model") == copy
    ((name, patterns),) = asked
    assert name == "owner/model"
    wanted = {FIRST, INDEX, "config.json", "tokenizer.json"}
    offered = [*wanted, "pytorch_model.bin", "consolidated.pth"]
    taken = huggingface_hub.utils.filter_repo_objects(offered, allow_patterns=patterns)
    assert set(taken) == wanted


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (OSError("no route to host\nmore"), "OSError: no route to host"),
        (ValueError("Repo id must be"), "Repo id"),
        (RuntimeError(), "Runtime"),
    ],
)
def test_a_hub_that_fails_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, says: str
) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with fails(CheckpointError, "owner/model", found=says) as caught:
        locate_checkpoint("owner/model")
    assert "\n" not in caught.value.found
    assert "download it yourself" in caught.value.do
    assert caught.value.__cause__ is failure


def test_a_hub_id_without_the_hub_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with fails(
        CheckpointError, "owner/model", found="not installed", do="pip install huggingface_hub"
    ):
        locate_checkpoint("owner/model")


NO_FOLDERS = ["nowhere", "./owner/model", "../model", "/no/such", "~/model-of-nobody"]
NO_HUB_IDS = ["~no-such-user/model", "a/b/c", "owner/", "\0", "n" * 5000]


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", [*NO_FOLDERS, *NO_HUB_IDS])
def test_what_is_neither_a_folder_nor_a_hub_id_is_not_looked_for(name: str) -> None:
    with fails(CheckpointError, "cannot find", found="not a hub id either", do="config.json"):
        locate_checkpoint(name)


# --- what a tensor gives


Stored = tuple[dict[str, Tensor], dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=DTYPES, ids=DTYPES.values())
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """The fixture in one dtype: as opened, and as the `safetensors` library reads it."""
    tensors = {name: tensor.to(request.param) for name, tensor in all_tensors().items()}
    # Any bit pattern may be stored, and all of them must come through: NaN, infinities, denormals,
    # both zeros.
    bits = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, tensors["lm_head.weight"].nbytes, np.uint8)
    )
    tensors["lm_head.weight"] = bits.view(request.param).reshape(tensors["lm_head.weight"].shape)
    folder = in_one_file(tmp_path_factory.mktemp("stored") / "c", tensors)
    return dict(Checkpoint.open(folder).tensors), load_file(folder / SINGLE)


NAMES = [
    "lm_head.weight",
    "denoiser_tower.layers.0.mixer.conv1d.weight",
    "context_tower.layers.5.mixer.A_log",
]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_numpy_is_what_the_library_reads(stored: Stored, name: str) -> None:
    tensor, want = stored[0][name], stored[1][name]
    assert tensor.dtype == DTYPES[want.dtype]
    got = tensor.numpy()
    expected = want.float() if want.dtype == torch.bfloat16 else want
    assert got.dtype == expected.numpy().dtype
    assert got.shape == tuple(want.shape)
    assert got.tobytes() == raw(expected)
    got[...] = 0  # the array is the caller's own
    assert tensor.numpy().tobytes() == raw(expected)


@given(name=st.sampled_from(NAMES), chunk=st.integers(1, 1 << 20))
@example(name=NAMES[0], chunk=1)
def test_chunks_are_whole_elements_of_what_the_library_reads(
    stored: Stored, name: str, chunk: int
) -> None:
    tensor, want = stored[0][name], stored[1][name]
    pieces = list(tensor.chunks(chunk))
    assert b"".join(pieces) == raw(want)
    assert {len(piece) % want.itemsize for piece in pieces} == {0}
    assert max(map(len, pieces)) <= max(chunk, want.itemsize)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda tensor: tensor.numpy(),
    "chunks": lambda tensor: list(tensor.chunks(4096)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", [0, 1, 5000])
def test_a_shard_that_became_shorter_is_an_error_and_not_a_crash(
    copy: Path, tmp_path: Path, way: str, left: int
) -> None:
    tensor = Checkpoint.open(copy).tensors["lm_head.weight"]
    os.truncate(tensor.file, tensor.offset + left)
    with fails(CheckpointError, r"lm_head\.weight", found=("ends too early", SECOND), do="again"):
        WAYS[way](tensor)
