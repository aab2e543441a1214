"""Documents: links resolve, commands parse, make targets exist, the example fits the API."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import twotower
from tests.helpers.source import ROOT
from twotower.cli.main import VERBS, build_parser

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [d.relative_to(ROOT).as_posix() for d in DOCUMENTS]

SHELL_ENDS = {"|", ">", ">>", "2>", "&&", ";", "&"}


def fences(document: Path, *languages: str) -> Iterator[str]:
    """Contents of the fenced blocks in these languages; no language counts as the empty string."""
    text = document.read_text(encoding="utf-8")
    for language, body in re.findall(r"(?ms)^```([\w-]*)[^\n]*\n(.*?)^```", text):
        if language in languages:
            yield body


def shell_commands(document: Path) -> Iterator[list[str]]:
    """Commands of shell blocks as words, without comments, prompts and what follows a pipe."""
    for body in fences(document, "bash", "sh", "console", "shell"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            end = next((i for i, word in enumerate(words) if word in SHELL_ENDS), len(words))
            if words[:end]:
                yield words[:end]


def twotower_commands() -> list[tuple[str, list[str]]]:
    """(document, arguments) of every `twotower` command shown."""
    out = []
    for name, document in zip(IDS, DOCUMENTS, strict=True):
        out += [(name, words[1:]) for words in shell_commands(document) if words[0] == "twotower"]
    return out


def without_fences(document: Path) -> str:
    return re.sub(r"(?ms)^```.*?^```", "", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """Anchors a hub makes of the headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", without_fences(document).lower())
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}


def make_targets() -> set[str]:
    return set(re.findall(r"(?m)^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text("utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_relative_links_resolve(document: Path) -> None:
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_fences(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize(
    ("document", "arguments"),
    twotower_commands(),
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_commands_parse(document: str, arguments: list[str]) -> None:
    verb = arguments[0]
    if verb == "VERB":
        return
    assert verb in VERBS, f"{document}: there is no such verb"
    if arguments[1:] == ["--help"]:
        return
    # Exits, and so fails, on an unknown or missing argument.
    build_parser(verb).parse_args(arguments)


def test_the_readme_shows_commands() -> None:
    """Or the test above would hold for want of any."""
    shown = {words[0] for name, words in twotower_commands() if name == "README.md"}
    assert shown >= {"export", "build", "generate"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)
def test_make_targets_exist(document: Path) -> None:
    shown = [words[1:] for words in shell_commands(document) if words[0] == "make"]
    quoted = re.findall(r"`make ([^`]+)`", without_fences(document))
    shown += [shlex.split(text) for text in quoted]
    for words in shown:
        targets = {word for word in words if "=" not in word and word != "..."}
        assert targets <= make_targets(), f"make {' '.join(words)}"


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())
    assert phony == set(re.findall(r"^([a-z0-9-]+):.*## ", text, re.MULTILINE))


def test_the_python_example_fits_the_api() -> None:
    """Running it needs a bundle with a tokenizer; its names and options are looked up instead."""
    examples = [ast.parse(body) for body in fences(ROOT / "README.md", "python")]
    assert examples
    options = {field.name for field in dataclasses.fields(twotower.GenerationConfig)}
    for node in (n for example in examples for n in ast.walk(example)):
        if isinstance(node, ast.ImportFrom) and node.module == "twotower":
            assert {alias.name for alias in node.names} <= set(twotower.__all__)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "GenerationConfig"
        ):
            assert {k.arg for k in node.keywords} <= options
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert hasattr(twotower.TwoTower, node.func.attr)
