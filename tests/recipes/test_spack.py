"""The Spack recipe with Spack: it concretises for every vendor, and the CPU build is installed, loaded, run and tested.

SPACK_ROOT names a Spack of 1.0 or newer that has the builtin repository and a working clingo. Externals, all but
batchinfer, come from the environment BATCHINFER_SPACK_ENVIRONMENT, or else the one that runs the tests. Without a
network BATCHINFER_SPACK_WRAPPER names a clone of spack/compiler-wrapper at v1.1.0. Ten minutes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from recipes.project import ROOT
from recipes.spack_site import packages, python_environment

SPACK = Path(os.environ.get("SPACK_ROOT", "/nonexistent"), "bin/spack")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SPACK.is_file(), reason="there is no Spack: set SPACK_ROOT"),
]


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of configuration: all but batchinfer is external, and nothing of the user's own counts."""
    folder = tmp_path_factory.mktemp("spack")
    (folder / "packages.yaml").write_text(json.dumps({"packages": packages(python_environment())}))
    (folder / "concretizer.yaml").write_text(json.dumps({"concretizer": {"reuse": False, "unify": True}}))
    (folder / "config.yaml").write_text(json.dumps({"config": {"install_tree": {"root": str(folder / "installed")}}}))
    own = str(ROOT / "recipes/spack/spack_repo/batchinfer")
    (folder / "repos.yaml").write_text(json.dumps({"repos": {"batchinfer": own}}))
    return folder


def spack(scope: Path, *arguments: str, fails: bool = False) -> str:
    environment = os.environ | {"SPACK_DISABLE_LOCAL_CONFIG": "1"}
    command = [str(SPACK), "-C", str(scope), *arguments]
    done = subprocess.run(command, env=environment, cwd=scope, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_names_versions_and_variants_exist(scope: Path) -> None:
    spack(scope, "audit", "packages", "batchinfer", "py-gguf")


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("batchinfer", ["~cuda+mpi~rocm~sycl", "^py-torch"]),
        ("batchinfer+cuda cuda_arch=90", ["+cuda", "^cuda@12.8.1"]),
        ("batchinfer+rocm amdgpu_target=gfx90a", ["+rocm", "^hip@6.3.3"]),
        ("batchinfer+sycl", ["+sycl", "%c,cxx=oneapi@2024.2.1"]),
    ],
)
def test_every_vendor_concretises(spec: str, parts: list[str], scope: Path) -> None:
    concrete = spack(scope, "spec", spec)
    for part in parts:
        assert part in concrete


def test_a_bare_rocm_says_what_to_add(scope: Path) -> None:
    assert "amdgpu_target=gfx90a (MI200)" in spack(scope, "spec", "batchinfer+rocm", fails=True)


def test_the_cpu_build_is_installed_and_works(scope: Path) -> None:
    tree, environment = scope / "tree", scope / "environment"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    environment.mkdir()
    (environment / "spack.yaml").write_text("spack:\n  specs: [batchinfer@main]\n  view: false\n")
    spack(scope, "-e", str(environment), "develop", "--no-clone", "--path", str(tree), "batchinfer@main")
    if wrapper := os.environ.get("BATCHINFER_SPACK_WRAPPER"):
        spack(scope, "-e", str(environment), "develop", "--no-clone", "--path", wrapper, "compiler-wrapper@1.1.0")
    spack(scope, "-e", str(environment), "concretize", "-f")
    spack(scope, "-e", str(environment), "install", "-j2", "--show-log-on-error")
    spack(scope, "-e", str(environment), "test", "run", "batchinfer")
    assert "PASSED" in spack(scope, "-e", str(environment), "test", "results")
    load = spack(scope, "-e", str(environment), "load", "--sh", "batchinfer")
    shell = f"{load}\nbatchinfer doctor --json"
    done = subprocess.run(["sh", "-c", shell], cwd=scope, capture_output=True, text=True)
    assert json.loads(done.stdout)["build"]["error"] == "", done.stderr
