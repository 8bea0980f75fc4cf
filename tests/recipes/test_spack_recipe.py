"""The Spack recipes without Spack: they load, and say what we think they say. Whether the names, versions and variants
exist in Spack is test_spack.py's question."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from recipes.project import ROOT, requirements
from recipes.spack_site import REPOSITORY
from recipes.spack_stub import Directive, FakePrefix, FakeSpec, Recipe, load

pytestmark = pytest.mark.feature("recipes", "Spack: +cuda, +rocm or +sycl, torch for the same device")

BUILD, BUILD_RUN = {"type": "build"}, {"type": ("build", "run")}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load(REPOSITORY / "packages/batchinfer/package.py")


def test_the_repository_is_one_that_spack_1_0_reads() -> None:
    assert (REPOSITORY / "repo.yaml").read_text() == "repo:\n  namespace: batchinfer\n  api: v2.2\n"
    assert REPOSITORY.parent.name == "spack_repo", "Spack wants spack_repo/NAMESPACE"


def test_it_builds_the_tree_that_it_lies_in(recipe: Recipe) -> None:
    assert recipe.package.git == f"file://{ROOT}"
    assert recipe.of("version") == [Directive("version", ("main",), "", {"branch": "main"})]


def test_variants(recipe: Recipe) -> None:
    """+cuda, +rocm and the targets come from Spack's base classes."""
    assert {v.args[0]: v.options["default"] for v in recipe.of("variant")} == {
        "sycl": False,
        "mpi": True,
        "triton": False,
    }
    assert [base.__name__ for base in recipe.package.__mro__[1:4]] == ["PythonPackage", "CudaPackage", "ROCmPackage"]


def test_conflicts(recipe: Recipe) -> None:
    conflicts = {(c.args[0], c.when): c.options.get("msg", "") for c in recipe.of("conflicts")}
    assert set(conflicts) == {
        ("+cuda+rocm", ""),
        ("+cuda+sycl", ""),
        ("+rocm+sycl", ""),
        ("+triton", "~cuda~rocm"),
        ("cuda_arch=none", "+cuda"),
        ("amdgpu_target=none", "+rocm"),
        ("cuda_arch=60", ""),
        ("platform=windows", ""),
    }
    assert "cuda_arch=90" in conflicts["cuda_arch=none", "+cuda"], "a bare +cuda must say what to add"
    assert "amdgpu_target=gfx90a" in conflicts["amdgpu_target=none", "+rocm"]
    assert all(text for (spec, _), text in conflicts.items() if spec != "platform=windows")


def test_toolchains(recipe: Recipe) -> None:
    depends = recipe.of("depends_on")
    assert Directive("depends_on", ("cuda@11.8,12.6,12.8:12.9,13",), "+cuda") in depends
    assert Directive("depends_on", ("hip@6.3",), "+rocm") in depends
    assert Directive("depends_on", ("hsa-rocr-dev@6.3",), "+rocm") in depends
    assert Directive("depends_on", ("llvm-amdgpu@6.3",), "+rocm", BUILD) in depends
    (oneapi,) = recipe.of("requires")
    assert (oneapi.args, oneapi.when) == (("%oneapi@2024.2",), "+sycl")
    for language in ("c", "cxx"):  # a dependency like others since Spack 1.0
        assert Directive("depends_on", (language,), "", BUILD) in depends


def test_torch_is_for_the_same_device(recipe: Recipe) -> None:
    wanted = {(d.args[0], d.when) for d in recipe.of("depends_on") if d.args[0].startswith("py-torch")}
    assert wanted == {
        ("py-torch@2.4:", ""),
        ("py-torch~cuda~rocm", "~cuda~rocm"),
        ("py-torch+cuda~rocm", "+cuda"),
        ("py-torch~cuda+rocm", "+rocm"),
        *((f"py-torch cuda_arch={a}", f"+cuda cuda_arch={a}") for a in ("60", "70", "80", "90", "90a")),
        *((f"py-torch amdgpu_target={a}", f"+rocm amdgpu_target={a}") for a in ("gfx90a", "gfx942", "gfx1100")),
    }


