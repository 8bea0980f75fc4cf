"""docs/install.md: every block of commands that says so is run here as it stands, in a copy of the tree and in a fresh
environment that sees the packages of this one. A minute on two cores."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from recipes.project import ROOT

PAGE = (ROOT / "docs/install.md").read_text()


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Heading, what is said about the block, its commands."""
    found, heading = [], ""
    parts = r"^#+ (?P<heading>.+?)$|^\*(?P<said>[^*\n]+)\*\n```sh\n(?P<commands>.*?)^```$"
    for match in re.finditer(parts, page, re.MULTILINE | re.DOTALL):
        if match["heading"]:
            heading = match["heading"]
        else:
            found.append((heading, match["said"], match["commands"]))
    return found


BLOCKS = blocks(PAGE)
RUN = {heading: commands for heading, said, commands in BLOCKS if said == "Runs in CI."}


def test_every_block_says_whether_it_is_run() -> None:
    assert len(BLOCKS) == PAGE.count("```sh\n") >= 9
    assert all(said == "Runs in CI." or said.split()[0] in ("Not", "Tried", "The", "Linted,") for _, said, _ in BLOCKS)
    assert len(RUN) == sum(said == "Runs in CI." for _, said, _ in BLOCKS) == 5


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a shell in the new environment, whose working directory PWD is a copy of the tree."""
    folder = tmp_path_factory.mktemp("install")
    environment, tree = folder / "environment", folder / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("the tree is no git repository")
    for name in files.stdout.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    here = sysconfig.get_path("purelib")
    (packages / "zz_this.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    pip = environment / "bin/pip"
    pip.write_text('#!/bin/sh\nexec python -m pip --disable-pip-version-check "$@"\n')
    pip.chmod(0o755)
    tools = {
        os.path.dirname(sys.executable),
        *(os.path.dirname(shutil.which(t) or "") for t in ("cmake", "ninja", "uv")),
    }
    path = os.pathsep.join([str(environment / "bin"), *sorted(tools - {""}), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "BATCHINFER_DEVICE")}
    return kept | {"PATH": path, "VIRTUAL_ENV": str(environment), "PWD": str(tree), "PYTHONSAFEPATH": "1"}


def run(block: str, shell: dict[str, str]) -> str:
    """Standard output of the block's commands; the first one that fails is the test's failure."""
    done = subprocess.run(["bash", "-e", "-c", RUN[block]], cwd=shell["PWD"], env=shell, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def installed_in(shell: dict[str, str]) -> str:
    """Where the new environment finds the package, outside of any tree."""
    command = ["python", "-c", "import batchinfer; print(batchinfer.__file__)"]
    return subprocess.run(command, env=shell, capture_output=True, text=True, cwd="/", check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.feature("recipes", "install guide: its commands are run as they stand on the page")
def test_the_page_from_its_top_to_its_end(shell: dict[str, str]) -> None:
    """In a quick order, not that of the page: the first build compiles, the others find its folder."""
    environment, tree = shell["VIRTUAL_ENV"], shell["PWD"]

    plan = run("A login node, or macOS", shell)
    assert "64" in plan
    assert installed_in(shell).startswith(environment)
    assert not list(Path(environment).rglob("batchinfer/_*.so"))

    report = run("With the torch that is there", shell)
    assert "fit for jobs" in report
    assert len(list(Path(environment).rglob("batchinfer/_*.so"))) == 3
    run("uv", shell)

    assert "fit for jobs" in run("Working on the Python part", shell)
    (wheel,) = Path(tree, "dist").glob("*.whl")
    assert wheel.stat().st_size < 20e6, "a wheel for the CPU has 20 MB at most"
    assert installed_in(shell) == f"{tree}/batchinfer/__init__.py"
    before = linked(tree)
    assert len(before) == 3
    run("Working on the C++ part", shell)
    after = linked(tree)
    assert [name for name in after if after[name] != before[name]] == ["_process"], "only what has changed is compiled"
    (beside,) = Path(tree, "batchinfer").glob("_process.*.so")
    assert int(beside.stat().st_mtime) == after["_process"] // 10**9  # CMake installs with the time in whole seconds


def linked(tree: str) -> dict[str, int]:
    """Module -> time at which it was linked in the build folder, in nanoseconds."""
    return {path.name.split(".")[0]: path.stat().st_mtime_ns for path in Path(tree).glob("build/cp*/_*.so")}
