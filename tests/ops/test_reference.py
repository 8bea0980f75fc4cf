"""The reference ops against torch's and transformers' own functions, which share no code with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from batchinfer.ops import AttentionInput, HeadNorm, Rope, load
from batchinfer.ops.reference import ReferenceOps

OPS = ReferenceOps(torch.float64)
DOUBLE = torch.float64


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(sum(shape)))


def empty(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=DOUBLE)


def test_load_gives_a_float32_backend() -> None:
    ops = load("reference")
    assert isinstance(ops, ReferenceOps)
    assert ops.pack_weight(torch.ones(2, 2, dtype=torch.bfloat16)).dtype is torch.float32


def test_linear() -> None:
    x, weight, bias, out = random(5, 7), random(3, 7), random(3), empty(5, 3)
    OPS.linear(x, OPS.pack_weight(weight), out)
    torch.testing.assert_close(out, F.linear(x, weight))
    OPS.linear(x, OPS.pack_weight(weight), out, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias))


def test_embed_and_gather() -> None:
    table, ids, out = random(9, 4), torch.tensor([8, 0, 3], dtype=torch.int32), empty(3, 4)
    OPS.embed(ids, table, out, scale=0.5)
    torch.testing.assert_close(out, 0.5 * F.embedding(ids, table))
    OPS.gather_rows(table, ids, out)
    torch.testing.assert_close(out, table.index_select(0, ids))


def test_copy_pages() -> None:
    caches = random(6, 2, 4, 3), random(6, 2, 4, 3)
    want = [cache.clone() for cache in caches]
    OPS.copy_pages(*caches, torch.tensor([5, 1, 1], dtype=torch.int32), torch.tensor([0, 4, 2], dtype=torch.int32))
    for cache, before in zip(caches, want, strict=True):
        assert torch.equal(cache, before[[5, 1, 1, 3, 1, 5]])


def test_rms_norm_adds_to_the_residual_first() -> None:
    x, stream, weight, out = random(4, 6), random(6, 4).T.contiguous(), random(6), empty(4, 6)
    want = F.rms_norm(x + stream, (6,), weight, eps=1e-3)
    total = x + stream
    OPS.rms_norm(x, weight, 1e-3, out, stream)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(stream, total)


def test_silu_mul() -> None:
    gate_up, out = random(3, 10), empty(3, 5)
    OPS.silu_mul(gate_up, out)
    torch.testing.assert_close(out, F.silu(gate_up[:, :5]) * gate_up[:, 5:])


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias: bool) -> None:
    x, stream, weight, out = random(4, 6), random(6, 4).T.contiguous(), random(6), empty(4, 6)
    shift = random(6) + 1 if bias else None
    total = x + stream
    OPS.layer_norm(x, weight, shift, 1e-3, out, stream)
    torch.testing.assert_close(out, F.layer_norm(total, (6,), weight, shift, eps=1e-3))
    torch.testing.assert_close(stream, total)


def test_activations() -> None:
    x, gate_up, out = 3 * random(4, 5), random(3, 10), empty(3, 5)
    OPS.gelu_mul(gate_up, out)
    torch.testing.assert_close(out, F.gelu(gate_up[:, :5], approximate="tanh") * gate_up[:, 5:])
    for kind, want in {"relu": F.relu(x), "gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}.items():
        got = empty(4, 5)
        OPS.activate(kind, x, got)
        torch.testing.assert_close(got, want)


def test_softcap_and_add() -> None:
    x = 9 * random(4, 5)
    want, total = 7 * torch.tanh(x / 7), 2 * x
    OPS.add(x.clone(), x)
    torch.testing.assert_close(x, total)
    x /= 2
    OPS.softcap(x, 7.0)
    torch.testing.assert_close(x, want)


def test_rope_and_cache() -> None:
    tokens, heads, kv_heads, width, page_size = 4, 6, 2, 8, 3
    qkv, angles = random(tokens, (heads + 2 * kv_heads) * width), random(20, width // 2)
    norm = HeadNorm(random(width), random(width) + 1, 1e-6)
    positions, kv_index = torch.tensor([3, 19, 0, 7], dtype=torch.int32), torch.tensor([5, 0, 8, 6])
    k_cache, v_cache, q_out = empty(3, kv_heads, page_size, width), empty(3, kv_heads, page_size, width), empty(4, 6, 8)
    rope = Rope(torch.cat([angles.cos(), angles.sin()], dim=1))
    OPS.rope_and_cache(qkv, positions, kv_index, rope, k_cache, v_cache, q_out, norm)

    q, k, v = qkv.view(tokens, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    q, k = F.rms_norm(q, (width,), norm.q, 1e-6), F.rms_norm(k, (width,), norm.k, 1e-6)
    both = torch.cat([angles, angles], dim=1)[positions.long()][None]
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], both.cos(), both.sin())
    torch.testing.assert_close(q_out, q[0].transpose(0, 1))
    for t, token in enumerate(kv_index.tolist()):
        page, offset = divmod(token, page_size)
        torch.testing.assert_close(k_cache[page, :, offset], k[0, :, t])
        torch.testing.assert_close(v_cache[page, :, offset], v[t])
    assert int(k_cache.isnan().any(dim=-1).sum()) == (9 - tokens) * kv_heads


def test_partial_rope_copies_the_rest() -> None:
    qkv, q_out, k_cache, v_cache = random(1, 3 * 8), empty(1, 1, 8), empty(1, 1, 1, 8), empty(1, 1, 1, 8)
    quarter_turn = Rope(torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=DOUBLE))  # two angles of 90 degrees
    zero = torch.zeros(1, dtype=torch.int32)
    OPS.rope_and_cache(qkv, zero, zero.long(), quarter_turn, k_cache, v_cache, q_out)
    q = qkv[0, :8]
    torch.testing.assert_close(q_out[0, 0], torch.cat([-q[2:4], q[:2], q[4:]]))


def test_a_norm_of_all_heads_together() -> None:
    qkv, q_out, k_cache, v_cache = random(1, 8 * 4), empty(1, 4, 4), empty(1, 2, 1, 4), empty(1, 2, 1, 4)
    norm, zero = HeadNorm(random(16), random(8) + 1, 1e-6), torch.zeros(1, dtype=torch.int32)
    OPS.rope_and_cache(qkv, zero, zero.long(), None, k_cache, v_cache, q_out, norm)
    torch.testing.assert_close(q_out.flatten(), F.rms_norm(qkv[0, :16], (16,), norm.q, 1e-6))
    torch.testing.assert_close(k_cache.flatten(), F.rms_norm(qkv[0, 16:24], (8,), norm.k, 1e-6))
    torch.testing.assert_close(v_cache.flatten(), qkv[0, 24:])


@pytest.mark.parametrize(("heads", "window"), [(2, 0), (6, 0), (6, 1), (2, 4), (2, 100)])
def test_attention(heads: int, window: int) -> None:
    """Two sequences, the first half cached already, against torch's dense attention."""
    kv_heads, width, page_size, scale = 2, 5, 4, 0.37
    k, v = [random(n, kv_heads, width) for n in (6, 9)], [random(n, kv_heads, width) + 1 for n in (6, 9)]
    pages = [[4, 1], [0, 3, 5]]
    k_cache, v_cache = empty(6, kv_heads, page_size, width), empty(6, kv_heads, page_size, width)
    for i in range(2):
        for t in range(len(k[i])):
            k_cache[pages[i][t // page_size], :, t % page_size] = k[i][t]
            v_cache[pages[i][t // page_size], :, t % page_size] = v[i][t]
    table = torch.full((3, 4), -1, dtype=torch.int32)
    table[2, :2], table[0, :3] = torch.tensor(pages[0]), torch.tensor(pages[1])
    new = [6, 3]  # a whole prompt; the last three tokens of a longer one
    ints = {"q_start": [0, 6, 9], "kv_len": [6, 9], "slot": [2, 0]}
    inputs = AttentionInput(**{n: torch.tensor(t, dtype=torch.int32) for n, t in ints.items()}, page_table=table)
    q, out, lse = random(9, heads, width), empty(9, heads, width), empty(9, heads)
    OPS.attention(q, k_cache, v_cache, OPS.plan_attention(inputs, heads, k_cache, window), scale, out, lse)
    for i, rows in enumerate((slice(0, 6), slice(6, 9))):
        last = len(k[i]) - new[i]  # what the first new token sees last
        mask = torch.ones(new[i], len(k[i]), dtype=torch.bool).tril(last)
        if window:
            mask = mask.triu(last - window + 1)
        heads_first = [x.transpose(0, 1) for x in (q[rows], k[i], v[i])]
        want = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale, enable_gqa=True)
        torch.testing.assert_close(out[rows], want.transpose(0, 1))
        scores = q[rows].transpose(0, 1) @ k[i].repeat_interleave(heads // kv_heads, 1).permute(1, 2, 0) * scale
        torch.testing.assert_close(lse[rows], scores.masked_fill(~mask, -torch.inf).logsumexp(-1).T)


def test_indices_out_of_range_are_named() -> None:
    table, ids = random(9, 4), torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"ids\[1\]=9 is not in \[0, 9\)"):
        OPS.embed(ids, table, empty(2, 4))
    with pytest.raises(ValueError, match=r"index\[1\]=9 is not in \[0, 9\)"):
        OPS.gather_rows(table, ids, empty(2, 4))
    caches = random(9, 1, 1, 1), random(9, 1, 1, 1)
    with pytest.raises(ValueError, match=r"target\[1\]=9 is not in \[0, 9\)"):
        OPS.copy_pages(*caches, ids[:1].expand(2), ids)
