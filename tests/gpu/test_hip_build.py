"""csrc/gpu compiled as HIP, by Debian's clang (cmake/ci-hip-debian.cmake): within its scratch memory, exact where the
sampler must be, and an extension that links, imports and finds no device. `make hip-check` runs this: a minute."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import recorder
from gpu.compile import ROOT, SOURCES, budget
from tools import run, tool

pytestmark = pytest.mark.skipif(not os.environ.get("BATCHINFER_TEST_HIP"), reason="takes a minute: make hip-check")

TARGETS = ["gfx90a", "gfx942", "gfx1100"]
IMPORT = "import json, _gpu; print(json.dumps([_gpu.compiled_for, _gpu.device_count(), _gpu.build_info, dir(_gpu)]))"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a build for the three targets, and what the compiler said."""
    import pybind11

    folder = tmp_path_factory.mktemp("hip")
    headers = Path(importlib.util.find_spec("triton").origin).parent / "backends/amd/include"
    settings = {
        "CMAKE_TOOLCHAIN_FILE": ROOT / "cmake/ci-hip-debian.cmake",
        "BATCHINFER_HIP_HEADERS": headers,
        "BATCHINFER_DEVICE": "rocm",
        "CMAKE_HIP_FLAGS_RELEASE": "-O3 -DNDEBUG -Rpass-analysis=kernel-resource-usage",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    said = run(tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines)
    assert f"for {';'.join(TARGETS)}" in said
    jobs = os.environ.get("MAX_JOBS", "2")
    return folder, run(tool("cmake"), "--build", str(folder), "--target", "_gpu", "--parallel", jobs)


def scratch(log: str) -> dict[str, list[int]]:
    """Bytes a lane of each kernel and target, by source."""
    found: dict[str, list[int]] = {}
    for source, count in re.findall(r"(\w+\.cu):\d+:\d+: remark: +ScratchSize \[bytes/lane\]: (\d+)", log):
        found.setdefault(source, []).append(int(count))
    return found


@pytest.mark.feature("AMD kernels (compiled)", "for gfx90a, gfx942, gfx1100, within recorded scratch memory")
def test_kernels_stay_in_their_registers(build: tuple[Path, str]) -> None:
    used, allowed = scratch(build[1]), budget()
    with_kernels = {source.name for source in SOURCES if not source.stem.endswith("_sm90")}  # those are NVIDIA's
    assert set(used) == with_kernels
    assert all(len(counts) % len(TARGETS) == 0 for counts in used.values())
    over = {name: max(counts) for name, counts in used.items() if max(counts) > allowed.get((name, "amdgpu"), 0)}
    assert not over, "bytes of scratch memory a lane; those that are meant go into csrc/gpu/spills.txt"
    assert "warning:" not in build[1]


@pytest.mark.feature("AMD kernels (compiled)", "the extension links, imports and finds no device")
def test_the_extension_imports_and_finds_no_device(build: tuple[Path, str]) -> None:
    vendor, devices, info, names = json.loads(run(sys.executable, "-c", IMPORT, PYTHONPATH=str(build[0])))
    assert (vendor, devices, info["architectures"]) == ("rocm", 0, TARGETS)
    assert set(recorder.FUNCTIONS.values()) <= set(names)
    recorder.note("rocm", "compiled", recorder.FUNCTIONS)


@pytest.mark.feature("AMD kernels (compiled)", "the sampler fuses no product with a sum")
@pytest.mark.parametrize("target", TARGETS)
def test_the_samplers_arithmetic_is_not_contracted(target: str, build: tuple[Path, str]) -> None:
    """Its logarithm and exponential are specified bit for bit; a plain expression beside them is contracted."""
    source, root = build[0] / "exact.cu", build[0] / "rocm"
    source.write_text(
        '#include "gpu/sample.cuh"\n'
        "using namespace batchinfer::gpu;\n"
        "__global__ void sampler(float* x) { x[0] = exact::exp(x[0]); }\n"
        "__global__ void plain(float* x) { x[0] = x[0] * x[1] + x[2]; }\n"
    )
    flags = ["-x", "hip", "-std=c++17", "-O3", f"--rocm-path={root}", f"--rocm-device-lib-path={root}/bitcode"]
    flags += ["-isystem", f"{root}/include", f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include", f"--offload-arch={target}"]
    text = run("clang++-19", *flags, "--cuda-device-only", "-S", str(source), "-o", "-")
    sampler, plain = (text.split(f"_Z{len(n)}{n}Pf:")[1].split("s_endpgm")[0] for n in ("sampler", "plain"))
    fused = re.compile(r"v_\w*(fma|mad|mac)")
    assert "v_mul_f32" in sampler
    assert not fused.search(sampler)
    assert fused.search(plain)
