"""The emulator sees planted mistakes (tests/simt/faults.cu), each in a process of its own: AddressSanitizer ends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gpu.backend import EMULATOR, SIMT

pytestmark = pytest.mark.skipif(not SIMT, reason="needs the emulator: make gpu-emulated")

SCRIPT = """
import importlib.machinery, importlib.util, sys
import torch
kernel, fault, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
loader = importlib.machinery.ExtensionFileLoader("_faults", path)
faults = importlib.util.module_from_spec(importlib.util.spec_from_loader("_faults", loader))
loader.exec_module(faults)
out = torch.full((64 if kernel != "product" else 16,), -1, dtype=torch.int32)
source = torch.arange(256, dtype=torch.int32)
before = (source.data_ptr(),) if kernel == "copied" else ()
getattr(faults, kernel)(*before, out.data_ptr(), fault)
print(*out.tolist())
"""


def run(kernel: str, fault: int) -> subprocess.CompletedProcess:
    faults = str(Path(EMULATOR).with_name("_faults.so"))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, kernel, str(fault), faults], capture_output=True, text=True, timeout=100
    )


RIGHT = {
    "neighbours": [2 * ((t + 1) % 64) + (t ^ 1) for t in range(64)],
    "copied": [4 * t for t in range(64)],
    "product": [16 * row for row in range(16)],
}


@pytest.mark.parametrize("kernel", RIGHT)
@pytest.mark.feature("tests", "the emulator of CUDA kernels sees planted faults")
def test_kernels_without_a_mistake(kernel: str) -> None:
    done = run(kernel, 0)
    assert [int(n) for n in done.stdout.split()] == RIGHT[kernel], done.stderr


@pytest.mark.parametrize(
    ("kernel", "fault", "sign"),
    [
        ("neighbours", 1, "heap-buffer-overflow"),
        ("neighbours", 2, "heap-buffer-overflow"),
        ("neighbours", 3, "index 64 out of bounds"),
        ("neighbours", 5, "the block stands still: 1 threads of block 0 have ended; 63, thread 0 the first, wait in"),
        ("neighbours", 6, "some have ended|has ended while lanes of its warp wait"),
        ("product", 1, "a shared-memory access of 16 bytes at 512 of the 512"),
    ],
)
def test_mistakes_that_end_the_kernel(kernel: str, fault: int, sign: str) -> None:
    done = run(kernel, fault)
    assert done.returncode != 0
    assert any(part in done.stderr for part in sign.split("|")), done.stderr


@pytest.mark.parametrize(("kernel", "fault"), [("neighbours", 4), ("neighbours", 7), ("copied", 1)])
def test_mistakes_that_show_in_the_result(kernel: str, fault: int) -> None:
    """A missing barrier, a wrong lane, and a copy that is read before it is waited for."""
    done = run(kernel, fault)
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in done.stdout.split()] != RIGHT[kernel]
