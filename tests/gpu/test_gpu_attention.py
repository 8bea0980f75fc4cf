"""Paged attention on the GPU against the reference in float64: mixed batches, page boundaries, long contexts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from gpu.backend import DEVICE, SYCL, TRITON, put, sized

from batchinfer.ops import AttentionInput
from batchinfer.ops.gpu import GpuOps
from batchinfer.ops.reference import ReferenceOps

TRUTH = ReferenceOps(torch.float64)
ROUNDOFF = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
EACH_KERNEL = [
    ((8, 2, 128), torch.bfloat16),
    ((9, 3, 64), torch.float16),
    ((6, 2, 96), torch.bfloat16),
    ((4, 2, 64), torch.float32),
]
SHAPES = [(32, 8, 128), (9, 3, 64), (16, 8, 128), (8, 8, 64), (20, 1, 128), (7, 1, 64), (71, 1, 64)]


@dataclass
class Case:
    """One step on the host. Pages that no sequence owns, and places after a sequence's end, hold NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    inputs: AttentionInput
    window: int = 0
    softcap: float = 0.0

    def truth(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        lse = torch.zeros(self.q.shape[:2], dtype=torch.float64)
        plan = TRUTH.plan_attention(self.inputs, self.q.shape[1], self.k, self.window)
        TRUTH.attention(self.q, self.k, self.v, plan, scale, out, lse, self.softcap)
        return out, lse

    def run(self, gpu, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = put(self.q), put(self.k), put(self.v)
        out = torch.full_like(q, torch.nan)
        lse = torch.full(q.shape[:2], torch.nan, device=DEVICE)
        plan = gpu.plan_attention(self.on_device(), q.shape[1], k, self.window)
        gpu.attention(q, k, v, plan, scale, out, lse, self.softcap)
        return out.cpu(), lse.cpu()

    def on_device(self) -> AttentionInput:
        i = self.inputs
        return AttentionInput(put(i.q_start), put(i.kv_len), put(i.slot), put(i.page_table), i.decode_only)


def make_case(shape, dtype, lengths: list[tuple[int, int]], page_size: int = 16, seed: int = 0, slots: int = 0) -> Case:
    """``lengths``: (tokens in the step, keys) of each sequence."""
    random = torch.Generator().manual_seed(seed)
    heads, kv_heads, width = shape
    tokens = [t for t, _ in lengths]
    pages_of = [-(-n // page_size) for _, n in lengths]
    pages = sum(pages_of) + 3
    order = torch.randperm(pages, generator=random, dtype=torch.int32)
    slots = slots or len(lengths) + 2
    table = torch.full((slots, max(pages_of) + 1), -1, dtype=torch.int32)
    slot = torch.randperm(slots, generator=random, dtype=torch.int32)[: len(lengths)].clone()
    k = torch.full((pages, kv_heads, page_size, width), torch.nan, dtype=dtype)
    v = k.clone()
    used = 0
    for i, (_, n) in enumerate(lengths):
        mine = order[used : used + pages_of[i]]
        used += pages_of[i]
        table[slot[i], : pages_of[i]] = mine
        for cache in (k, v):
            rows = torch.randn(kv_heads, n, width, generator=random).to(dtype)
            padded = torch.full((kv_heads, pages_of[i] * page_size, width), torch.nan, dtype=dtype)
            padded[:, :n] = rows
            cache[mine.long()] = padded.view(kv_heads, -1, page_size, width).transpose(0, 1)
    q = torch.randn(sum(tokens), heads, width, generator=random).to(dtype)
    start = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    kv_len = torch.tensor([n for _, n in lengths], dtype=torch.int32)
    return Case(q, k, v, AttentionInput(start, kv_len, slot, table))


def draw_lengths(seed: int, count: int, longest: int) -> list[tuple[int, int]]:
    """Decodes, whole prompts, later chunks, page boundaries and empty sequences, in any order."""
    random = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=random))

    lengths = []
    for _ in range(count):
        n = [1 + below(longest), 16 * (1 + below(longest // 16)), 1 + below(40)][below(3)]
        tokens = [1, 1, n, 1 + below(n), 0][below(5)]
        lengths.append((tokens, n if tokens else below(2) * n))
    return [*lengths, (1, 5)]


def assert_attention(case: Case, gpu, scale: float) -> None:
    out, lse = case.run(gpu, scale)
    want, want_lse = case.truth(scale)
    # The weights are rounded to the dtype (values are of size 1 to 4), then the result; before that the scores, in
    # float32, where a cap is given because they reach it: in Triton's kernels by half of 2**-22, what a GPU's
    # exponential is off.
    error = ((out.double() - want).abs() / (2 + 2 * want.abs())).max().item()
    assert error <= ROUNDOFF[out.dtype] + case.softcap * (2.0**-23 if TRITON else 2.0**-24), error  # false for NaN
    lse_error = (lse.double() - want_lse).abs().max().item()
    assert lse_error <= 1e-4, lse_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_mixed_batches(gpu, shape, dtype, seed):
    page_size = 16 << seed
    lengths = draw_lengths(seed + 10 * shape[0], *sized((12, 700), (5, 150)))
    assert_attention(make_case(shape, dtype, lengths, page_size, seed), gpu, shape[2] ** -0.5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 2, width), torch.float32) for width in (16, 64, 80, 128, 256)]
    + [((6, 2, width), torch.bfloat16) for width in (32, 96, 112, 256)]
    + [((4, 4, 48), torch.float16)],
)
def test_other_widths_and_float32(gpu, shape, dtype):
    assert_attention(make_case(shape, dtype, draw_lengths(shape[2], 10, 300), 32, 1), gpu, shape[2] ** -0.5)


@pytest.mark.parametrize(("shape", "dtype"), EACH_KERNEL)
def test_a_step_may_be_filled_up(gpu, shape, dtype):
    """With tokens that no sequence has, at its end, and sequences without tokens. The others' results are the same."""
    case = make_case(shape, dtype, [(1, 40), (1, 17), (30, 90), (5, 5)], slots=9)
    want, want_lse = case.run(gpu, 0.1)
    i, more = case.inputs, 11
    end = int(i.q_start[-1])
    nobody = torch.zeros(5, dtype=torch.int32)
    starts = torch.cat([i.q_start, torch.full((5,), end, dtype=torch.int32)])
    filled = AttentionInput(starts, torch.cat([i.kv_len, nobody]), torch.cat([i.slot, nobody]), i.page_table)
    q = torch.cat([case.q, torch.full((more, *case.q.shape[1:]), torch.nan, dtype=dtype)])
    out, lse = replace(case, q=q, inputs=filled).run(gpu, 0.1)
    assert torch.equal(out[:end], want)
    assert torch.equal(lse[:end], want_lse)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("shape", "dtype"), EACH_KERNEL)
def test_those_who_have_ended(gpu, shape, dtype, window):
    """Get some numbers, and change nobody else's; alone, in a group that shares its beginning, and all of a group."""
    common = [40] * 12 + [0] * 5
    case = make_case(
        shape, dtype, [(1, 641 + 97 * i) for i in range(12)] + [(1, 1), (1, 16), (1, 90), (30, 40), (1, 9)]
    )
    together, _ = share_beginnings(case, common)
    together.window = window
    want, want_lse = together.run(gpu, 0.1)
    tokens = together.inputs.q_start[:-1].long()
    for ended in ([3], [0, 11], list(range(12)), [5, 12, 13, 14, 16]):
        kv_len = together.inputs.kv_len.clone()
        kv_len[ended] *= -1
        out, lse = replace(together, inputs=replace(together.inputs, kv_len=kv_len)).run(gpu, 0.1)
        others = torch.ones(len(out), dtype=torch.bool)
        others[tokens[ended]] = False
        assert torch.equal(out[others], want[others])
        assert torch.equal(lse[others], want_lse[others])
        assert torch.isfinite(out.float()).all()
        assert torch.isfinite(lse).all()
    # Of the 90 positions of one that shares nothing, those that nobody may read then.
    unread = torch.arange(48, 90)
    pages = together.inputs.page_table[together.inputs.slot[14], unread // 16].long()
    for cache in (together.k, together.v):
        cache[pages, :, unread % 16] = torch.nan
    assert torch.isnan(together.run(gpu, 0.1)[0][tokens[14]].float()).any()
    kv_len = together.inputs.kv_len.clone()
    kv_len[14] *= -1
    out, lse = replace(together, inputs=replace(together.inputs, kv_len=kv_len)).run(gpu, 0.1)
    assert torch.isfinite(out.float()).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("shape", [(32, 8, 128), (9, 3, 64), (20, 1, 128)])
def test_split_boundaries(gpu, shape):
    lengths = [(1, n) for n in (1, 15, 16, 17, 1023, 1024, 1025, 2047, 2048, 2049, 3000, 5000)]
    assert_attention(make_case(shape, torch.bfloat16, lengths, 64), gpu, shape[2] ** -0.5)


@pytest.mark.parametrize("shape", [(8, 2, 128), (4, 4, 64)])
def test_long_context(gpu, shape):
    lengths = sized([(1, 100_000), (200, 100_001), (1, 131_072), (3, 9)], [(1, 5000), (20, 3001), (1, 4096), (3, 9)])
    assert_attention(make_case(shape, torch.bfloat16, lengths, 256), gpu, shape[2] ** -0.5)


def test_long_context_float32(gpu):
    longest = sized(100_000, 4000)
    assert_attention(make_case((2, 1, 64), torch.float32, [(1, longest), (2, longest // 2)], 16), gpu, 0.125)


@pytest.mark.parametrize("scale", [0.02, 4.0])
def test_extreme_scores(gpu, scale):
    """A scale of 4 makes scores of +-150: one key takes all, and the running maximum must move."""
    assert_attention(make_case((8, 2, 128), torch.float16, [(1, 900), (90, 200), (300, 300)]), gpu, scale)


@pytest.mark.parametrize("window", [1, 16, 33, 100, 1000])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 2, 128), torch.bfloat16),
        ((9, 3, 64), torch.float16),
        ((20, 1, 64), torch.bfloat16),
        ((4, 2, 256), torch.bfloat16),
        ((3, 1, 64), torch.float32),
    ],
)
@pytest.mark.feature("engine", "sliding windows in the CUDA attention kernels")
@pytest.mark.hardware("sliding windows, soft caps")
def test_windows(gpu, shape, dtype, window):
    lengths = [*draw_lengths(window, *sized((12, 700), (5, 200))), (1, 17), (90, 300), (1, 129)]
    assert_attention(replace(make_case(shape, dtype, lengths, 32), window=window), gpu, shape[2] ** -0.5)


@pytest.mark.parametrize("window", [900, 1024, 1025, 2500])
def test_windows_over_splits(gpu, window):
    """The split counts from the window's start, and what others read together is not looked for."""
    lengths = [(1, n) for n in (899, 900, 901, 1040, 2048, 2049, 3000)] + [(5, 2600)]
    case = replace(make_case((8, 2, 128), torch.bfloat16, lengths, 64), window=window)
    assert_attention(case, gpu, 0.1)
    together, _ = share_beginnings(case, [900 // 64 - 1] * 7 + [0])
    assert_attention(together, gpu, 0.1)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("softcap", "scale"), [(50.0, 1.0), (2.0, 0.1)])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((8, 2, 128), torch.float16),
        ((9, 3, 64), torch.bfloat16),
        ((6, 3, 80), torch.float16),
        ((4, 4, 64), torch.float32),
    ],
)
@pytest.mark.feature("engine", "soft-capped scores in the CUDA attention kernels")
@pytest.mark.hardware("sliding windows, soft caps")
def test_soft_caps(gpu, shape, dtype, softcap, scale, window):
    lengths = draw_lengths(7, *sized((12, 700), (5, 150)))
    case = make_case(shape, dtype, [*lengths, (70, 200)])
    assert_attention(replace(case, window=window, softcap=softcap), gpu, scale)


def test_plans_with_and_without_a_window_live_side_by_side(gpu):
    case = make_case((8, 2, 64), torch.bfloat16, [(1, 200), (30, 90), (1, 7)])
    q, k, v = put(case.q), put(case.k), put(case.v)
    plans = [gpu.plan_attention(case.on_device(), 8, k, window) for window in (0, 20)]
    for plan, window in zip(plans, (0, 20), strict=True):
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
        gpu.attention(q, k, v, plan, 0.125, out, lse)
        assert torch.equal(out.cpu(), replace(case, window=window).run(gpu, 0.125)[0])


@pytest.mark.parametrize("shape", [(32, 8, 128), (9, 3, 64)])
def test_independent_of_neighbours(gpu, shape):
    """Bit for bit: alone, and among others, in another place of the batch."""
    mine = [(1, 2500), (77, 301)]
    alone = make_case(shape, torch.bfloat16, mine, seed=3)
    out, lse = alone.run(gpu, 0.1)
    for seed in range(sized(3, 1)):
        others = draw_lengths(seed, *sized((20, 3000), (6, 200)))
        crowd = make_case(shape, torch.bfloat16, others + mine, seed=seed, slots=64)
        self_start = int(crowd.inputs.q_start[len(others)])
        crowd.q[self_start:] = alone.q
        for i in range(2):
            ours, theirs = crowd.inputs.slot[len(others) + i], alone.inputs.slot[i]
            count = -(-mine[i][1] // 16)
            to = crowd.inputs.page_table[ours, :count].long()
            source = alone.inputs.page_table[theirs, :count].long()
            crowd.k[to], crowd.v[to] = alone.k[source], alone.v[source]
        crowd_out, crowd_lse = crowd.run(gpu, 0.1)
        assert torch.equal(crowd_out[self_start:], out)
        assert torch.equal(crowd_lse[self_start:], lse)


def share_beginnings(case: Case, shared: list[int]) -> tuple[Case, Case]:
    """The case with ``shared[i]`` leading pages of sequence i replaced by those of sequence 0, and the same keys and
    values without sharing: copies in pages of their own."""
    together, apart = replace(case), replace(case)
    table = case.inputs.page_table.clone()
    apart.k, apart.v = case.k.clone(), case.v.clone()
    slots = case.inputs.slot.tolist()
    for slot, pages in zip(slots, shared, strict=True):
        own, first = table[slot, :pages].long(), table[slots[0], :pages].long()
        apart.k[own], apart.v[own] = case.k[first], case.v[first]
        table[slot, :pages] = table[slots[0], :pages]
    together.inputs = replace(case.inputs, page_table=table)
    return together, apart


@pytest.mark.parametrize("shape", [(32, 8, 128), (32, 8, 64), (9, 3, 64), (16, 8, 128), (8, 8, 64), (20, 1, 128)])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.feature("engine", "CUDA attention reads a beginning that sequences share once for several of them")
@pytest.mark.hardware("beginnings that sequences share are read once")
def test_shared_beginnings(gpu, shape, page_size):
    """Groups that share all, part or nothing, prompts among them, and one that shares only some of its members."""
    pages = sized(2048, 1088 if shape == (9, 3, 64) else 576) // page_size
    few = [pages] * 5 + [pages // 2] * 2 + [0] * 2 + [pages] * 2
    common = sized([pages] * 9 + [pages // 2] * 4 + [0] * 4 + [pages, 0, pages, pages] * 2 + [pages] * 5, few)
    lengths = [(1, pages * page_size + 1 + 37 * i % 300) for i in range(len(common))]
    lengths[common.index(0)] = (1, 5)
    lengths += [(40, 90), (1, 700)]
    case = make_case(shape, torch.bfloat16, lengths, page_size, slots=40)
    together, apart = share_beginnings(case, [*common, 0, 0])
    assert_attention(together, gpu, shape[2] ** -0.5)
    assert_attention(apart, gpu, shape[2] ** -0.5)
    again, _ = together.run(gpu, 0.1)  # the counters are back at zero
    assert torch.equal(together.run(gpu, 0.1)[0], again)


@pytest.mark.feature("engine", "SYCL attention reads a beginning that sequences share once for several of them")
def test_a_group_reads_together_what_all_of_it_share(gpu):
    """With 3 heads on a kv head a tile has four sequences. SYCL takes them by fours: all share 36 pages, all but one
    do, and the rest share 33. The others take up to 16, and end a group where neighbours share less than half."""
    if not isinstance(gpu, GpuOps):
        pytest.skip("looks into the lists of the compiled kernels")
    case = make_case((9, 3, 64), torch.bfloat16, [(1, 600 + i) for i in range(10)])
    together, _ = share_beginnings(case, [36] * 4 + [36, 36, 36, 10] + [33] * 2)
    plan = gpu.plan_attention(together.on_device(), 9, put(together.k))
    sycl = SYCL or DEVICE.type == "xpu"
    shared = [36] * 4 + [0] * 4 + [33] * 2 if sycl else [36] * 7 + [0] + [33] * 2
    assert plan.tensors[7][:10].tolist() == [16 * pages for pages in shared]
    assert_attention(together, gpu, 0.1)


def parts_of(plan) -> list[list[int]]:
    """Sequence, members, number, begin, end, token, slot, length of each part of the plan: first those of a block."""
    parts, short_parts, counts = (t.cpu() for t in plan.tensors[8:11])
    return parts[: counts[0]].tolist() + short_parts[: counts[1]].tolist()


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("seed", range(3))
def test_parts_are_all_that_a_sequence_has_and_nothing_twice(gpu, seed, window):
    if not isinstance(gpu, GpuOps) or SYCL or DEVICE.type == "xpu":
        pytest.skip("looks into the lists of the CUDA kernels")
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(1, 2600, (50,), generator=random).tolist()
    lengths = [(1 if i % 9 else 3, 700 + n) for i, n in enumerate(drawn)]
    lengths[20:25] = [(1, n) for n in (1, 256, 257, 1024, 1025)]
    ended = {s for s in (2, 20, 30, 31) if lengths[s][0] == 1}
    assert len(ended) > 2
    case = make_case((32, 8, 64), torch.bfloat16, lengths)
    case.inputs.kv_len[[*ended]] *= -1
    common = torch.randint(41, 44, (50,), generator=random).tolist()
    pages = [min((n - 1) // 16, most) for (_, n), most in zip(lengths, common, strict=True)]
    together, _ = share_beginnings(case, pages)
    plan = gpu.plan_attention(together.on_device(), 32, put(together.k), window)
    table, slots = together.inputs.page_table, together.inputs.slot.tolist()
    seen: dict[int, list[tuple[int, int, int, int]]] = {}
    for first, members, number, begin, end, token, slot, length in parts_of(plan):
        assert (token, slot) == (together.inputs.q_start[first], slots[first])
        assert first in ended or length == lengths[first][1]
        for s in range(first, first + members):
            assert lengths[s][0] == 1
            seen.setdefault(s, []).append((number, begin, end, members))
            covered = slice(begin // 16, -(-end // 16))
            assert torch.equal(table[slots[s], covered], table[slot, covered])  # what they share is the same
    assert sorted(seen) == [s for s, (tokens, _) in enumerate(lengths) if tokens == 1]
    for s, parts in seen.items():
        numbers, begins, ends, _ = zip(*sorted(parts), strict=True)
        assert numbers == ((-1,) if len(parts) == 1 else tuple(range(len(parts))))
        assert begins[0] == (max(lengths[s][1] - window, 0) // 16 * 16 if window else 0)
        assert begins[1:] == ends[:-1]
        if s in ended:  # a single position, besides what others read for it
            assert [end - begin for _, begin, end, members in parts if members == 1] == [1]
        else:
            assert ends[-1] == lengths[s][1]
    assert any(members > 4 for _, members, *_ in parts_of(plan)) == (window == 0)


@pytest.mark.parametrize("shape", [(32, 8, 128), (8, 8, 64), (16, 2, 64)])
@pytest.mark.feature("engine", "CUDA attention reads what dozens of sequences share once for as many as fit a block")
def test_many_share_a_beginning(gpu, shape):
    """More than a block takes at once, of two splits or of less than a tile is worth reading together; two such groups
    beside one another that have their beginnings in common; and a group whose last block is short."""
    many = sized(70, 20)
    lengths = [(1, 1200 + 5 * i) for i in range(many)] + [(1, 200 + i) for i in range(many)]
    case = make_case(shape, torch.bfloat16, lengths)
    inner, outer, short = 1100 // 16, 140 // 16, 160 // 16
    first = many // 2
    together, _ = share_beginnings(case, [inner] * first + [outer] * (many - first) + [short] * many)
    table, slot = together.inputs.page_table, case.inputs.slot.tolist()
    for i in range(first, many):  # the second group's own, behind what both have
        table[slot[i], outer:inner] = table[slot[first], outer:inner]
    assert_attention(together, gpu, shape[2] ** -0.5)
    once, lse = together.run(gpu, 0.1)
    again, lse_again = together.run(gpu, 0.1)  # whoever adds up last, in the same order
    assert torch.equal(once, again)
    assert torch.equal(lse, lse_again)


def test_the_promise_of_decodes_alone_changes_nothing(gpu):
    case = make_case((32, 8, 128), torch.bfloat16, [(1, n) for n in (1, 17, 300, 1024, 2500)])
    want = case.run(gpu, 0.1)
    case.inputs = replace(case.inputs, decode_only=True)
    assert all(torch.equal(a, b) for a, b in zip(case.run(gpu, 0.1), want, strict=True))


@pytest.mark.hardware("steps recorded or captured, and repeated")
def test_graph_replay(real_gpu):
    """One captured step serves other lengths: nothing of the launch depends on the data."""
    shape, dtype, sizes = (32, 8, 128), torch.bfloat16, 13
    cases = [make_case(shape, dtype, draw_lengths(seed, sizes - 1, 3000), seed=seed, slots=16) for seed in range(4)]
    tokens = max(len(case.q) for case in cases)
    columns = max(case.inputs.page_table.shape[1] for case in cases)
    pages = max(len(case.k) for case in cases)
    q = torch.zeros(tokens, *shape[::2], dtype=dtype, device=DEVICE)
    k = torch.zeros(pages, shape[1], 16, shape[2], dtype=dtype, device=DEVICE)
    v, out = torch.zeros_like(k), torch.zeros_like(q)
    lse = torch.zeros(q.shape[:2], device=DEVICE)
    inputs = AttentionInput(
        *(torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in (sizes + 1, sizes, sizes, (16, columns)))
    )

    def step() -> None:
        real_gpu.attention(q, k, v, real_gpu.plan_attention(inputs, shape[0], k), 0.1, out, lse)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for case in [*cases, cases[0]]:
        i = case.inputs
        q[: len(case.q)], k[: len(case.k)], v[: len(case.v)] = put(case.q), put(case.k), put(case.v)
        inputs.q_start.copy_(i.q_start), inputs.kv_len.copy_(i.kv_len), inputs.slot.copy_(i.slot)
        inputs.page_table[:, : i.page_table.shape[1]] = put(i.page_table)
        graph.replay()
        want, want_lse = case.run(real_gpu, 0.1)
        assert torch.equal(out[: len(case.q)].cpu(), want)
        assert torch.equal(lse[: len(case.q)].cpu(), want_lse)


def test_wild_metadata_stays_inside(gpu):
    """Contradictory lengths and pages give some number, and write nothing beyond the step's rows."""
    case = make_case((8, 2, 64), torch.bfloat16, [(1, 40), (20, 30), (1, 3)])
    case.k.nan_to_num_(0), case.v.nan_to_num_(0)
    i = case.inputs
    i.kv_len[:] = torch.tensor([2**31 - 1, 3, -7], dtype=torch.int32)
    i.slot[:] = torch.tensor([-4, 1000, 0], dtype=torch.int32)
    i.page_table[0, 0] = 2**30
    out, lse = case.run(gpu, 0.1)
    assert torch.isfinite(out.float()).all()
    assert torch.isfinite(lse).all()


def test_rejects_unusable_shapes(gpu):
    case = make_case((8, 2, 64), torch.bfloat16, [(1, 40)])
    if not TRITON:  # whose kernels take pages of any size
        k = torch.zeros(4, 2, 24, 64, dtype=torch.bfloat16, device=DEVICE)
        with pytest.raises(ValueError, match="pages of 24 tokens"):
            gpu.plan_attention(case.on_device(), 8, k)
    with pytest.raises(ValueError, match="num_heads=7"):
        gpu.plan_attention(case.on_device(), 7, put(case.k))
    with pytest.raises(ValueError, match="window=-1"):
        gpu.plan_attention(case.on_device(), 8, put(case.k), -1)
