"""The tree's own source as data, for the tests that read it: files, syntax trees, imports."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "quant", "sched", "minserve")
FOLDERS = (*PACKAGES, "bench", "examples", "tests")


def files(*folders: str) -> list[Path]:
    """Every Python file of the folders, all of the tree's by default, as paths relative to ROOT."""
    found = [p for f in folders or FOLDERS for p in (ROOT / f).rglob("*.py")]
    return sorted(p.relative_to(ROOT) for p in found)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All of `tree`; many checks walk over it."""
    return tuple(ast.walk(tree(path)))


def module(path: Path) -> str:
    """`quant.formats.compressed_tensors` for its path; a package has the name of its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, *, at_import: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) for each import, lazy and typing ones too; `at_import`: only those that importing the file runs."""
    for node in _at_import(tree(path)) if at_import else nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name) for name in _from(node))


def _from(node: ast.ImportFrom) -> Iterator[str]:
    """`from a import b` imports a, and a.b where that is a module of ours."""
    base = "." * node.level + (node.module or "")
    yield base
    for alias in node.names:
        inside = ROOT.joinpath(*base.split("."), alias.name)
        if not node.level and (inside.with_suffix(".py").exists() or (inside / "__init__.py").exists()):
            yield f"{base}.{alias.name}"


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)
