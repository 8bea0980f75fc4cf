"""Paged attention against float64, and that a sequence's bits do not depend on batch, threads or chunking."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchinfer import _ops
from batchinfer.ops import AttentionInput
from batchinfer.ops.native import NativeOps
from batchinfer.ops.quantized import FLOAT8, decode_kv, encode_kv
from batchinfer.ops.reference import ReferenceOps

ISAS = _ops.build_info["usable_isas"]
DTYPES = (torch.float32, torch.bfloat16, torch.int8, FLOAT8)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
isas = pytest.mark.parametrize("isa", ISAS)


@cache
def native(isa: str, threads: int = 2) -> NativeOps:
    return NativeOps("cpu", threads, isa)


@dataclass(frozen=True)
class Case:
    inputs: AttentionInput
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    window: int = 0
    softcap: float = 0.0

    @property
    def scale(self) -> float:
        """Twice the usual one, so that some positions get most of the weight."""
        return 2 / self.q.shape[2] ** 0.5


def make_case(
    sequences: list[tuple[int, int]],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    width: int = 64,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    shared: int = 0,
    seed: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> Case:
    """``sequences``: (tokens in the step, length). The first ``shared`` pages are the same for all that are so long.
    Pages and slots are in random order; unused page table entries are invalid, unused cache memory is NaN."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for _, length in sequences]
    pages = shared + sum(counts) + 1
    order = torch.randperm(pages, generator=g).tolist()
    common = [order.pop() for _ in range(shared)]
    table = torch.full((len(sequences) + 2, max(counts, default=0) + 1), -7, dtype=torch.int32)
    slots = torch.randperm(len(sequences) + 2, generator=g)[: len(sequences)].int()
    caches = torch.full((2, pages, kv_heads, page_size, width), torch.nan)
    for (_, length), count, slot in zip(sequences, counts, slots.tolist(), strict=True):
        for j in range(count):
            full = (j + 1) * page_size <= length
            page = common[j] if j < shared and full else order.pop()
            table[slot, j] = page
            filled = min(page_size, length - j * page_size)
            caches[:, page, :, :filled] = torch.randn(2, kv_heads, filled, width, generator=g)
    q_start = torch.tensor([0] + [n for n, _ in sequences]).cumsum(0).int()
    kv_len = torch.tensor([length for _, length in sequences], dtype=torch.int32)
    q = torch.randn(int(q_start[-1]), heads, width, generator=g)
    inputs = AttentionInput(q_start, kv_len, slots, table)
    k_cache, v_cache = encode_kv(caches, dtype)
    return Case(inputs, q, k_cache, v_cache, window, softcap)


