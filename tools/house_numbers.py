"""Figures of the source code of any commit, each defined here; `make house-numbers`.

    python -m tools.house_numbers                 HEAD
    python -m tools.house_numbers 941453e HEAD    side by side

What is measured is what is committed. Product code is the package, with the folders its links lead
to; tests are `tests`.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.gpu.unpack import unpack

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "src/twotower"
WIDTH = 100

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its text, and its tree, which is read once."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))


Modules = Sequence[Module]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "commits", nargs="*", default=["HEAD"], metavar="COMMIT", help="commits to measure (HEAD)"
    )
    args = parser.parse_args(arguments)
    columns = [figures_of(commit) for commit in args.commits]
    width = max(map(len, columns[0]))
    print(" " * width + "".join(f"{commit:>14}" for commit in args.commits))
    for name in columns[0]:
        print(f"{name:<{width}}" + "".join(f"{column[name]:>14}" for column in columns))
    return 0


def figures_of(commit: str) -> dict[str, str]:
    """Every figure of a commit, as it is printed."""
    with tempfile.TemporaryDirectory(prefix="house-") as scratch:
        folder = Path(scratch)
        _extract(commit, folder)
        product, tests = read_package(folder), _modules(folder / "tests", "tests")
        wrapped, wrapped_tests = (_wrapped(modules, folder) for modules in (product, tests))
    figures = {
        f"product, lines at {WIDTH} columns": f"{_lines(wrapped):,}",
        f"tests, lines at {WIDTH} columns": f"{_lines(wrapped_tests):,}",
        "product, files": f"{len(product)}",
        "AST nodes a code line, as committed": f"{_density(product):.2f}",
    }
    for name, value in ratios(wrapped).items():
        figures[name] = f"{value:.2f}" if isinstance(value, float) else f"{value}"
    return figures


def ratios(product: Modules) -> dict[str, float]:
    """The figures that do not grow with the code, of modules that are formatted to the width."""
    lengths = [length for module in product for length in _function_lengths(module)]
    once, private = _used_once(product)
    imports = _imports(product)
    basenames = Counter(map(_basename, _leaves(product)))
    return {
        "AST nodes a code line": _density(product),
        "arguments of a function, 90th percentile": _percentile(_arguments(product), 90),
        "functions over 50 lines, %": 100 * sum(n > 50 for n in lengths) / len(lengths),
        "functions over 100 lines": sum(n > 100 for n in lengths),
        "private helpers that are used once, %": 100 * once / private,
        "modules with exactly one importer": list(_importers(product, imports).values()).count(1),
        "basenames that occur twice or more": sum(n > 1 for n in basenames.values()),
        "cycles between modules": _cycles(imports),
    }


def _extract(commit: str, folder: Path) -> None:
    packed = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        unpack(archive, folder)


def read_package(folder: Path) -> list[Module]:
    """The package's modules; folders that are links are read where they lead."""
    out = []
    for entry in sorted((folder / PACKAGE).iterdir()):
        if entry.suffix == ".py":
            out.append(Module(_dotted("twotower", entry.name), entry.read_text(encoding="utf-8")))
        elif entry.is_dir():
            out += _modules(entry.resolve(), f"twotower.{entry.name}")
    return out


def _modules(folder: Path, name: str) -> list[Module]:
    files = sorted(folder.rglob("*.py"))
    return [
        Module(_dotted(name, file.relative_to(folder).as_posix()), file.read_text(encoding="utf-8"))
        for file in files
    ]


def _dotted(package: str, path: str) -> str:
    return f"{package}.{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


def _wrapped(modules: Modules, folder: Path) -> list[Module]:
    """The same, formatted to the width, by the formatter and settings of today."""
    target = Path(tempfile.mkdtemp(dir=folder))
    files = [target / f"{number}.py" for number in range(len(modules))]
    for file, module in zip(files, modules, strict=True):
        file.write_text(module.text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--quiet",
        "--isolated",
        "--line-length",
        str(WIDTH),
        str(target),
    ]
    subprocess.run(command, check=True)
    return [
        Module(m.name, file.read_text(encoding="utf-8"))
        for m, file in zip(modules, files, strict=True)
    ]


