"""engine.dtype: what auto is, and who has float16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from batchinfer.config import EngineConfig
from batchinfer.engine.half import default_dtype, with_dtype
from batchinfer.ops.device import DeviceOps
from batchinfer.ops.native import NativeOps
from batchinfer.types import ExitCode, JobError


@pytest.mark.parametrize(
    ("kind", "name", "wide", "dtype"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", False, "bf16"),
        ("cpu", "", False, "bf16"),
        ("xpu", "Intel(R) Data Center GPU Max 1550", False, "bf16"),
        ("xpu", "Intel(R) Arc(TM) A770 Graphics", False, "fp16"),
        ("xpu", "Intel(R) Arc(TM) B580 Graphics", False, "fp16"),
        ("xpu", "Intel(R) Arc(TM) A770 Graphics", True, "bf16"),
    ],
)
def test_what_auto_is(kind: str, name: str, wide: bool, dtype: str) -> None:
    assert default_dtype(kind, name, wide) == dtype


def test_the_device_is_asked_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    arc = SimpleNamespace(device=torch.device("xpu", 1), lacks=DeviceOps.lacks)
    monkeypatch.setattr(torch.xpu, "get_device_name", {torch.device("xpu", 1): "Intel(R) Arc(TM) A770"}.__getitem__)
    assert with_dtype(EngineConfig(), arc).dtype == "fp16"
    assert with_dtype(EngineConfig(dtype="bf16"), arc).dtype == "bf16"
    assert with_dtype(EngineConfig(dtype="fp16"), arc).dtype == "fp16"


def test_a_cpu_has_no_float16() -> None:
    ops = NativeOps("cpu", 1)
    assert with_dtype(EngineConfig(), ops).dtype == "bf16"
    with pytest.raises(JobError, match=r"engine\.dtype=fp16 is for GPUs.*NativeOps.*auto, or bf16") as caught:
        with_dtype(EngineConfig(dtype="fp16"), ops)
    assert caught.value.exit_code == ExitCode.USAGE
