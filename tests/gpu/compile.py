"""Compile csrc/gpu for all that it is built for, and hold its register spills against csrc/gpu/spills.txt.

PYTHONPATH=tests python tests/gpu/compile.py [ARCH ...]      needs no GPU; MAX_JOBS processes

By nvcc (CUDACXX, CUDA_HOME/bin or PATH), or where there is none by that of NVIDIA's wheels, which go into build/. What
it does not know, 7.0 from CUDA 13 on, by clang++-19 with the ptxas of CUDA 12.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import recorder
from gpu.cuda_toolkit import install_cuda12, install_nvcc

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "csrc/gpu").glob("*.cu"))
BUDGET = ROOT / "csrc/gpu/spills.txt"
ARCHITECTURES = ("70", "75", "80", "86", "89", "90a", "100")
WHEELS = ROOT / "build/cuda-check"


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = os.environ.get("CUDACXX") or (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    return found or str(install_nvcc(WHEELS / "cuda13") / "bin/nvcc")


def commands(architectures: list[str]) -> list[list[str]]:
    """Compilers and their options, one after the other for every source, which together do the architectures."""
    compiler = nvcc()
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    by_nvcc = [arch for arch in architectures if f"compute_{arch.removesuffix('a')}" in known]
    by_clang = [arch for arch in architectures if arch not in by_nvcc]
    found = []
    if by_nvcc:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in by_nvcc]
        found.append([compiler, *targets, "-Xcompiler=-Wall", "-Xptxas=-v"])
    if by_clang:
        toolkit = install_cuda12(WHEELS / "cuda12")
        targets = [f"--cuda-gpu-arch=sm_{arch}" for arch in by_clang]
        clang = ["clang++-19", "-x", "cuda", f"--cuda-path={toolkit}", "-Wno-unknown-cuda-version"]
        found.append([*clang, *targets, "--cuda-device-only", "-Xcuda-ptxas", "-v"])
    return found


def budget() -> dict[tuple[str, str], int]:
    """(source, architecture) -> bytes."""
    lines = [line.split() for line in BUDGET.read_text().splitlines() if line and not line.startswith("#")]
    return {(source, arch): int(count) for source, arch, count in lines}


def spilled(log: str) -> dict[str, int]:
    """Bytes that ptxas reports, by architecture ("90a")."""
    found: dict[str, int] = {}
    arch = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function .* for 'sm_(\w+)'", line):
            arch = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[arch] = found.get(arch, 0) + int(match[1]) + int(match[2])
    return found


def compile_source(source: Path, compilers: list[list[str]]) -> tuple[bool, str]:
    """Whether it compiled, and what the compilers said. The objects are not kept."""
    options = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", "-DBATCHINFER_SM90A"]
    good, said = True, ""
    for compiler in compilers:
        command = [*compiler, *options, "-c", str(source), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        good, said = good and done.returncode == 0, said + done.stdout + done.stderr
    return good, said


def main() -> int:
    architectures = sys.argv[1:] or list(ARCHITECTURES)
    allowed, compilers, bad = budget(), commands(architectures), 0
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        results = pool.map(lambda source: compile_source(source, compilers), SOURCES)
        for source, (ok, log) in zip(SOURCES, results, strict=True):
            if not ok:
                print(log)
                bad += 1
                continue
            counts = spilled(log)
            for arch in architectures:
                limit, count = allowed.get((source.name, arch), 0), counts.get(arch, 0)
                bad += count > limit
                note = "" if count == limit else f", {limit} are recorded in {BUDGET.relative_to(ROOT)}"
                print(f"{source.name} sm_{arch}: {count} bytes spilled{note}", flush=True)
    recorder.write_compiled("make cuda-check", "cuda", not bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