def _lines(modules: Modules) -> int:
    return sum(len(module.text.splitlines()) for module in modules)


def _density(modules: Modules) -> float:
    """Statements and expressions by lines that hold code: blank lines, comments and docstrings count in neither."""
    nodes = lines = 0
    for module in modules:
        docstrings = list(_docstrings(module))
        nodes += sum(map(is_node, module.nodes)) - 2 * len(docstrings)
        within = {n for d in docstrings for n in range(d.lineno, (d.end_lineno or d.lineno) + 1)}
        lines += len(_code_lines(module.text) - within)
    return nodes / lines


def is_node(node: ast.AST) -> bool:
    """Whether a node counts: a statement or an expression."""
    return isinstance(node, (ast.stmt, ast.expr))


def _docstrings(module: Module) -> Iterator[ast.Expr]:
    """Strings that stand alone: of modules, classes, functions and attributes."""
    for node in module.nodes:
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node


def _code_lines(text: str) -> set[int]:
    quiet = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    out: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in quiet:
            out |= set(range(token.start[0], token.end[0] + 1))
    return out


def _functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in module.nodes:
        if isinstance(node, _FUNCTIONS):
            yield node


def _function_lengths(module: Module) -> Iterator[int]:
    for node in _functions(module):
        yield (node.end_lineno or node.lineno) - node.lineno + 1


def _arguments(modules: Modules) -> list[int]:
    """Of every function; `self` and `cls` are not counted, keyword-only ones are."""
    out = []
    for module in modules:
        for node in _functions(module):
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            out.append(len([name for name in names if name not in ("self", "cls")]))
    return out


def _percentile(values: Sequence[int], percent: int) -> int:
    return sorted(values)[min(len(values) - 1, percent * len(values) // 100)]


def _used_once(modules: Modules) -> tuple[int, int]:
    """Private functions of modules that their module names once besides defining them, and all of them."""
    once = total = 0
    for module in modules:
        private = [
            n.name
            for n in module.tree.body
            if isinstance(n, _FUNCTIONS) and n.name.startswith("_") and not n.name.startswith("__")
        ]
        used = Counter(n.id for n in module.nodes if isinstance(n, ast.Name))
        once += sum(used[name] == 1 for name in private)
        total += len(private)
    return once, total


def _imports(modules: Modules) -> dict[str, set[str]]:
    """Modules of the package that each imports, wherever in its text; not for types alone."""
    names = {module.name for module in modules}
    return {module.name: set(_imported(module.tree, names)) - {module.name} for module in modules}


def _imported(tree: ast.Module, names: set[str]) -> Iterator[str]:
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in names)
            if node.module in names and not all(name in names for name in inner):
                yield node.module


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _executed(child)


def _importers(modules: Modules, imports: Mapping[str, set[str]]) -> dict[str, int]:
    """How many modules import each; packages are not counted, only what lies in them.

    A verb of the command line that nothing imports is loaded by its name, in one place.
    """
    counts = Counter(name for imported in imports.values() for name in imported)
    verbs = [m.name for m in modules if m.name.startswith("twotower.cli.") and not counts[m.name]]
    counts.update(name for name in verbs if not name.endswith("__main__"))
    return {m.name: counts[m.name] for m in _leaves(modules)}


def _leaves(modules: Modules) -> list[Module]:
    """Those that are files of their own, and no package."""
    inside = {module.name.rpartition(".")[0] for module in modules}
    return [module for module in modules if module.name not in inside]


def _basename(module: Module) -> str:
    return module.name.rpartition(".")[2]


def _cycles(imports: Mapping[str, set[str]]) -> int:
    """Groups of modules that import one another at the top of their text or below, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = 0

    def visit(name: str) -> None:
        nonlocal found
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imports.get(name, ()):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            found += len(group) > 1

    _each(imports, index, visit)
    return found


def _each(
    imports: Mapping[str, set[str]], seen: Mapping[str, int], visit: Callable[[str], None]
) -> None:
    for name in imports:
        if name not in seen:
            visit(name)


if __name__ == "__main__":
    sys.exit(main())
