"""The house: no circle of imports, no long function or file, and a trainer that knows its method by contract only."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

import cmapkd
from cmapkd.methods import METHODS

ROOT = Path(cmapkd.__file__).parent
MAX_FILE, MAX_METHOD, MAX_FUNCTION = 400, 200, 80
REASON = "long because"  # in the first lines of a file that is longer, before its reason
REASON_WITHIN = 6  # lines
FORBIDDEN = (
    "cache",
    "mask",
    "head",
    "beside",
    "auxiliar",
    "sparsit",
    "prun",
)  # parts of names that are not the trainer's
LOGIT_SCALE = ("logit_scale", "DualEncoder")  # nor with what only models of two towers have

FILES = sorted(ROOT.rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def targets(node: ast.AST) -> Iterator[str]:
    """The package's own modules that one import statement runs."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
        inner = [name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES]
        if len(inner) < len(node.names):  # something of the module itself
            yield node.module
        yield from inner


def imports(path: Path) -> set[str]:
    """Of one file, wherever they stand: in functions and under TYPE_CHECKING, too."""
    return {name for node in ast.walk(tree(path)) for name in targets(node)} - {module_name(path)}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(graph) == [["d", "e"], ["a", "b", "c"]]


def test_no_circle_of_imports() -> None:
    found = circles({name: imports(path) for name, path in MODULES.items()})
    assert not found, "\n".join(f"circle of {len(names)}: {', '.join(names)}" for names in found)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_function_is_too_long() -> None:
    long = [
        f"{shown(path)}: {name} has {size} lines"
        for path in FILES
        for name, size in functions(path)
        if size > MAX_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_a_published_method_is_a_short_file() -> None:
    files = {Path(inspect.getfile(METHODS[name])) for name in METHODS}
    sizes = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = {name: size for name, size in sizes.items() if size > MAX_METHOD and "methods/cmapkd/" not in name}
    assert len(files) > 30
    assert not long, f"move what is general into a room of its own: {long}"


def has_reason(path: Path) -> bool:
    return any(REASON in line.lower() for line in path.read_text(encoding="utf-8").splitlines()[:REASON_WITHIN])


def test_no_file_is_too_long_without_a_reason() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = [
        f"{shown(path)} has {size} lines: split it, or say in its first lines '{REASON} ...'"
        for path, size in sizes.items()
        if size > MAX_FILE and not has_reason(path)
    ]
    assert not long, "\n".join(long)


def names_in(path: Path) -> Iterator[tuple[int, str]]:
    """Every name that the code of a file uses: variables, attributes, arguments, imports. Not its texts."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                yield node.lineno, node.module or ""


def found_names(path: Path, forbidden: Sequence[str], allowed: Sequence[str] = ()) -> list[str]:
    return [
        f"{shown(path)}:{line} {name}"
        for line, name in sorted(set(names_in(path)))
        if name not in allowed and any(part.lower() in name.lower() for part in forbidden)
    ]


TRAINING = sorted((ROOT / "training").glob("*.py"))
OF_TORCH = ("clear_autocast_cache", "functools.cache", "cache_enabled", "empty_cache")


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_the_trainer_names_no_cache_no_masks_and_no_heads(path: Path) -> None:
    found = found_names(path, FORBIDDEN, OF_TORCH)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_the_trainer_knows_no_kind_of_model(path: Path) -> None:
    found = found_names(path, LOGIT_SCALE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_the_trainer_names_no_method(path: Path) -> None:
    """Neither a class nor a module nor the registered name of one."""
    from cmapkd.methods import METHODS

    kinds = {kind.__name__ for kind in METHODS.values()} | {kind.__module__ for kind in METHODS.values()}
    modules = {f"cmapkd.methods.{name}" for name in METHODS}
    found = [name for _, name in names_in(path) if name in kinds | modules or name in set(METHODS) - {"cmapkd"}]
    texts = {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)}
    found += sorted(texts & (set(METHODS) - {"cmapkd"}))  # the package's own name, which a tracker's project bears
    assert not found
