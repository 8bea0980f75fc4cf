"""What the compiled backend refuses: other devices and instruction sets, and tensors outside the contract."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from tools import run, tool

from batchinfer import _ops
from batchinfer.ops import HeadNorm, Rope, SampleInput, load
from batchinfer.ops.native import NativeOps

OPS = NativeOps("cpu", 2)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def floats(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


# Correct arguments of every op; each case below spoils one of them.
GOOD = {
    "embed": {"ids": ints(3), "table": floats(5, 4), "out": floats(3, 4)},
    "rms_norm": {
        "x": floats(3, 4), "weight": floats(4), "eps": 1e-5, "out": floats(3, 4), "residual": floats(3, 4)
    },
    "layer_norm": {
        "x": floats(3, 4), "weight": floats(4), "bias": floats(4), "eps": 1e-5, "out": floats(3, 4),
        "residual": floats(3, 4),
    },
    "add": {"x": floats(3, 4), "residual": floats(3, 4)},
    "softcap": {"x": floats(3, 4), "softcap": 30.0},
    "rope_and_cache": {
        "qkv": floats(3, 4 * 6), "positions": ints(3), "kv_index": torch.arange(3), "rope": Rope(floats(9, 6)),
        "k_cache": floats(2, 1, 4, 6), "v_cache": floats(2, 1, 4, 6), "q_out": floats(3, 2, 6),
        "norm": HeadNorm(floats(6), floats(6), 1e-5),
    },
    "silu_mul": {"gate_up": floats(3, 8), "out": floats(3, 4)},
    "gelu_mul": {"gate_up": floats(3, 8), "out": floats(3, 4)},
    "activate": {"kind": "relu", "x": floats(3, 4), "out": floats(3, 4)},
    "gather_rows": {"x": floats(3, 4), "index": ints(2), "out": floats(2, 4)},
    "copy_pages": {
        "k_cache": floats(3, 2, 4, 6), "v_cache": floats(3, 2, 4, 6), "source": ints(1), "target": ints(1) + 2,
    },
}  # fmt: skip

BAD = [
    ("embed", "ids", ints(3, dtype=torch.int64), "ids has dtype torch.int64: torch.int32 is needed"),
    ("embed", "ids", ints(2), r"ids has shape \(2,\): \(3,\) is needed"),
    ("embed", "ids", ints(3) + 5, r"ids\[0\]=5 is not in \[0, 5\)"),
    ("embed", "ids", ints(3) - 1, r"ids\[0\]=-1 is not in \[0, 5\)"),
    ("embed", "table", floats(5, 4).half(), "table has dtype torch.float16: torch.float32 or torch.bfloat16 is needed"),
    ("embed", "table", floats(4, 5).T, "table must be contiguous"),
    ("embed", "table", floats(5, 4, 1), r"table has shape \(5, 4, 1\): 2 dimensions are needed"),
    ("embed", "out", floats(3, 4).double(), "out has dtype torch.float64"),
    ("rms_norm", "x", floats(4, 4), r"out has shape \(3, 4\): \(4, 4\) is needed"),
    ("rms_norm", "weight", floats(4).bfloat16(), "weight has dtype torch.bfloat16: torch.float32 is needed"),
    ("rms_norm", "residual", floats(2, 4), "residual has shape"),
    ("rms_norm", "out", torch.ones(3, 4, device="meta"), "out must be contiguous and on the CPU"),
    ("rope_and_cache", "qkv", floats(3, 23), r"qkv has shape \(3, 23\): \(3, 24\) is needed"),
    ("rope_and_cache", "positions", ints(3) + 9, r"positions\[0\]=9 is not in \[0, 9\)"),
    ("rope_and_cache", "kv_index", ints(3), "kv_index has dtype torch.int32: torch.int64 is needed"),
    ("rope_and_cache", "kv_index", torch.arange(6, 9), r"kv_index\[2\]=8 is not in \[0, 8\)"),
    ("rope_and_cache", "rope", Rope(floats(9, 8)), "rope.cos_sin has width 8: it must be even and at most .* 6"),
    ("rope_and_cache", "rope", Rope(floats(9, 3)), "rope.cos_sin has width 3"),
    ("rope_and_cache", "v_cache", floats(2, 1, 4, 6).bfloat16(), "v_cache has dtype torch.bfloat16: torch.float32"),
    ("rope_and_cache", "v_cache", floats(2, 1, 3, 6), "v_cache has shape"),
    ("rope_and_cache", "norm", HeadNorm(floats(6), floats(5), 1e-5), "norm.k has shape"),
    ("layer_norm", "bias", floats(3), r"bias has shape \(3,\): \(4,\) is needed"),
    ("layer_norm", "residual", floats(2, 4), "residual has shape"),
    ("add", "residual", floats(2, 4), "residual has shape"),
    ("softcap", "softcap", 0.0, "softcap=0.0 must be above 0"),
    ("activate", "kind", "tanh", "kind='tanh' must be one of gelu, gelu_tanh, relu"),
    ("gelu_mul", "gate_up", floats(3, 7), r"gate_up has shape \(3, 7\): \(3, 8\) is needed"),
    ("silu_mul", "gate_up", floats(3, 7), r"gate_up has shape \(3, 7\): \(3, 8\) is needed"),
    ("gather_rows", "index", ints(2) + 3, r"index\[0\]=3 is not in \[0, 3\)"),
    ("gather_rows", "out", floats(3, 4), r"out has shape \(3, 4\): \(2, 4\) is needed"),
    ("copy_pages", "v_cache", floats(2, 2, 4, 6), r"v_cache has shape \(2, 2, 4, 6\): \(3, 2, 4, 6\) is needed"),
    ("copy_pages", "k_cache", floats(3, 2, 6, 4).mT, "k_cache must be contiguous"),
    ("copy_pages", "source", ints(1) - 1, r"source\[0\]=-1 is not in \[0, 3\)"),
    ("copy_pages", "target", ints(1) + 3, r"target\[0\]=3 is not in \[0, 3\)"),
    ("copy_pages", "target", ints(2), r"target has shape \(2,\): \(1,\) is needed"),
]


@pytest.mark.parametrize("op", GOOD)
def test_the_good_arguments_are_good(op: str) -> None:
    getattr(OPS, op)(**GOOD[op])


@pytest.mark.parametrize(("op", "argument", "value", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_argument_is_named(op: str, argument: str, value: object, message: str) -> None:
    before = {k: v.clone() for k, v in GOOD[op].items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        getattr(OPS, op)(**GOOD[op] | {argument: value})
    for name, tensor in before.items():
        assert torch.equal(GOOD[op][name], tensor), f"{name} was changed"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", floats(2).double(), "temperature has dtype torch.float64: torch.float32 is needed"),
        ("top_k", ints(3), r"top_k has shape \(3,\): \(2,\) is needed"),
        ("seed", ints(2), "seed has dtype torch.int32: torch.int64 is needed"),
        ("penalties", (floats(2),) * 3, "history_ids is missing"),
        ("banned_ids", ints(2), "banned_start is missing"),
        ("num_logprobs", ints(1), "num_logprobs has shape"),
    ],
)
def test_a_bad_sampling_field_is_named(field: str, value: object, message: str) -> None:
    good = {"temperature": floats(2), "top_k": ints(2), "top_p": floats(2), "min_p": floats(2)}
    good |= {"seed": ints(2, dtype=torch.int64), "position": ints(2)}
    OPS.sample(floats(2, 5), SampleInput(**good))
    with pytest.raises(ValueError, match=message):
        OPS.sample(floats(2, 5), SampleInput(**good | {field: value}))


def test_too_large_a_vocabulary_is_refused() -> None:
    inputs = SampleInput(*(floats(1), ints(1), floats(1), floats(1), ints(1, dtype=torch.int64), ints(1)))
    for vocab in (0, 2**19 + 1):
        with pytest.raises(ValueError, match=rf"logits has {vocab} columns"):
            OPS.sample(torch.empty(1, vocab), inputs)


def test_a_missing_extension_names_the_rebuild_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "batchinfer._ops", None)
    with pytest.raises(RuntimeError, match=r"compiled for: nothing .*BATCHINFER_DEVICE=cpu pip install"):
        load("cpu")


@pytest.mark.feature("CPU kernels", "portable, AVX2, AVX-512, AVX512-VNNI, AVX512-BF16, chosen at run time")
def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = _ops.build_info["usable_isas"]
    assert set(usable) <= set(_ops.build_info["isas"])
    assert usable[-1] == _ops.build_info["isas"][-1]  # the baseline, which needs nothing
    monkeypatch.delenv("BATCHINFER_ISA", raising=False)
    assert NativeOps("cpu", 1).isa == usable[0]
    for isa in usable:
        monkeypatch.setenv("BATCHINFER_ISA", isa)
        assert NativeOps("cpu", 1).isa == isa
        assert NativeOps("cpu", 1, isa=usable[0]).isa == usable[0]  # the argument wins
    monkeypatch.setenv("BATCHINFER_ISA", "mmx")
    with pytest.raises(ValueError, match=rf"'mmx' .BATCHINFER_ISA. cannot be used: .* can run {', '.join(usable)}"):
        NativeOps("cpu", 1)


@pytest.mark.feature("CPU kernels", "AMX: bf16 and int8 products, emulated in C++ tests; run on no such CPU yet")
@pytest.mark.skipif("amx" not in _ops.build_info["isas"], reason="another processor, or a compiler before GCC 11")
def test_products_on_tiles_are_in_the_extension() -> None:
    """Emulation (tests/csrc) proves the loops; this, that the compiler made these instructions of the same source."""
    code = run(tool("objdump"), "--disassemble", "--no-show-raw-insn", _ops.__file__)
    for instruction in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tdpbsud", "tilestored", "tilerelease"):
        assert instruction in code


@pytest.mark.skipif("amx" in _ops.build_info["usable_isas"], reason="this CPU has AMX")
def test_tiles_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_ISA", "amx")
    with pytest.raises(ValueError, match=r"'amx' .BATCHINFER_ISA. cannot be used: .* can run"):
        NativeOps("cpu", 1)


def test_threads() -> None:
    assert NativeOps("cpu", 3).threads == 3
    assert load("cpu").threads >= 1
    with pytest.raises(ValueError, match=r"threads=-1 is not allowed"):
        NativeOps("cpu", -1)


def test_two_callers_at_once_are_refused_or_served_one_after_the_other() -> None:
    """Never a wrong result: an op either raises, or its output is right."""
    x = torch.randn(2000, 512)
    want = torch.empty(2000, 256)
    OPS.silu_mul(x, want)
    refused = []

    def call() -> None:
        out = torch.empty_like(want)
        for _ in range(50):
            try:
                OPS.silu_mul(x, out.zero_())
            except RuntimeError as e:
                refused.append(str(e))
            else:
                assert torch.equal(out, want)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all("one job at a time" in message for message in refused)
    call()