@pytest.mark.parametrize(("key", "kind"), [("dependencies", BUILD_RUN), ("requires", BUILD)])
def test_every_requirement_of_the_python_package_is_one_of_the_recipe(
    key: str, kind: dict[str, object], recipe: Recipe
) -> None:
    """With the same lower bound."""
    given = {d.args[0]: d.options for d in recipe.of("depends_on")}
    for name, least in requirements(key):
        assert given.get(f"py-{name}@{least}:") == kind, name


def test_optional_dependencies(recipe: Recipe) -> None:
    depends = recipe.of("depends_on")
    assert Directive("depends_on", ("py-mpi4py@4:",), "+mpi", BUILD_RUN) in depends
    assert Directive("depends_on", ("py-triton",), "+triton", BUILD_RUN) in depends
    (arrow,) = (d for d in depends if d.args[0].startswith("arrow"))
    assert {"parquet", "zstd", "snappy"} <= set(arrow.args[0].split("+"))


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (FakeSpec("mpi"), {"BATCHINFER_DEVICE": "cpu"}),
        (
            FakeSpec("cuda", cuda_arch=("80", "90")),
            {"BATCHINFER_DEVICE": "cuda", "CMAKE_CUDA_ARCHITECTURES": "80;90"},
        ),
        (
            FakeSpec("rocm", amdgpu_target=("gfx90a", "gfx942")),
            {
                "BATCHINFER_DEVICE": "rocm",
                "CMAKE_HIP_ARCHITECTURES": "gfx90a;gfx942",
                "CMAKE_HIP_COMPILER": "/spack/llvm-amdgpu/bin/amdclang++",
            },
        ),
        (FakeSpec("sycl"), {"BATCHINFER_DEVICE": "xpu"}),
    ],
)
def test_what_cmake_is_told(spec: FakeSpec, settings: dict[str, str], recipe: Recipe) -> None:
    given = recipe.package().config_settings(spec, FakePrefix("/spack/batchinfer"))
    assert given == {f"cmake.define.{key}": value for key, value in settings.items()}


def test_the_build_environment(recipe: Recipe) -> None:
    package, given = recipe.package(), {}
    package.spec = FakeSpec("cuda", cuda_arch=("90",))
    package.setup_build_environment(
        type("Environment", (), {"set": lambda _, key, value: given.update({key: value})})()
    )
    assert given == {"MAX_JOBS": "3", "CUDACXX": "/spack/cuda/bin/nvcc"}


def test_gguf_is_packaged_as_it_is_on_pypi() -> None:
    gguf = load(REPOSITORY / "packages/py_gguf/package.py")
    (version,) = gguf.of("version")
    assert gguf.package.pypi == f"gguf/gguf-{version.args[0]}.tar.gz"
    assert len(bytes.fromhex(version.options["sha256"])) == 32
    assert {d.args[0].split("@")[0] for d in gguf.of("depends_on")} == {
        *("python", "py-numpy", "py-pyyaml", "py-requests", "py-tqdm", "py-poetry-core")
    }


def test_style_is_that_of_spack_packages() -> None:
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "recipes/spack/ruff.toml"), "--no-cache"]
    for command in ([*ruff, "check", *config], [*ruff, "format", "--check", *config]):
        done = subprocess.run([*command, str(REPOSITORY)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("device", "pins"),
    [
        ("cuda", {"cuda_arch=90", "^cuda@12.8"}),
        ("rocm", {"amdgpu_target=gfx90a", "^hip@6.3.3"}),
        ("sycl", {"%oneapi@2024.2.1"}),
    ],
)
def test_the_example_environments_pin_a_toolchain(device: str, pins: set[str]) -> None:
    folder = ROOT / "recipes/spack/environments" / device
    environment = yaml.safe_load((folder / "spack.yaml").read_text())["spack"]
    (spec,) = environment["specs"]
    assert set(spec.split()) == {f"batchinfer@main+{device}", *pins}
    assert (folder / environment["repos"]["batchinfer"]).resolve() == REPOSITORY
