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


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda", "there is no CUDA compiler in CUDACXX, CUDA_HOME/bin or PATH"),
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
