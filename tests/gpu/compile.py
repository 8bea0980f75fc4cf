"""Compile csrc/gpu for several architectures and hold its register spills against csrc/gpu/spills.txt.

PYTHONPATH=tests python tests/gpu/compile.py [ARCH ...]

Needs nvcc (CUDACXX, CUDA_HOME/bin or PATH) and no GPU. MAX_JOBS processes.
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

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "csrc/gpu").glob("*.cu"))
BUDGET = ROOT / "csrc/gpu/spills.txt"
ARCHITECTURES = ("75", "80", "90a")


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = os.environ.get("CUDACXX") or (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if not found:
        sys.exit("no CUDA compiler in CUDACXX, CUDA_HOME/bin or PATH")
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


def compile_source(source: Path, architectures: list[str]) -> tuple[bool, str]:
    """Whether it compiled, and what the compiler said. The object is not kept."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    command = [nvcc(), "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", "-DBATCHINFER_SM90A"]
    command += [*targets, "-Xcompiler=-Wall", "-Xptxas=-v", "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def main() -> int:
    architectures = sys.argv[1:] or list(ARCHITECTURES)
    allowed, bad = budget(), 0
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        results = pool.map(lambda source: compile_source(source, architectures), SOURCES)
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
