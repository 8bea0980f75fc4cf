"""CMake's choice of the device: what is asked for or an error, never something else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recipes.project import ROOT

TOOLS = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
CMAKE, NINJA = shutil.which("cmake", path=TOOLS), shutil.which("ninja", path=TOOLS)

pybind11 = pytest.importorskip("pybind11", reason="pip install pybind11")

pytestmark = [
    pytest.mark.feature("recipes", "CMake builds for the device that was asked for, or stops and says why"),
    pytest.mark.skipif(not (CMAKE and NINJA), reason="cmake or ninja is not installed: pip install cmake ninja"),
    pytest.mark.skipif(shutil.which("nvcc", path="/usr/bin:/bin") is not None, reason="nvcc is in /usr/bin"),
]


def configure(build: Path, **variables: str) -> tuple[int, str]:
    """Exit code and all output; no CUDA compiler is to be found."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(build), **variables}
    command = [CMAKE, "-S", str(ROOT), "-B", str(build / "build"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_none_needs_no_compiler(tmp_path: Path) -> None:
    code, said = configure(tmp_path, BATCHINFER_DEVICE="none", CC="/nonexistent", CXX="/nonexistent")
    assert code == 0, said
    assert "device none (as asked for)" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize(("asked", "built"), [("90a", "90a-real"), ("80;90-real", "80;90a-real")])
def test_compute_capability_9_has_its_warpgroup_kernels(asked: str, built: str, tmp_path: Path) -> None:
    """However it is asked for: without them attention over prompts takes 1.7 times as long on an H100."""
    folder = os.path.dirname(str(shutil.which("nvcc")))
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "CUDAARCHS": asked, "BATCHINFER_DEVICE": "cuda"}
    code, said = configure(tmp_path, **environment)
    assert code == 0, said
    assert f"for {built}" in said
    assert "-DBATCHINFER_SM90A" in (tmp_path / "build" / "build.ninja").read_text()


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda", "there is no CUDA compiler in CUDACXX, CUDA_HOME/bin or PATH"),
        pytest.param(
            "rocm",
            "there is no ROCm (include/hip/hip_version.h) in ROCM_PATH or HIP_PATH, nor around a hipcc in PATH",
            marks=pytest.mark.skipif(shutil.which("hipcc", path="/usr/bin:/bin") is not None, reason="hipcc is there"),
        ),
        pytest.param(
            "xpu",
            "there is no icpx in CXX, CMPLR_ROOT/bin, ONEAPI_ROOT/compiler/latest/bin or PATH",
            marks=pytest.mark.skipif(shutil.which("icpx", path="/usr/bin:/bin") is not None, reason="icpx is there"),
        ),
        ("gpu", "BATCHINFER_DEVICE=gpu is not one of: cpu;cuda;rocm;xpu;none"),
    ],
)
def test_what_can_not_be_built_is_refused(device: str, said: str, tmp_path: Path) -> None:
    code, output = configure(tmp_path, BATCHINFER_DEVICE=device)
    assert code != 0
    assert said in output


def test_a_wrong_number_of_jobs_is_refused(tmp_path: Path) -> None:
    code, output = configure(tmp_path, BATCHINFER_DEVICE="cpu", MAX_JOBS="many")
    assert code != 0
    assert "MAX_JOBS=many is no number of compilers" in output


def test_the_number_of_jobs_and_a_compiler_cache_are_taken(tmp_path: Path) -> None:
    cache = tmp_path / "bin/ccache"
    cache.parent.mkdir()
    cache.write_text('#!/bin/sh\nexec "$@"\n')
    cache.chmod(0o755)
    path = f"{cache.parent}:/usr/bin:/bin"
    code, said = configure(tmp_path, BATCHINFER_DEVICE="cpu", MAX_JOBS="3", PATH=path)
    assert code == 0, said
    assert f"compiler cache {cache}" in said
    build, rules = ((tmp_path / "build" / name).read_text() for name in ("build.ninja", "CMakeFiles/rules.ninja"))
    assert f"LAUNCHER = {cache}" in build or f"{cache} /usr/bin/" in rules  # as CMake 4 and 3 write it
    assert "depth = 3" in rules


def rocm(root: Path, major: int, minor: int) -> str:
    """A folder with as much of ROCm as CMake looks at before it takes the compiler."""
    header = root / "include/hip/hip_version.h"
    header.parent.mkdir(parents=True)
    header.write_text(f"#define HIP_VERSION_MAJOR {major}\n#define HIP_VERSION_MINOR {minor}\n")
    return str(root)


@pytest.mark.parametrize("variable", ["ROCM_PATH", "HIP_PATH", "PATH"])
def test_an_old_rocm_is_refused(variable: str, tmp_path: Path) -> None:
    root = rocm(tmp_path / "rocm-6.2.4", 6, 2)
    hipcc = tmp_path / "rocm-6.2.4/bin/hipcc"
    hipcc.parent.mkdir()
    hipcc.write_text("")
    hipcc.chmod(0o755)
    value = f"{hipcc.parent}:/usr/bin:/bin" if variable == "PATH" else root
    code, output = configure(tmp_path, BATCHINFER_DEVICE="rocm", **{variable: value})
    assert code != 0
    assert f"ROCm 6.2 in {root} is too old: 6.3 or newer is wanted" in output


def test_rocm_without_its_compiler_is_refused(tmp_path: Path) -> None:
    root = rocm(tmp_path / "rocm", 6, 3)
    code, output = configure(tmp_path, BATCHINFER_DEVICE="rocm", ROCM_PATH=root)
    assert code != 0
    assert f"there is no amdclang++ or clang++ in {root}/llvm/bin;{root}/lib/llvm/bin;{root}/bin" in output


def icpx(folder: Path, says: str) -> Path:
    """As much of icpx as CMake asks before it takes the compiler."""
    folder.mkdir(parents=True)
    program = folder / "icpx"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    return program


OLD = "Intel(R) oneAPI DPC++/C++ Compiler 2024.1.2 (2024.1.2.20240508)"


@pytest.mark.parametrize("variable", ["CXX", "CMPLR_ROOT", "ONEAPI_ROOT", "PATH"])
def test_an_old_icpx_is_refused(variable: str, tmp_path: Path) -> None:
    place = {"CMPLR_ROOT": "bin", "ONEAPI_ROOT": "compiler/latest/bin"}.get(variable, ".")
    program = icpx(tmp_path / "oneapi" / place, OLD)
    value = {"CXX": str(program), "PATH": f"{program.parent}:/usr/bin:/bin"}.get(variable, str(tmp_path / "oneapi"))
    code, output = configure(tmp_path, BATCHINFER_DEVICE="xpu", **{variable: value})
    assert code != 0
    assert "is of oneAPI 2024.1.2; wanted: 2024.2 or newer" in output
    assert "oneapi" in output.partition("is of oneAPI")[0]


def test_another_compiler_is_not_taken_for_icpx(tmp_path: Path) -> None:
    program = icpx(tmp_path / "other", "g++ (Debian 12.2.0-14) 12.2.0")
    code, output = configure(tmp_path, BATCHINFER_DEVICE="xpu", CXX=str(program))
    assert code != 0
    assert "is not Intel's icpx" in output
