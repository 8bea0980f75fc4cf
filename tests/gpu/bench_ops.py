"""Times of the GPU ops beside the device's own ceilings.

python tests/gpu/bench_ops.py [decode|ended|pages|prefill|rows|linear|gated|codes|adapters|sample ...]

Each op is captured in a graph and its replays are timed by events, the median of several; the host has no part in it.
Bytes are the fewest that the op must move, operations the fewest it must do; shapes are those of Llama-3.1-8B (32 query
and 8 kv heads of 128, width 4096) unless the line says otherwise. Inputs are random normal, in bfloat16.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from batchinfer.models.lora import Factors, Grouped, Stacked
from batchinfer.ops import AttentionInput, Rope, SampleInput
from batchinfer.ops.device import DeviceOps
from batchinfer.ops.gpu import GpuOps, open_gpu
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.quantized import FLOAT8

BF16 = torch.bfloat16
PAGE = 16


def seconds(op: Callable[[], object], calls: int = 4, repeats: int = 9) -> float:
    """Median time of one call, from replays of a graph of ``calls`` of them."""
    op()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            op()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def line(name: str, time: float, *, bytes: float = 0, flops: float = 0, copy: float = 0) -> None:
    rate = f"{bytes / time / 1e9:7.0f} GB/s" if bytes else f"{flops / time / 1e12:7.0f} TFLOP/s" if flops else ""
    share = f"{bytes / time / copy:5.0%} of copy" if bytes and copy else ""
    print(f"{name:52s} {time * 1e6:9.1f} us  {rate:16s} {share}", flush=True)


def copy_rate() -> float:
    """Bytes a second, read and written, of the better of two device-to-device copies of 4 GiB: the runtime's (copy_),
    and a kernel's (an element-wise product)."""
    a = torch.randn(2**31, device="cuda", dtype=BF16)
    b = torch.empty_like(a)
    runtime, kernel = seconds(lambda: b.copy_(a)), seconds(lambda: torch.mul(a, 2, out=b))
    rates = [2 * a.nbytes / time for time in (runtime, kernel)]
    print(f"device-to-device, read + written: copy {rates[0] / 1e9:.0f} GB/s, kernel {rates[1] / 1e9:.0f} GB/s")
    return max(rates)


