"""Compile the launchers of csrc/sycl to SPIR-V as DPC++'s device pass does, and that to the code of Intel's GPUs, and
hold the register spills against csrc/sycl/spills.txt.

PYTHONPATH=tests python tests/sycl/compile.py DEVICE_PASS

DEVICE_PASS: the program of device_pass.cpp. The offline compiler is Debian's intel-opencl-icd (ocloc), the disassembler
spirv-tools (spirv-dis).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import recorder

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted(path.name for path in (ROOT / "csrc/sycl").glob("*.cpp") if path.name != "devices.cpp")
"""Those with kernels."""

EXACT = "sample.cpp"
"""Whose kernels say to the driver's compiler, too, that a product and a sum are rounded one by one."""

BUDGET = ROOT / "csrc/sycl/spills.txt"
DEVICES = ("pvc", "dg2")
"""Data Center GPU Max (Ponte Vecchio) and Arc (Alchemist), by ocloc's names."""


def budget() -> dict[tuple[str, str], int]:
    """(source, device) -> the most registers that a kernel of it may spill."""
    lines = [line.split() for line in BUDGET.read_text().splitlines() if line and not line.startswith("#")]
    return {(source, device): int(count) for source, device, count in lines}


def run(*command: str, folder: Path) -> str:
    environment = {**os.environ, "SYCL_DUMP_IMAGES": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def fused(disassembly: str) -> list[str]:
    """Names of the kernels in which a product and a sum may be rounded as one."""
    kernels = dict(re.findall(r'OpEntryPoint Kernel (%\S+) "(\S+)"', disassembly))
    exact = set(re.findall(r"OpExecutionMode (%\S+) ContractionOff", disassembly))
    if not kernels:
        sys.exit("no kernel in the module")
    return [name for function, name in kernels.items() if function not in exact]


def spilled(log: str) -> int:
    """The most registers that a kernel spills: ocloc tells it of those that do."""
    return max(map(int, re.findall(r"spilled around (\d+)", log)), default=0)


def main() -> int:
    device_pass, allowed, bad = str(Path(sys.argv[1]).absolute()), budget(), 0
    tools = {tool: shutil.which(tool) for tool in ("ocloc", "spirv-dis")}
    for tool in (tool for tool, found in tools.items() if not found):
        print(f"NOT RUN: {tool} is not installed (apt-get install intel-opencl-icd spirv-tools)")
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where)
            run(device_pass, f"sycl/{source}", folder=folder)
            (module,) = folder.glob("*.spv")
            print(f"{source}: {module.stat().st_size} bytes of SPIR-V", flush=True)
            if source == EXACT and tools["spirv-dis"]:
                loose = fused(run("spirv-dis", module.name, folder=folder))
                print(f"{source}: products and sums may be fused in: {', '.join(loose) or 'no kernel'}")
                bad += len(loose)
            for device in DEVICES if tools["ocloc"] else ():
                command = ("ocloc", "compile", "-spirv_input", "-file", module.name, "-device", device)
                count = spilled(run(*command, "-out_dir", "out", folder=folder))
                limit = allowed.get((source, device), 0)
                bad += count > limit
                note = "" if count == limit else f", {limit} are recorded in {BUDGET.relative_to(ROOT)}"
                print(f"{source} {device}: {count} registers spilled{note}", flush=True)
    if tools["ocloc"]:
        recorder.write_compiled("make sycl-check", "xpu", not bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
