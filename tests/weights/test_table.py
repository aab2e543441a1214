"""The table of a data file: read without ONNX, and never trusted beyond its data file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.errors import fails
from twotower.bundle import GRAPH_FILES, read_weight_table, write_weight_table
from twotower.errors import BundleError
from twotower.weights.external import load_graph, weight_refs
from twotower.weights.refs import WeightRef

WEIGHTS = {
    "a": WeightRef("bfloat16", (2, 3), 0),
    "b": WeightRef("int4", (3, 3), 64),
    "c": WeightRef("float32", (), 128),
}
END = 132


def test_a_table_is_read_as_it_was_written_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    write_weight_table(file, dict(reversed(WEIGHTS.items())))
    assert list(read_weight_table(file, END).items()) == list(WEIGHTS.items())
    assert len(file.read_text().splitlines()) == len(WEIGHTS) + 2, "a weight a line, for people"


def test_a_data_file_shorter_than_its_table_is_named_with_the_weight(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    write_weight_table(file, WEIGHTS)
    with pytest.raises(BundleError) as caught:
        read_weight_table(file, END - 1)
    assert caught.value.found == f"c ends at byte {END}, the data file has {END - 1}"


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([["a", "float32", [4], 0], ["b", "float32", [4], 0]], "overlaps"),
        ([["a", "float32", [4], 32]], "multiple of 64"),
        ([["a", "float32", [4], 0], ["a", "float32", [4], 64]], "twice"),
        ([["a", "complex64", [4], 0]], "complex64"),
        ([["a", "float32", [-4], 0]], "-4"),
        ([["a", "float32", [4], True]], "True"),
        ([["a", "float32", [4]]], "ValueError"),
        ({"a": 1}, "ValueError"),
        ("x", "ValueError"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(tmp_path: Path, entries: Any, says: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps(entries))
    with fails(BundleError, found=says):
        read_weight_table(file, 1 << 20)


def test_a_bundle_s_tables_say_what_its_graphs_say(tmp_path: Path) -> None:
    bundle = export_fixture("hybrid-a", tmp_path / "bundle")
    for name in GRAPH_FILES:
        assert dict(bundle.weights(name)) == weight_refs(load_graph(bundle.graph_file(name)))
