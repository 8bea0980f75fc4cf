"""A configuration for Spack in which everything but batchinfer is already installed: a solve takes half a minute and an
install compiles nothing else. The Python packages are those of one environment; GPU toolkits may be declared without
being there, which is enough for a solve."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from recipes.project import ROOT, requirements

REPOSITORY = ROOT / "recipes/spack/spack_repo/batchinfer"

RUN = {name for name, _ in requirements("dependencies")} - {"torch"}
BUILD = {name for name, _ in requirements("requires")}
PYTHON_PACKAGES = sorted(RUN | BUILD | {"pip", "setuptools", "wheel", "mpi4py"})

DEVICES = {
    "cpu": "~cuda~rocm",
    "cuda": "+cuda~rocm cuda_arch=90",
    "rocm": "~cuda+rocm amdgpu_target=gfx90a",
}
"""Variants of the py-torch that a build for this device takes; SYCL takes the one for the CPU."""


def packages(prefix: Path, cuda: tuple[str, Path] | None = None) -> dict[str, Any]:
    """Spack's packages.yaml. ``prefix``: an environment that holds PYTHON_PACKAGES and torch. ``cuda``: version and
    folder of an installed toolkit; without one a CUDA that is not there is declared."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    python = [{"spec": f"python@{version}", "deptypes": ["build", "link", "run"]}]
    found = _versions(prefix)

    def external(spec: str, where: Path, **more: Any) -> dict[str, Any]:
        return {"spec": spec, "prefix": str(where), **more}

    def only(*externals: dict[str, Any]) -> dict[str, Any]:
        return {"buildable": False, "externals": list(externals)}

    def tool(name: str) -> dict[str, Any]:
        path = shutil.which(name)
        assert path, f"{name} is not installed"
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        return only(
            external(f"{name}@{text.split()[-1] if name == 'ninja' else text.split()[2]}", Path(path).parent.parent)
        )

    declared = {
        f"py-{name}": only(external(f"py-{name}@{found[name]}", prefix, dependencies=python))
        for name in PYTHON_PACKAGES
        if name in found
    }
    toolkit, folder = cuda or ("12.8.1", prefix)
    nowhere = prefix / "not-there"
    icx = {"compilers": {"c": str(nowhere / "bin/icx"), "cxx": str(nowhere / "bin/icpx")}}
    return {
        "all": {"require": ["target=x86_64_v3"]},
        "python": only(external(f"python@{version}", Path(sys.base_prefix))),
        "cmake": tool("cmake"),
        "ninja": tool("ninja"),
        "arrow": only(external("arrow@19.0.1+parquet+zstd+snappy+lz4+zlib+brotli", prefix)),
        **declared,
        "py-torch": only(
            *(
                external(f"py-torch@{found['torch'].split('+')[0]}{variants}", prefix, dependencies=python)
                for variants in DEVICES.values()
            )
        ),
        "cuda": only(external(f"cuda@{toolkit}", folder)),
        **{
            name: only(external(f"{name}@6.3.3{'+rocm' if name == 'hip' else ''}", nowhere))
            for name in ("hip", "hsa-rocr-dev", "llvm-amdgpu")
        },
        "intel-oneapi-compilers": only(
            external("intel-oneapi-compilers@2024.2.1", nowhere, extra_attributes=icx),
        ),
    }


def python_environment() -> Path:
    """Prefix of the environment whose packages are the externals; its batchinfer has to be another installation's."""
    return Path(os.environ.get("BATCHINFER_SPACK_ENVIRONMENT", sys.prefix))


def _versions(prefix: Path) -> dict[str, str]:
    """Normalised name -> version of what is installed in an environment."""
    command = [str(prefix / "bin/python"), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {item["name"].lower().replace("_", "-"): item["version"] for item in listed}