class Step:
    """A step's tensors: sequences of (tokens, keys), pages in random order, whose caches have the dtype ``kept``. Each
    ``sharers`` sequences have their first ``shared`` positions in the same pages."""

    def __init__(
        self,
        gpu: GpuOps,
        lengths: list[tuple[int, int]],
        heads: int,
        kv_heads: int,
        width: int,
        sharers: int = 1,
        shared: int = 0,
        kept: torch.dtype = BF16,
        page: int = PAGE,
    ):
        pages_of = [-(-n // page) for _, n in lengths]
        pages, tokens = sum(pages_of), sum(t for t, _ in lengths)
        order = torch.randperm(pages, dtype=torch.int32)
        table = torch.zeros(len(lengths), max(pages_of), dtype=torch.int32)
        used = 0
        for i, count in enumerate(pages_of):
            table[i, :count] = order[used : used + count]
            used += count
        for i in range(len(lengths)):
            table[i, : shared // page] = table[i // sharers * sharers, : shared // page]
        starts = torch.tensor([0, *(t for t, _ in lengths)]).cumsum(0)
        self.inputs = AttentionInput(
            starts.int().cuda(),
            torch.tensor([n for _, n in lengths], dtype=torch.int32).cuda(),
            torch.arange(len(lengths), dtype=torch.int32).cuda(),
            table.cuda(),
        )
        caches = (torch.randn(pages, kv_heads, page, width, device="cuda", dtype=BF16) for _ in range(2))
        self.k, self.v = (cache.to(kept) for cache in caches)
        self.q = torch.randn(tokens, heads, width, device="cuda", dtype=BF16)
        self.out, self.lse = torch.empty_like(self.q), torch.empty(tokens, heads, device="cuda")
        self.gpu = gpu
        self.plan = gpu.plan_attention(self.inputs, heads, self.k)
        positions = sum(n for _, n in lengths) - (len(lengths) - -(-len(lengths) // sharers)) * shared
        self.bytes = 2 * positions * kv_heads * width * kept.itemsize + 2 * self.q.numel() * 2
        pairs = sum(t * (n - t) + t * (t + 1) / 2 for t, n in lengths)
        self.flops = 4 * pairs * heads * width

    def attend(self) -> None:
        self.gpu.attention(self.q, self.k, self.v, self.plan, self.q.shape[2] ** -0.5, self.out, self.lse)


def bench_decode(gpu: GpuOps, copy: float) -> None:
    for name, heads, kv_heads, width in (("8B", 32, 8, 128), ("1B", 32, 8, 64), ("Qwen3-0.6B", 16, 8, 128)):
        for context in (1024, 2048, 4096, 8192) if name == "8B" else (1024, 4096):
            step = Step(gpu, [(1, context)] * 256, heads, kv_heads, width)
            line(f"decode {name}, 256 x {context}", seconds(step.attend), bytes=step.bytes, copy=copy)
            step = Step(gpu, [(1, context)] * 256, heads, kv_heads, width, kept=FLOAT8)
            line(f"  the same, fp8 cache, 256 x {context}", seconds(step.attend), bytes=step.bytes, copy=copy)
    mixed = [(1, 1 + (7919 * i) % 8192) for i in range(256)]
    step = Step(gpu, mixed, 32, 8, 128)
    line("decode 8B, 256 x 1..8192", seconds(step.attend), bytes=step.bytes, copy=copy)
    for count, context in ((1024, 512), (16, 8192), (1, 131072)):
        step = Step(gpu, [(1, context)] * count, 32, 8, 128)
        line(f"decode 8B, {count} x {context}", seconds(step.attend), bytes=step.bytes, copy=copy)
    for count, own, sharers, shared in ((1000, 128, 1000, 2048), (1024, 140, 16, 288)):
        for kind, together in ((f"{shared} shared by {sharers}", sharers), ("not shared", 1)):
            step = Step(gpu, [(1, shared + own)] * count, 32, 8, 128, together, shared)
            line(f"decode 8B, {count} x {shared + own}, {kind}", seconds(step.attend), bytes=step.bytes, copy=copy)
    step = Step(gpu, [(1, 16)] * 4, 32, 8, 128)
    line("decode 8B, 4 x 16 (launches alone)", seconds(step.attend, 50))
    step = Step(gpu, mixed, 32, 8, 128)
    line("plan_attention, 256 sequences", seconds(lambda: gpu.plan_attention(step.inputs, 32, step.k), 50))


def bench_ended(gpu: GpuOps) -> None:
    """What a step saves where one sequence in 200 has ended (190 tokens are a chat's answer), and what it costs to see
    it: by one kernel, and by torch's."""
    for count, length, sharers, shared in ((256, 640, 1, 0), (512, 640, 1, 0), (1000, 2176, 1000, 2048)):
        step = Step(gpu, [(1, length)] * count, 32, 8, 128, sharers, shared)
        name = f"decode 8B, {count} x {length}" + (f", {shared} shared" if shared else "")
        line(name, seconds(step.attend))
        step.inputs.kv_len[::200] *= -1
        gpu.plan_attention(step.inputs, 32, step.k)
        line(f"  the same, {len(range(0, count, 200))} of them ended", seconds(step.attend))
    # All are -1, the last tokens too, so that every call finds unknown ids.
    shapes = [(512,)] * 4 + [(512, 4)]
    rows = [torch.full(shape, -1, dtype=torch.int32, device="cuda") for shape in shapes]
    for kind, op in (("one kernel", gpu._feed_back), ("torch", partial(DeviceOps._feed_back, gpu))):
        line(f"feed_back, 512 rows, {kind}", seconds(partial(op, *rows), 50))


def bench_pages(gpu: GpuOps, copy: float) -> None:
    """What engine.page_size costs: attention over pages of several sizes, and copies of such pages."""
    for page in (16, 32, 64, 128, 256):
        for context in (1024, 8192):
            step = Step(gpu, [(1, context)] * 256, 32, 8, 128, page=page)
            line(f"decode, 256 x {context}, pages of {page}", seconds(step.attend), bytes=step.bytes, copy=copy)
        step = Step(gpu, [(8192, 8192)], 32, 8, 128, page=page)
        line(f"prefill, 1 x 8192, pages of {page}", seconds(step.attend), flops=step.flops)
        count = 15 * 64  # the first step of 16 samples for each of 64 prompts
        k, v = (torch.randn(2 * count, 8, page, 128, device="cuda", dtype=BF16) for _ in range(2))
        source, target = torch.randperm(2 * count, device="cuda", dtype=torch.int32).chunk(2)
        time = seconds(lambda k=k, v=v, s=source, t=target: gpu.copy_pages(k, v, s, t))
        line(f"copy_pages, {count} pages of {page}", time, bytes=2 * k.nbytes, copy=copy)


def bench_prefill(gpu: GpuOps) -> None:
    cases = [
        ("8B, 1 x 8192", [(8192, 8192)], 32, 8, 128),
        ("8B, 4 x 2048", [(2048, 2048)] * 4, 32, 8, 128),
        ("8B, 16 x 512", [(512, 512)] * 16, 32, 8, 128),
        ("8B, 1024 after 7168", [(1024, 8192)], 32, 8, 128),
        ("8B, 8 x 1024 after 7168", [(1024, 8192)] * 8, 32, 8, 128),
        ("8B, 1 x 32768", [(32768, 32768)], 32, 8, 128),
        ("32 heads of 128, no sharing, 1 x 8192", [(8192, 8192)], 32, 32, 128),
        ("1B, 1 x 8192", [(8192, 8192)], 32, 8, 64),
    ]
    for name, lengths, heads, kv_heads, width in cases:
        step = Step(gpu, lengths, heads, kv_heads, width)
        line(f"prefill {name}", seconds(step.attend), flops=step.flops)
        if name.endswith("1 x 8192"):
            step = Step(gpu, lengths, heads, kv_heads, width, kept=FLOAT8)
            line("  the same, fp8 cache", seconds(step.attend), flops=step.flops)
    q, k, v = (torch.randn(1, heads, 8192, 128, device="cuda", dtype=BF16) for heads in (32, 32, 32))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                time = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
            except RuntimeError as e:
                print(f"torch {backend.name}: {str(e)[:80]}")
                continue
        line(f"  for comparison: torch {backend.name}, 1 x 8192", time, flops=4 * 8192 * 8193 / 2 * 32 * 128)


def bench_rows(gpu: GpuOps, copy: float) -> None:
    tokens, width, inner = 16384, 4096, 14336
    x, residual, out = (torch.randn(tokens, width, device="cuda", dtype=BF16) for _ in range(3))
    weight = torch.randn(width, device="cuda")
    row = tokens * width * 2
    line(
        "rms_norm + residual, 16384 x 4096",
        seconds(lambda: gpu.rms_norm(x, weight, 1e-5, out, residual)),
        bytes=4 * row,
        copy=copy,
    )
    gate_up, product = torch.randn(tokens, 2 * inner, device="cuda", dtype=BF16), x.new_empty(tokens, inner)
    line(
        "silu_mul, 16384 x 14336",
        seconds(lambda: gpu.silu_mul(gate_up, product)),
        bytes=3 * tokens * inner * 2,
        copy=copy,
    )
    qkv = torch.randn(tokens, 48 * 128, device="cuda", dtype=BF16)
    k, v = (torch.empty(tokens // PAGE, 8, PAGE, 128, device="cuda", dtype=BF16) for _ in range(2))
    q = torch.empty(tokens, 32, 128, device="cuda", dtype=BF16)
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda") % 8192
    kv_index = torch.randperm(tokens, device="cuda")
    rope = Rope(torch.randn(8192, 128, device="cuda"))
    line(
        "rope_and_cache, 16384 tokens",
        seconds(lambda: gpu.rope_and_cache(qkv, positions, kv_index, rope, k, v, q)),
        bytes=2 * qkv.numel() * 2,
        copy=copy,
    )
    k8, v8 = k.to(FLOAT8), v.to(FLOAT8)
    line(
        "  the same, fp8 cache",
        seconds(lambda: gpu.rope_and_cache(qkv, positions, kv_index, rope, k8, v8, q)),
        bytes=2 * qkv.numel() * 2 - 2 * k8.numel(),
        copy=copy,
    )
    table = torch.randn(128_256, width, device="cuda", dtype=BF16)
    ids = torch.randint(128_256, (tokens,), device="cuda", dtype=torch.int32)
    line("embed, 16384 x 4096", seconds(lambda: gpu.embed(ids, table, out)), bytes=2 * row, copy=copy)
    line(
        "rms_norm + residual, 64 x 4096",
        seconds(lambda: gpu.rms_norm(x[:64], weight, 1e-5, out[:64], residual[:64]), 50),
    )
    head = gpu.pack_weight(table)
    logits = torch.empty(256, 128_256, device="cuda")
    line(
        "linear to float32 logits, 256 x 128256",
        seconds(lambda: gpu.linear(x[:256], head, logits)),
        flops=2 * 256 * 128_256 * width,
    )


def bench_linear(gpu: GpuOps, copy: float) -> None:
    """The four products of a layer, for few tokens (the weights are read once) and for many. Each call takes other
    weights, as a model's layers do: 16 calls of the smallest read 0.5 GB, ten times the L2."""
    for outputs, depth in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        weights = [torch.randn(outputs, depth, device="cuda", dtype=BF16) for _ in range(16)]
        for tokens in (16, 64, 256, 1024, 8192):
            x = torch.randn(tokens, depth, device="cuda", dtype=BF16)
            out = torch.empty(tokens, outputs, device="cuda", dtype=BF16)

            def all_layers(x: torch.Tensor = x, out: torch.Tensor = out, weights: list = weights) -> None:
                for weight in weights:
                    gpu.linear(x, weight, out)

            time = seconds(all_layers, 1) / len(weights)
            bytes = 2 * (outputs * depth + tokens * (outputs + depth))
            flops = 2 * tokens * outputs * depth / time / 1e12
            line(f"linear {tokens} x {depth} -> {outputs}, {flops:.0f} TFLOP/s", time, bytes=bytes, copy=copy)


def bench_gated(gpu: GpuOps) -> None:
    """An MLP's first half: the vendor's product and silu_mul, and both in one. Weights come from memory: there are more
    of them than the L2 cache holds. The two take turns, three times."""
    shapes = (("Llama-3.1-8B", 4096, 14336), ("Llama-3.2-1B", 2048, 8192), ("Qwen3-0.6B", 1024, 3072))
    for name, depth, width in shapes:
        copies = range(-(-(400 << 20) // (4 * depth * width)))
        weights = [torch.randn(2 * width, depth, device="cuda", dtype=BF16) / depth**0.5 for _ in copies]
        for rows in (192, 256, 320, 384, 512, 640, 768, 1024, 2048, 8192):
            x = torch.randn(rows, depth, device="cuda", dtype=BF16)
            sums, out = x.new_empty(rows, 2 * width), x.new_empty(rows, width)

            def apart(x: Tensor = x, sums: Tensor = sums, out: Tensor = out, weights: list[Tensor] = weights) -> None:
                for weight in weights:
                    gpu.linear(x, weight, sums)
                    gpu.silu_mul(sums, out)

            def together(
                x: Tensor = x, sums: Tensor = sums, out: Tensor = out, weights: list[Tensor] = weights
            ) -> None:
                for weight in weights:
                    gpu.gated_linear(x, weight, out, sums)

            calls, flops = max(1, 4096 // rows), 4 * rows * depth * width
            taken = [[seconds(op, calls, 3) / len(weights) for op in (apart, together)] for _ in range(3)]
            for kind, times in zip(("apart", "together"), zip(*taken, strict=True), strict=True):
                line(f"gated_linear, {name}, {rows} rows, {kind}", statistics.median(times), flops=flops)


def bench_codes(gpu: GpuOps, copy: float) -> None:
    """The widest product of a layer with weights that stay codes; the bytes are those of the codes. From 200 tokens
    on they are dequantised first (ops/triton/grouped.py)."""
    outputs, depth = 28672, 4096
    for name, bits, group in (("int4, groups of 128", 4, 128), ("int8", 8, depth), ("float8", 0, depth)):
        if bits:
            codes = torch.randint(2**bits, (outputs, depth), dtype=torch.uint8)
        else:
            codes = torch.randn(outputs, depth).to(torch.float8_e4m3fn)
        scales = torch.rand(outputs, depth // group)
        weights = [gpu.pack_weight(GroupQuantized(codes, scales, group, bits=bits or 8)) for _ in range(8)]
        for tokens in (1, 16, 64, 128, 192, 256, 1024):
            x = torch.randn(tokens, depth, device="cuda", dtype=BF16)
            out = torch.empty(tokens, outputs, device="cuda", dtype=BF16)

            def all_layers(x: torch.Tensor = x, out: torch.Tensor = out, weights: list = weights) -> None:
                for weight in weights:
                    gpu.linear(x, weight, out)

            time = seconds(all_layers, 1) / len(weights)
            bytes = weights[0].nbytes + 2 * tokens * (outputs + depth)
            flops = 2 * tokens * outputs * depth / time / 1e12
            line(f"codes {name}, {tokens} x {depth} -> {outputs}, {flops:.0f} TFLOP/s", time, bytes=bytes, copy=copy)


def bench_adapters(gpu: GpuOps) -> None:
    """What adapters of rank 16 add to a product of 4096 x 4096: in a graph all rows through all of them, and launched
    from the host, as it was, group by group of rows."""
    for count, tokens in itertools.product((1, 4, 16, 64), (16, 256, 8192)):
        x, out = (torch.randn(tokens, 4096, device="cuda", dtype=BF16) for _ in range(2))
        factors = [Factors(torch.randn(16, 4096), torch.randn(4096, 16)) for _ in range(count)]
        rows = torch.arange(tokens, device="cuda", dtype=torch.int32) % count
        stacked, grouped = Stacked.of(factors, gpu, BF16), Grouped.of(factors, gpu, BF16)
        line(f"{count} adapters, {tokens} rows", seconds(lambda s=stacked, x=x, r=rows, o=out: s.add(gpu, x, r, o)))
        groups = tuple((i, (rows == i).nonzero()[:, 0]) for i in range(min(count, tokens)))
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            grouped.add(gpu, x, groups, out)
            torch.cuda.synchronize()
        line("  for comparison: group by group", time.perf_counter() - start)


def bench_sample(gpu: GpuOps, copy: float, rows: int, vocab: int = 128_256) -> None:
    logits = 3 * torch.randn(rows, vocab, device="cuda")

    def inputs(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> SampleInput:
        def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device="cuda")

        return SampleInput(
            full(temperature),
            full(top_k, torch.int32),
            full(top_p),
            full(min_p),
            torch.arange(rows, device="cuda"),
            full(7, torch.int32),
        )

    for name, given in {
        "greedy": inputs(0),
        "temperature 1": inputs(1),
        "min_p 0.05": inputs(1, min_p=0.05),
        "top_k 50": inputs(1, 50),
        "top_p 0.9": inputs(1, top_p=0.9),
        "top_k 50, top_p 0.9": inputs(1, 50, 0.9),
    }.items():
        time = seconds(lambda given=given: gpu.sample(logits, given), 2)
        line(f"sample {rows} x {vocab}, {name}", time, bytes=rows * vocab * 4, copy=copy)


def main() -> None:
    gpu = open_gpu()
    wanted = sys.argv[1:] or [
        "decode",
        "ended",
        "pages",
        "prefill",
        "rows",
        "linear",
        "gated",
        "codes",
        "adapters",
        "sample",
    ]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    copy = copy_rate()
    if "decode" in wanted:
        bench_decode(gpu, copy)
    if "ended" in wanted:
        bench_ended(gpu)
    if "pages" in wanted:
        bench_pages(gpu, copy)
    if "prefill" in wanted:
        bench_prefill(gpu)
    if "rows" in wanted:
        bench_rows(gpu, copy)
    if "linear" in wanted:
        bench_linear(gpu, copy)
    if "gated" in wanted:
        bench_gated(gpu)
    if "codes" in wanted:
        bench_codes(gpu, copy)
    if "adapters" in wanted:
        bench_adapters(gpu)
    if "sample" in wanted:
        for rows in (256, 16):
            bench_sample(gpu, copy, rows)


if __name__ == "__main__":
    main()
