"""The doctor's questions to NVIDIA's driver, put to one that is not NVIDIA's (libcuda.c)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.doctor.facts import Gpu

ASK = """
from batchinfer.doctor.facts import Gpu
from batchinfer.doctor.software import nvidia_gpus
print(repr(nvidia_gpus()))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source, target = Path(__file__).with_name("libcuda.c"), folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, source], check=True)
    return folder


def ask(library: Path, **variables: str) -> tuple[str, tuple[Gpu, ...]]:
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)} | variables
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    return eval(done.stdout, {"Gpu": Gpu})


def test_the_driver_tells_its_version_and_gpus(library: Path) -> None:
    assert ask(library) == (
        "12.8",
        (Gpu("NVIDIA FAKE 0", "9.0", 1 << 36, "0000:00:00.0"), Gpu("NVIDIA FAKE 1", "9.1", 2 << 36, "0000:01:00.0")),
    )


def test_a_driver_without_gpus(library: Path) -> None:
    assert ask(library, FAKE_GPUS="0") == ("12.8", ())
    assert ask(library, FAKE_CUINIT="100") == ("12.8", ())  # CUDA_ERROR_NO_DEVICE


def test_no_driver(tmp_path: Path) -> None:
    """An empty file in the library's place: on a machine with a driver as on others nothing can be loaded."""
    (tmp_path / "libcuda.so.1").touch()
    assert ask(tmp_path) == ("", ())


def test_a_rank_knows_its_gpu_from_a_slice_of_it(library: Path) -> None:
    """By address and UUID, which two slices of a GPU don't have in common."""
    code = "from batchinfer.cluster.binding import place; at = place('n', 1, True); print(at.gpu, at.part)"
    environment = os.environ | {"LD_LIBRARY_PATH": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0000:01:00.0", "a1" * 16]
