"""What the README says of the memory of quantised weights: bits for each weight, scales and zeros counted."""

from __future__ import annotations

import pytest
import torch

from batchinfer import ops as op_list
from batchinfer.ops.grouped import GroupQuantized
from batchinfer.ops.quantized import Quantized

N, K = 256, 1024


def groups(bits: int, group: int, zeros: bool = False, float8: bool = False) -> GroupQuantized:
    codes, count = torch.zeros(N, K, dtype=torch.uint8), K // group
    if float8:
        return GroupQuantized(codes.view(torch.float8_e4m3fn), torch.ones(N, count), group)
    given = torch.ones(N, count, dtype=torch.uint8) if zeros else None
    return GroupQuantized(codes, torch.ones(N, count, dtype=torch.float16), group, given, bits)


def blocks(bits: int, size: int) -> Quantized:
    """As GGUF's formats become."""
    scales = torch.ones(N, K // size, dtype=torch.float16)
    return Quantized(torch.zeros(N, K, dtype=torch.uint8), scales, scales, bits)


FORMS = {
    "GPTQ, 4 bits in groups of 128": (groups(4, 128), 5.0, 4.125),
    "AWQ in groups of 128": (groups(4, 128, zeros=True), 5.0, 4.1875),
    "GPTQ, 8 bits in groups of 128": (groups(8, 128), 9.0, 8.125),
    "W8A8": (groups(8, K), 8.03125, 8.015625),
    "fp8 by outputs": (groups(8, K, float8=True), None, 8.03125),
    "fp8 in blocks of 128": (groups(8, 128, float8=True), None, 8.25),
    "Q4_0, Q4_1, Q4_K": (blocks(4, 32), 5.0, None),
    "Q5_0, Q5_1, Q8_0, Q5_K": (blocks(8, 32), 9.0, None),
    "Q6_K": (blocks(8, 16), 10.0, None),
}
"""Name: (a matrix [256, 1024], bits of a weight on a CPU and on a GPU; None where it is not kept as codes)."""


@pytest.mark.feature("models", "memory of quantised weights: bits for each weight, of every form")
@pytest.mark.parametrize("form", FORMS)
def test_bits_of_a_weight(form: str) -> None:
    matrix, on_cpu, on_gpu = FORMS[form]
    kept = matrix.blocks() if isinstance(matrix, GroupQuantized) else matrix
    assert (kept is None) == (on_cpu is None)
    if kept is not None:
        pytest.importorskip("batchinfer._ops", reason="the compiled ops are not built")
        assert op_list.load("cpu", 1).pack_weight(kept).bytes * 8 / (N * K) == on_cpu
    if on_gpu is not None:
        pytest.importorskip("triton")
        from batchinfer.ops.triton.grouped import pack

        assert pack(matrix, torch.device("cpu")).nbytes * 8 / (N * K) == on_gpu
