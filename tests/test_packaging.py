"""`sched` and `kernels` are ours, not the standard library's and not the index's, however minserve was installed.

Each way of installing gets an environment of its own, with this one's dependencies but without what lies in it of
minserve.  The probe runs there from an empty folder, in the parent and in a spawned child.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.source import PACKAGES, ROOT

PROBE = """
import kernels, sched  # the standard library's where it wins, and a namesake that lies beside this file
import json, multiprocessing, sys
import minserve, kernels, quant, sched, sched.step, quant.formats
from minserve import SamplingParams
from minserve.config import Config

def where(_):
    import kernels, quant, sched, sched.step
    return [m.__file__ for m in (kernels, quant, sched, sched.step)]

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        child = pool.map(where, [0])[0]
    print(json.dumps([minserve.__file__, where(0), child, "torch" in sys.modules]))
"""


def environment(folder: Path) -> Path:
    """A new environment's python.  Dependencies come from this one by path, so no .pth file of it is read."""
    venv.create(folder, with_pip=False, symlinks=True)
    here = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site_packages(folder) / "dependencies.pth").write_text("\n".join(here) + "\n")
    return folder / "bin" / "python"


def site_packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python3*")) / "site-packages"


def run(*command: str | Path, cwd: Path, path: str = "") -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | (
        {"PYTHONPATH": path} if path else {}
    )
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*args: str | Path) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input")
    run(sys.executable, "-m", "pip", args[0], *quiet, "--no-index", "--no-deps", *args[1:], cwd=ROOT)


def install(folder: Path, *what: str | Path) -> None:
    # --ignore-installed: what this environment has of minserve must stay
    pip(
        "install",
        "--no-build-isolation",
        "--ignore-installed",
        "--no-warn-script-location",
        "--prefix",
        folder,
        *what,
    )


def assert_ours(python: Path, cwd: Path, home: Path, *flags: str, path: str = "") -> None:
    (cwd / "kernels").mkdir(parents=True, exist_ok=True)
    (cwd / "kernels" / "__init__.py").write_text("get_kernel = None\n")
    (cwd / "probe.py").write_text(PROBE)
    package, parent, child, torch = json.loads(run(python, *flags, cwd / "probe.py", cwd=cwd, path=path))
    ours = [home / "kernels", home / "quant", home / "sched"]
    for found in (parent, child):
        assert [Path(f).parent for f in found] == [*ours, home / "sched"], found
    assert Path(package).parent == home / "minserve"
    assert not torch, "importing minserve and its configuration must not import torch"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, so that no build writes into this tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, source)
    (built,) = out.glob("minserve-*.whl")
    return built


@pytest.mark.parametrize("flags", [(), ("-P",)], ids=["plain", "safe-path"])
def test_checkout_on_the_path(tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert_ours(environment(tmp_path / "env"), tmp_path / "elsewhere", ROOT, *flags, path=str(ROOT))


def test_checkout_as_the_working_directory(tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    said = run(
        python, "-c", "import sched, kernels, minserve; print(sched.__file__, kernels.__file__)", cwd=ROOT
    )
    assert said.split() == [str(ROOT / name / "__init__.py") for name in ("sched", "kernels")]


def test_editable_install(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    install(tmp_path / "env", "--editable", source)
    assert_ours(python, tmp_path / "elsewhere", source)
    assert_ours(python, tmp_path / "elsewhere", source, "-P")


def test_wheel(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "env")
    install(tmp_path / "env", wheel)
    home = site_packages(tmp_path / "env")
    assert_ours(python, tmp_path / "elsewhere", home)
    assert_ours(python, tmp_path / "elsewhere", home, "-P")


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [p for name in PACKAGES for p in (ROOT / name).rglob("*.py")]
    files += (ROOT / "kernels" / "tables").glob("*.json")
    assert held == {str(p.relative_to(ROOT)) for p in files}


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {p.parent.relative_to(ROOT) for name in PACKAGES for p in (ROOT / name).rglob("__init__.py")}
    assert sorted(listed) == sorted(str(p).replace("/", ".") for p in there)


def test_constraints_lie_in_the_ranges() -> None:
    """constraints.txt pins one version of every declared dependency that it may pin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["dev"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in declared:
        name = requirement.name.lower()
        if name == "triton":
            assert name not in pinned, "a CUDA torch pins its own triton"
            continue
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in requirement.specifier, (
            f"{name} {pinned[name]} is not in {requirement.specifier}"
        )
