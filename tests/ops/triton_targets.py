"""Compile the Triton kernels for GPUs that are not here, as the ops would launch them, and hold what they need of a
multiprocessor against what is known.

python tests/ops/triton_targets.py [TARGET ...]      needs neither a GPU nor a driver; prints what each kernel needs
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from ops.group_cases import draw

from batchinfer.ops import AttentionInput, Clamp, Experts, HeadNorm, Rope, SampleInput
from batchinfer.ops.quantized import FLOAT8
from batchinfer.ops.triton.compiling import CompilingOps
from batchinfer.ops.triton.grouped import FROM_DENSE, Groups
from batchinfer.ops.triton.targets import TARGETS


@dataclass(frozen=True)
class Limits:
    """``shared``: bytes of shared memory that a program may take, for sm_80 those of compute capability 8.6, which has
    the least of the 8s. ``spills``: bytes of registers that a thread of a kernel may spill; of one that is not listed,
    none. Counted with Triton 3.9.0."""

    shared: int
    spills: Mapping[str, int] = field(default_factory=dict)


LIMITS = {
    "sm_75": Limits(64 << 10),
    "sm_80": Limits(99 << 10, {"attend prefill 64": 8, "attend prefill 128 float8": 8}),
    "sm_90": Limits(227 << 10, {"choose": 32}),
    "gfx90a": Limits(64 << 10),
    "gfx942": Limits(64 << 10),
    "gfx1100": Limits(64 << 10),
}

IN_CI = ("sm_80", "sm_90", "gfx90a", "gfx942", "gfx1100")


@dataclass(frozen=True)
class Need:
    """What a compiled kernel takes: bytes that a thread spills, bytes of shared memory of a program."""

    spilled: int
    shared: int


class CompiledOps(CompilingOps):
    """``named``: name, and what Triton made of it."""

    def __init__(self, name: str) -> None:
        super().__init__(replace(TARGETS[name], shared=LIMITS[name].shared), "cpu")
        self._groups = Groups(100, self._rdna)
        self.float8 = name in ("sm_89", "sm_90")
        self.named: dict[str, Any] = {}

    def _run(self, kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
        name = kernel.__name__
        if name == "attend":
            codes = " float8" if args[1].dtype is torch.uint8 else ""
            name = f"attend {'decode' if options['SPLIT'] else 'prefill'} {options['WIDTH']}{codes}"
        if name.startswith("group_"):
            name = f"{name} {'float' if options['FLOAT8'] else 'int'}{options['BITS']}"
        if name.endswith("products") or name.startswith("group_products"):
            name = f"{name} {options['ROWS']}{' clamped' * options.get('CLAMPED', False)}"
        if name == "route" and options["KEPT"] < options["GROUPS"]:
            name = "route of groups"
        if name not in self.named:
            self.named[name] = kernel.warmup(*args, grid=grid, **options)


def call_all(ops: CompiledOps, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every op at the sizes of a model, attention for two widths, one of them with a soft cap and with a cache of e4m3,
    a mixture of experts for few and for many tokens, products with codes of 4 and of 8 bits."""
    attend(ops, 9, 3, 64, dtype, softcap=50.0)
    attend(ops, 32, 8, 128, dtype, softcap=0.0)
    if dtype is torch.bfloat16:
        attend(ops, 32, 8, 128, dtype, softcap=0.0, kept=FLOAT8)
    words, x = torch.zeros(3, dtype=torch.int32), torch.zeros(3, 4096, dtype=dtype)
    qkv, q = torch.zeros(3, (32 + 2 * 8) * 128, dtype=dtype), torch.zeros(3, 32, 128, dtype=dtype)
    cache = torch.zeros(4, 8, 16, 128, dtype=dtype)
    norm = HeadNorm(torch.zeros(128), torch.zeros(128), 1e-6)
    ops.rope_and_cache(qkv, words, words.long(), Rope(torch.zeros(50, 128)), cache, cache, q, norm)
    ops.copy_pages(cache, cache, words, words)
    ops.embed(words, x, torch.zeros_like(x), 2.0)
    ops.rms_norm(x, torch.zeros(4096), 1e-5, torch.zeros_like(x), torch.zeros_like(x))
    ops.layer_norm(x, torch.zeros(4096), torch.zeros(4096), 1e-5, torch.zeros_like(x), torch.zeros_like(x))
    ops.gelu_mul(torch.zeros(3, 8192, dtype=dtype), torch.zeros_like(x))
    mix(ops, 3, dtype)
    mix(ops, 900, dtype)  # 450 for an expert
    biases = {"gate_up_bias": torch.zeros(16, 2 * 768), "down_bias": torch.zeros(16, 2048)}
    mix(ops, 3, dtype, clamp=Clamp(1.702, 7.0), **biases)
    mix(ops, 3, dtype, scores="sigmoid", correction=torch.zeros(16), groups=4, kept_groups=2)
    for rows in (3, 100, FROM_DENSE):
        multiply(ops, rows, "int4 with zeros", dtype)
    for rows in (3, FROM_DENSE):
        multiply(ops, rows, "float8 in blocks", dtype)
    if ops.float8:
        codes = torch.zeros(3, 4096, dtype=torch.float8_e4m3fn)
        ops._groups.encode(ops._launch, x, codes, torch.zeros(3, 1))
    numbers, start = torch.zeros(3), torch.zeros(4, dtype=torch.int32)
    inputs = SampleInput(
        *(numbers, words, numbers, numbers, words.long(), words),
        penalties=(numbers,) * 3,
        history_ids=words,
        history_start=start,
        history_prompt=words,
        banned_ids=words,
        banned_start=start,
        num_logprobs=words + 3,
    )
    ops.sample(torch.zeros(3, 128_256), inputs)


