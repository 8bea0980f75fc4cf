"""Compile the Triton kernels for GPUs that are not here, as the ops would launch them, and hold what they need of a
multiprocessor against triton_limits.txt.

python tests/ops/triton_targets.py [TARGET ...]      needs neither a GPU nor a driver; prints the table
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-targets-"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from batchinfer.ops import AttentionInput, HeadNorm, Rope, SampleInput
from batchinfer.ops.triton.backend import TritonOps

LIMITS = Path(__file__).parent / "triton_limits.txt"

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}

IN_CI = ("sm_80", "sm_90", "gfx90a", "gfx942", "gfx1100")

SHARED_MEMORY = {"cuda": 99 << 10, "hip": 64 << 10}
"""Bytes that a program may take on the smallest GPU of the vendor: compute capability 8.6, all of AMD's."""


class Driver:
    """Stands where Triton asks which device is current."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0


class CompiledOps(TritonOps):
    """Compiles what it should launch. ``kernels``: (name, compiled kernel)."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.kernels: list[tuple[str, Any]] = []
        self.prefix = ""

    def _run(self, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        kind = {0: " prefill", None: ""}.get(options.get("SPLIT"), " decode") if kernel.__name__ == "attend" else ""
        name = f"{kernel.__name__}{kind}{self.prefix if kernel.__name__ in ('attend', 'rope_and_cache') else ''}"
        if name not in dict(self.kernels):
            self.kernels.append((name, kernel.warmup(*args, grid=grid, **options)))


def call_all(ops: CompiledOps, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every op at the sizes of models with heads of 128 and 64, the first without what is optional."""
    for heads, kv_heads, width, softcap in ((32, 8, 128, 0.0), (9, 3, 64, 50.0)):
        ops.prefix = f" {width}"
        attend(ops, heads, kv_heads, width, dtype, softcap)
    x, ids = torch.zeros(3, 4096, dtype=dtype), torch.zeros(3, dtype=torch.int32)
    ops.embed(ids, x, torch.zeros_like(x), 2.0)
    ops.rms_norm(x, torch.zeros(4096), 1e-5, torch.zeros_like(x), torch.zeros_like(x))
    ops.layer_norm(x, torch.zeros(4096), torch.zeros(4096), 1e-5, torch.zeros_like(x), torch.zeros_like(x))
    ops.gelu_mul(torch.zeros(3, 8192, dtype=dtype), torch.zeros_like(x))
    rows, vocab = 2, 128_256
    numbers, words = torch.zeros(rows), torch.zeros(rows, dtype=torch.int32)
    start = torch.zeros(rows + 1, dtype=torch.int32)
    inputs = SampleInput(
        *(numbers, words, numbers, numbers, torch.zeros(rows, dtype=torch.int64), words),
        penalties=(numbers,) * 3,
        history_ids=ids,
        history_start=start,
        history_prompt=words,
        banned_ids=ids,
        banned_start=start,
        num_logprobs=words + 3,
    )
    ops.sample(torch.zeros(rows, vocab), inputs)


def attend(ops: CompiledOps, heads: int, kv_heads: int, width: int, dtype: torch.dtype, softcap: float) -> None:
    words = torch.zeros(3, dtype=torch.int32)
    cache = torch.zeros(4, kv_heads, 16, width, dtype=dtype)
    q, out, lse = *torch.zeros(2, 3, heads, width, dtype=dtype), torch.zeros(3, heads)
    qkv = torch.zeros(3, (heads + 2 * kv_heads) * width, dtype=dtype)
    norm = HeadNorm(torch.zeros(width), torch.zeros(width), 1e-6)
    rope = Rope(torch.zeros(50, width))
    ops.rope_and_cache(qkv, words, words.long(), rope, cache, cache, q, norm if softcap else None)
    inputs = AttentionInput(torch.zeros(4, dtype=torch.int32), words, words, torch.zeros(3, 200, dtype=torch.int32))
    ops.attention(q, cache, cache, ops.plan_attention(inputs, heads, cache), 0.1, out, lse, softcap)


def compiled(target: str) -> Iterator[tuple[str, int, int]]:
    """(kernel, bytes spilled by a thread, bytes of shared memory of a program)."""
    driver.set_active(Driver(TARGETS[target]))
    ops = CompiledOps()
    call_all(ops)
    for name, kernel in ops.kernels:
        yield name, spilled(kernel.asm), kernel.metadata.shared


def spilled(asm: dict[str, Any]) -> int:
    """Bytes of a thread's private memory, where nothing but spilled registers is."""
    if "amdgcn" in asm:
        return int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", asm["amdgcn"])[1])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def limits() -> dict[tuple[str, str], int]:
    """(kernel, target) -> bytes of spills that are known; 0 elsewhere."""
    lines = [line.rsplit(maxsplit=2) for line in LIMITS.read_text().splitlines() if line and line[0] != "#"]
    return {(kernel, target): int(count) for kernel, target, count in lines}


def main() -> int:
    allowed, bad = limits(), 0
    for target in sys.argv[1:] or IN_CI:
        for kernel, spill, shared in compiled(target):
            limit = allowed.get((kernel, target), 0)
            bad += spill != limit or shared > SHARED_MEMORY[TARGETS[target].backend]
            note = "" if spill == limit else f", {limit} are recorded in {LIMITS.name}"
            print(f"{target} {kernel}: {spill} bytes spilled{note}, {shared} bytes shared", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
