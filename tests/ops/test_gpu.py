"""What the compiled GPU backend needs of torch and of the build, without a GPU."""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace

import pytest
import torch

from batchinfer.ops.gpu import GpuOps, open_gpu


@pytest.mark.skipif(importlib.util.find_spec("batchinfer._gpu") is not None, reason="this build has kernels for GPUs")
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_build_without_kernels_says_how_to_get_them(device: str) -> None:
    with pytest.raises(RuntimeError, match=f"BATCHINFER_DEVICE={device} pip install"):
        open_gpu(f"{device}:0")


@pytest.mark.parametrize(("kind", "handle"), [("cuda", "cuda_stream"), ("xpu", "sycl_queue")])
def test_kernels_go_on_the_current_stream_of_torch(monkeypatch: pytest.MonkeyPatch, kind: str, handle: str) -> None:
    streams = {torch.device(kind, 1): SimpleNamespace(**{handle: 0xBEEF})}
    monkeypatch.setattr(getattr(torch, kind), "current_stream", streams.__getitem__)
    assert GpuOps(torch.device(kind, 1), ModuleType("_gpu"))._stream() == 0xBEEF