def attend(ops: NativeOps | ReferenceOps, case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    out = torch.full(case.q.shape, torch.nan, dtype=dtype)
    lse = torch.full(case.q.shape[:2], torch.nan, dtype=dtype)
    plan = ops.plan_attention(case.inputs, case.q.shape[1], case.k_cache, case.window)
    ops.attention(case.q, case.k_cache, case.v_cache, plan, case.scale, out, lse, case.softcap)
    return out, lse


def check(ops: NativeOps, case: Case, atol: float = 2e-5, lse_atol: float = 2e-5) -> None:
    """Against float64. Where the instruction set rounds queries and probabilities to bfloat16: from rounded queries,
    and every probability may be off by half a unit of its 8 bits."""
    exact, slack = ReferenceOps(torch.float64), 0.0
    out, lse = attend(ops, case)
    if ops.bf16_dot and case.k_cache.dtype is not torch.float32:
        case = dataclasses.replace(case, q=case.q.bfloat16().float())
        keys, values = (decode_kv(cache, torch.float64) for cache in (case.k_cache, case.v_cache))
        sizes, _ = attend(exact, dataclasses.replace(case, k_cache=keys, v_cache=values.abs()), torch.float64)
        slack = sizes * 2**-8
    truth_out, truth_lse = attend(exact, case, torch.float64)
    error = (out.double() - truth_out).abs()
    assert (error <= atol + slack).all(), f"{ops.isa}: error {error.max()}"
    torch.testing.assert_close(lse.double(), truth_lse, atol=lse_atol, rtol=1e-6)


def only(case: Case, sequence: int, first: int = 0, last: int | None = None) -> tuple[Case, slice]:
    """The tokens [first, last) of one sequence's part of the step as a step of their own, and their rows."""
    start, end = case.inputs.q_start[sequence : sequence + 2].tolist()
    last = end - start if last is None else last
    rows = slice(start + first, start + last)
    inputs = dataclasses.replace(
        case.inputs,
        q_start=torch.tensor([0, last - first], dtype=torch.int32),
        kv_len=case.inputs.kv_len[sequence : sequence + 1] - (end - start - last),
        slot=case.inputs.slot[sequence : sequence + 1].clone(),
    )
    return dataclasses.replace(case, inputs=inputs, q=case.q[rows].clone()), rows


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    page_size = draw(st.sampled_from([8, 16, 32, 64]))
    kv_heads = draw(st.integers(1, 3))
    lengths = st.integers(1, 200) | st.sampled_from([page_size, page_size + 1, 63, 64, 65, 128])
    sequences = []
    for length in draw(st.lists(lengths, max_size=6)):
        decode = draw(st.booleans())
        sequences.append((1 if decode else draw(st.integers(1, length)), length))
    return {
        "sequences": sequences,
        "heads": kv_heads * draw(st.integers(1, 4) | st.sampled_from([7, 16])),
        "kv_heads": kv_heads,
        "width": 8 * draw(st.integers(1, 8) | st.sampled_from([10, 12, 16, 32])),
        "page_size": page_size,
        "dtype": draw(st.sampled_from(DTYPES)),
        "shared": draw(st.integers(0, 4)),
        "seed": draw(st.integers(0, 2**31)),
        "window": draw(st.just(0) | st.integers(1, 150)),
        "softcap": draw(st.sampled_from([0.0, 2.0, 50.0])),
    }


@pytest.mark.feature("CPU kernels", "paged attention with log-sum-exp: GQA, prefill and decode, bf16 and fp32")
@pytest.mark.feature("CPU kernels", "sliding windows and soft caps of attention scores")
@isas
@settings(max_examples=25)
@given(case=cases(), threads=st.integers(1, 3))
@pytest.mark.hardware("sliding windows, soft caps")
def test_against_float64(isa: str, case: dict[str, Any], threads: int) -> None:
    check(native(isa, threads), make_case(**case))


@isas
@dtypes
def test_more_than_one_split(isa: str, dtype: torch.dtype) -> None:
    for window in (0, 1100):
        case = make_case([(1, 2500), (40, 1030), (1, 1024), (1, 1025)], page_size=32, dtype=dtype, window=window)
        check(native(isa, 1), case)
        check(native(isa, 3), case)


MIX = [(1, 700), (1, 650), (90, 1100), (1, 1), (1, 640), (64, 64), (1, 700), (3, 65), (17, 300)]


@pytest.mark.feature("CPU kernels", "results independent of batch and threads")
@isas
@dtypes
@pytest.mark.parametrize(("shared", "window", "softcap"), [(0, 0, 0.0), (40, 0, 0.0), (40, 200, 5.0)])
def test_a_sequence_does_not_depend_on_batch_or_threads(
    isa: str, dtype: torch.dtype, shared: int, window: int, softcap: float
) -> None:
    case = make_case(MIX, dtype=dtype, shared=shared, window=window, softcap=softcap)
    together = [attend(native(isa, threads), case) for threads in (1, 2, 3)]
    for out, lse in together[1:]:
        assert torch.equal(out, together[0][0])
        assert torch.equal(lse, together[0][1])
    for i in range(len(MIX)):
        alone, rows = only(case, i)
        for threads in (1, 3):  # three threads cut a lone long sequence into its splits
            out, lse = attend(native(isa, threads), alone)
            assert torch.equal(out, together[0][0][rows]), i
            assert torch.equal(lse, together[0][1][rows]), i


@isas
@dtypes
@pytest.mark.parametrize("window", [0, 300])
def test_a_token_does_not_depend_on_how_its_prompt_is_chunked(isa: str, dtype: torch.dtype, window: int) -> None:
    case = make_case([(1200, 1200)], heads=3, kv_heads=1, dtype=dtype, window=window)
    whole, whole_lse = attend(native(isa), case)
    for first, last in [(0, 1), (0, 130), (130, 131), (131, 700), (700, 1023), (1023, 1025), (1025, 1200)]:
        chunk, rows = only(case, 0, first, last)
        out, lse = attend(native(isa), chunk)
        assert torch.equal(out, whole[rows]), (first, last)
        assert torch.equal(lse, whole_lse[rows]), (first, last)


@pytest.mark.feature("CPU kernels", "shared prefixes are read once for all their sequences")
@dtypes
@pytest.mark.hardware("beginnings that sequences share are read once")
def test_a_shared_prefix_becomes_one_item(dtype: torch.dtype) -> None:
    ops = native(ISAS[0], 1)
    case = make_case([(1, 640 + i) for i in range(1, 11)], dtype=dtype, shared=40)
    other = make_case([(1, 640 + i) for i in range(1, 11)], dtype=dtype)
    items = [ops.plan_attention(c.inputs, 6, c.k_cache).num_items for c in (case, other)]
    assert items[0] < items[1] == 20
    check(ops, case)


@dtypes
def test_keys_before_the_window_are_not_read(dtype: torch.dtype) -> None:
    """As far as whole blocks of 64 lie before it."""
    case = make_case([(1, 700), (10, 640)], dtype=dtype, window=100)
    clean, _ = attend(native(ISAS[0]), case)
    for slot, unseen in zip(case.inputs.slot.tolist(), (600, 531), strict=True):
        for page in case.inputs.page_table[slot, : unseen // 64 * 4].tolist():
            case.k_cache[page] = case.v_cache[page] = -1 if dtype is torch.int8 else torch.nan  # as a scale NaN too
    assert torch.equal(attend(native(ISAS[0]), case)[0], clean)


@isas
@dtypes
def test_context_of_100k(isa: str, dtype: torch.dtype) -> None:
    case = make_case([(1, 100_000)], heads=2, kv_heads=1, width=16, page_size=64, dtype=dtype)
    check(native(isa, 2), case)
    assert torch.equal(attend(native(isa, 1), case)[0], attend(native(isa, 3), case)[0])


@isas
def test_large_scores(isa: str) -> None:
    """Scores far beyond exp's range, and a maximum that comes late."""
    case = make_case([(1, 300), (200, 200)])
    case = dataclasses.replace(case, q=case.q * 100)
    # Scores are sums of 64 products of hundreds: their last bits are worth 1e-4.
    check(native(isa), case, atol=1e-2, lse_atol=2e-3)


@isas
def test_a_bad_sequence_does_not_reach_the_others(isa: str) -> None:
    case = make_case(MIX, shared=40)
    clean, _ = attend(native(isa), case)
    q = case.q.clone()
    start, end = case.inputs.q_start[4:6].tolist()
    q[start:end] = torch.nan
    dirty, _ = attend(native(isa), dataclasses.replace(case, q=q))
    assert dirty[start:end].isnan().all()
    assert torch.equal(dirty[:start], clean[:start])
    assert torch.equal(dirty[end:], clean[end:])


@isas
def test_empty_step(isa: str) -> None:
    out, lse = attend(native(isa), make_case([]))
    assert out.shape == (0, 6, 64)
    assert lse.shape == (0, 6)


def test_the_plan_copies_the_page_table() -> None:
    """The scheduler changes its table for the next step while this one runs."""
    ops, case = native(ISAS[0]), make_case(MIX)
    truth, _ = attend(ops, case)
    plan = ops.plan_attention(case.inputs, 6, case.k_cache)
    case.inputs.page_table.fill_(-1)
    out, lse = torch.empty(case.q.shape), torch.empty(case.q.shape[:2])
    ops.attention(case.q, case.k_cache, case.v_cache, plan, case.scale, out, lse)
    assert torch.equal(out, truth)


@pytest.mark.parametrize(
    ("field", "index", "value", "message"),
    [
        ("kv_len", 1, 2, "sequence 1: 3 tokens in the step, but kv_len is 2"),
        ("kv_len", 0, 65, "sequence 0: kv_len 65 needs 5 pages, a slot has 4"),
        ("q_start", 0, 1, "q_start must begin with 0"),
        ("q_start", 2, 0, "q_start must begin with 0 and never decrease"),
        ("slot", 0, 4, r"slot 4 is not in \[0, 4\)"),
        ("slot", 1, -1, r"sequence 1: slot -1 is not in \[0, 4\)"),
    ],
)
def test_contradicting_arrays_are_refused(field: str, index: int, value: int, message: str) -> None:
    case = make_case([(1, 30), (3, 48)])
    getattr(case.inputs, field)[index] = value
    with pytest.raises(ValueError, match=message):
        native(ISAS[0]).plan_attention(case.inputs, 6, case.k_cache)


@pytest.mark.parametrize("page", [-1, 1000])
def test_pages_outside_the_cache_are_refused(page: int) -> None:
    case = make_case([(1, 30)])
    case.inputs.page_table[case.inputs.slot[0], 1] = page
    with pytest.raises(ValueError, match=f"sequence 0: page_table entry 1 is {page}, not in"):
        native(ISAS[0]).plan_attention(case.inputs, 6, case.k_cache)


def test_wrong_shapes_are_named() -> None:
    ops, case = native(ISAS[0]), make_case([(1, 30)])
    plan = ops.plan_attention(case.inputs, 6, case.k_cache)
    out, lse = torch.empty(case.q.shape), torch.empty(case.q.shape[:2])
    with pytest.raises(ValueError, match="num_heads=5 must be a positive multiple"):
        ops.plan_attention(case.inputs, 5, case.k_cache)
    with pytest.raises(ValueError, match="window=-1 must be 0"):
        ops.plan_attention(case.inputs, 6, case.k_cache, -1)
    with pytest.raises(ValueError, match="multiple of 8 up to 256"):
        ops.plan_attention(case.inputs, 6, case.k_cache[..., :12].contiguous())
    with pytest.raises(ValueError, match="q has shape"):
        ops.attention(case.q[:, :3].contiguous(), case.k_cache, case.v_cache, plan, case.scale, out, lse)
    with pytest.raises(ValueError, match="v_cache has dtype"):
        ops.attention(case.q, case.k_cache, case.v_cache.float(), plan, case.scale, out, lse)