def mix(ops: CompiledOps, tokens: int, dtype: torch.dtype, **options: Any) -> None:
    gate_up, down = torch.zeros(2 * 768, 2048, dtype=dtype), torch.zeros(2048, 768, dtype=dtype)
    experts = Experts((gate_up,) * 16, (down,) * 16, (768,) * 16, top_k=8, renormalise=True, **options)
    x = torch.zeros(tokens, 2048, dtype=dtype)
    ops.mix_experts(x, torch.zeros(tokens, 16), experts, x)


def multiply(ops: CompiledOps, rows: int, kind: str, dtype: torch.dtype) -> None:
    weight = ops.pack_weight(draw(kind, 256, 4096))
    ops.linear(torch.zeros(rows, 4096, dtype=dtype), weight, torch.zeros(rows, 256, dtype=dtype), torch.zeros(256))


def attend(
    ops: CompiledOps,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    softcap: float,
    kept: torch.dtype | None = None,
) -> None:
    words = torch.zeros(3, dtype=torch.int32)
    cache = torch.zeros(4, kv_heads, 16, width).to(kept or dtype)
    q, out = torch.zeros(2, 3, heads, width, dtype=dtype)
    inputs = AttentionInput(torch.zeros(4, dtype=torch.int32), words, words, torch.zeros(3, 200, dtype=torch.int32))
    plan = ops.plan_attention(inputs, heads, cache)
    ops.attention(q, cache, cache, plan, 0.1, out, torch.zeros(3, heads), softcap)


def compiled(name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Every kernel for the target. Triton keeps what it compiles in $TRITON_CACHE_DIR."""
    ops = CompiledOps(name)
    call_all(ops, dtype)
    return ops.named


def need(kernel: Any) -> Need:
    return Need(spilled(kernel.asm), kernel.metadata.shared)


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


def main() -> int:
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for name in sys.argv[1:] or IN_CI:
            limits = LIMITS[name]
            for kernel, result in compiled(name).items():
                it, limit = need(result), limits.spills.get(kernel, 0)
                bad += it.spilled > limit or it.shared > limits.shared
                print(f"{name} {kernel}: {it.spilled} of {limit} bytes spilled, {it.shared} shared", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
