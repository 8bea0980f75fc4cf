"""csrc compiled for aarch64, and its C++ tests run by QEMU on processors with and without the newer instructions: each
takes the kernels that it should, and all kernels are right. `make arm-check` runs this: two minutes."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest
import recorder
from tools import run, tool

ROOT = Path(__file__).parents[2]
OPS = {
    "test_attention": ("plan_attention", "attention"),
    "test_elementwise": (
        *("embed", "gather_rows", "add", "softcap", "rms_norm", "layer_norm", "rope_and_cache"),
        *("silu_mul", "gelu_mul", "activate"),
    ),
    "test_products": ("pack_weight", "linear", "gated_linear"),
    "test_sampler": ("sample",),
}
"""What the C++ tests hold against a plain computation."""

PROCESSORS = {"cortex-a53": "neon", "neoverse-n1": "neondotprod", "max": "neonbf16"}

pytestmark = pytest.mark.skipif(not os.environ.get("BATCHINFER_TEST_ARM"), reason="takes two minutes: make arm-check")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> str:
    import pybind11

    folder = str(tmp_path_factory.mktemp("arm"))
    settings = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "cmake/ci-aarch64-debian.cmake",
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "BATCHINFER_DEVICE": "cpu",
        "BATCHINFER_CPP_TESTS": "ON",
        # Headers for the configuration alone: no module is built, which would want a Python for aarch64.
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": sysconfig.get_path("include"),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    said = run(tool("cmake"), "-S", str(ROOT), "-B", folder, "-G", "Ninja", *defines)
    assert f"CPU kernels for {';'.join(PROCESSORS.values())}" in said
    run(tool("cmake"), "--build", folder, "--target", "cpp_tests", "--parallel", os.environ.get("MAX_JOBS", "2"))
    return folder


@pytest.mark.feature(
    "CPU kernels", "aarch64: NEON, dot products, bf16 and i8mm; in QEMU (make arm-check), on no such CPU"
)
@pytest.mark.parametrize(("processor", "isa"), PROCESSORS.items())
def test_cpp_tests_on(processor: str, isa: str, build: str) -> None:
    environment = {"QEMU_CPU": processor, "BATCHINFER_EXPECTED_ISA": isa}
    said = run(tool("ctest"), "--test-dir", build, "--output-on-failure", "-j2", **environment)
    assert "tests passed" in said
    for program, ops in OPS.items():
        assert re.search(rf"\b{program} \.+ +Passed", said)
        recorder.note("cpu aarch64", "emulated", ops)
