"""Size limits and banned constructs of CONTRIBUTING.md, for every Python file of the tree."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.source import PACKAGES, ROOT, files, nodes, tree

MAX_FILE, MAX_FUNCTION, MAX_JIT, MAX_ARGS = 400, 60, 100, 8
# homes named after nothing, and names that shadow a standard module when a file is run by its path
BAD_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "registry"} | {
    "types", "queue", "profile", "trace", "select", "random", "statistics", "logging", "signal", "socket", "token",
}  # fmt: skip
BAD_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
BAD_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "os.system", "os.popen", "pytest.skip", "pytest.xfail", "pytest.importorskip",
}  # fmt: skip
# where one of them is allowed, and why
ALLOWED_CALLS = {
    (
        "quant/convert.py",
        "torch.load",
    ): "the command that turns .bin files into safetensors, with weights_only",
    ("tests/quant/test_convert.py", "torch.save"): "writes the .bin files for it",
}
BAD_KEYWORDS = {"shell": True, "trust_remote_code": True}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Finding = Iterator[tuple[int, str]]


def functions(path: Path) -> Iterator[Function]:
    return (n for n in nodes(path) if isinstance(n, Function))


def is_jit(f: Function) -> bool:
    return any("jit" in ast.unparse(d) for d in f.decorator_list)


def long_functions(path: Path) -> Finding:
    for f in functions(path):
        lines = (f.end_lineno or f.lineno) - f.lineno + 1
        limit = MAX_JIT if is_jit(f) else MAX_FUNCTION
        if lines > limit:
            yield f.lineno, f"{f.name} has {lines} lines, at most {limit} allowed"


def wide_functions(path: Path) -> Finding:
    for f in functions(path):
        a = f.args
        names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
        # a kernel's pointers, strides and constants are its launch; a test's arguments are fixtures
        if len(names) > MAX_ARGS and not is_jit(f) and not f.name.startswith("test_"):
            yield f.lineno, f"{f.name} takes {len(names)} arguments, at most {MAX_ARGS} allowed"


def banned_imports(path: Path) -> Finding:
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, "relative import"
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((node.lineno, f"import of {n}") for n in names if n.split(".")[0] in BAD_MODULES)


def banned_calls(path: Path) -> Finding:
    for node in nodes(path):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BAD_CALLS and (str(path), name) not in ALLOWED_CALLS:
                yield node.lineno, f"call of {name}"
            plain = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name == "torch.load" and not plain:
                yield node.lineno, "torch.load without weights_only=True"
            for k in node.keywords:
                if (
                    k.arg in BAD_KEYWORDS
                    and isinstance(k.value, ast.Constant)
                    and k.value.value is BAD_KEYWORDS[k.arg]
                ):
                    yield node.lineno, f"{k.arg}={k.value.value}"
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, "NotImplementedError"
        if isinstance(node, ast.Attribute) and node.attr == "xfail":
            yield node.lineno, "xfail"


def swallowed_errors(path: Path) -> Finding:
    """A handler of everything must raise again or do something with the error it caught."""
    for node in nodes(path):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "BaseException" if node.type is None else ast.unparse(node.type)
        if not re.search(r"\b(Base)?Exception\b", caught):
            continue
        inside = [n for statement in node.body for n in ast.walk(statement)]
        used = any(isinstance(n, ast.Name) and n.id == node.name for n in inside)
        used = used or any(
            isinstance(n, ast.Attribute) and n.attr in ("exception", "exc_info") for n in inside
        )
        if not used and not any(isinstance(n, ast.Raise) for n in inside):
            yield node.lineno, f"except {caught} goes on as if nothing had happened"


def open_addresses(path: Path) -> Finding:
    """As a default, an argument or a value; to compare with one or to show it is no harm."""
    for node in nodes(path):
        given: list[ast.expr | None] = []
        if isinstance(node, ast.arguments):
            given = [*node.defaults, *node.kw_defaults]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.keyword):
            given = [node.value]
        elif isinstance(node, ast.Call):
            given = list(node.args)
        for value in given:
            if isinstance(value, ast.Constant) and value.value in ("0.0.0.0", "::", "*:*"):
                yield value.lineno, f"the address {value.value}"


def global_state(path: Path) -> Finding:
    for node in nodes(path):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}"


def open_ends(path: Path) -> Finding:
    text = (ROOT / path).read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
            yield token.start[0], token.string.strip()


def docstring(path: Path) -> Finding:
    """The first screen of a file: a docstring of at most ten lines."""
    doc = ast.get_docstring(tree(path))
    if path.name != "__init__.py" and not doc:
        yield 1, "no docstring"
    elif doc and len(doc.splitlines()) > 10:
        yield 1, f"a docstring of {len(doc.splitlines())} lines, at most 10 allowed"


def open_devices(path: Path) -> Finding:
    """In a test: `auto` is another device where there is a GPU, and other numbers with it."""
    for node in nodes(path):
        called = isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM"
        if called and not any(k.arg == "device" for k in node.keywords):
            yield node.lineno, "an LLM on whatever device is there"


CHECKS: list[Callable[[Path], Finding]] = [
    long_functions, wide_functions, banned_imports, banned_calls, swallowed_errors, open_ends, docstring,
]  # fmt: skip
LIBRARY_CHECKS: list[Callable[[Path], Finding]] = [open_addresses, global_state]
TEST_CHECKS: list[Callable[[Path], Finding]] = [open_devices]


def report(check: Callable[[Path], Finding], paths: list[Path]) -> list[str]:
    return [f"{path}:{line}: {what}" for path in paths for line, what in check(path)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_tree(check: Callable[[Path], Finding]) -> None:
    wrong = report(check, files())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("check", LIBRARY_CHECKS, ids=lambda c: c.__name__)
def test_library(check: Callable[[Path], Finding]) -> None:
    wrong = report(check, files(*PACKAGES))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("check", TEST_CHECKS, ids=lambda c: c.__name__)
def test_tests(check: Callable[[Path], Finding]) -> None:
    wrong = report(check, files("tests"))
    assert not wrong, "\n".join(wrong)


def test_files_are_short_and_named_after_something() -> None:
    lines = {path: (ROOT / path).read_text().count("\n") for path in files()}
    long = [f"{path}: {n} lines, at most {MAX_FILE} allowed" for path, n in lines.items() if n > MAX_FILE]
    named = [
        f"{path}: a name that says nothing or shadows a module" for path in lines if path.stem in BAD_NAMES
    ]
    assert not long + named, "\n".join(long + named)


BAD = """
def f(a, b, c, d, e, f, g, h, i):
    try:
        exec("1")
    except Exception:
        pass
    import pickle
    from . import x
    os.system("ls", shell=True)
    LLM(x, dtype="fp32")
    raise NotImplementedError  # TODO later
"""


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    """A file with one of each: every check must fire on it."""
    file = tmp_path / "bad.py"
    file.write_text(
        BAD + "".join(f"    x = {i}\n" for i in range(60)) + 'HOST = "0.0.0.0"\ndef g():\n    global HOST\n'
    )
    for check in (*CHECKS, *LIBRARY_CHECKS, *TEST_CHECKS):
        assert list(check(file)), check.__name__
    said = {what for check in CHECKS for _, what in check(file)}
    assert {"import of pickle", "relative import", "call of exec", "call of os.system", "shell=True"} <= said


README_SIZES = re.compile(r"([\d,]+) lines")


def test_readme_counts_are_true() -> None:
    """The README states the size of the library; the statement may be off by a tenth."""
    text = (ROOT / "README.md").read_text()
    said = [int(n.replace(",", "")) for n in README_SIZES.findall(text)]
    true = sum((ROOT / path).read_text().count("\n") for path in files(*PACKAGES))
    assert said, "README.md says how many lines the library has"
    assert all(abs(n - true) <= true / 10 for n in said), (
        f"README.md says {said} lines, the library has {true}"
    )
